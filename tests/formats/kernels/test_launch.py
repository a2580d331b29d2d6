"""Loading and launching: what the driver is told, with a stand-in for it; the rest on a GPU."""

import ctypes
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.formats.kernels import launch as module
from secateur.formats.kernels.cubins import cubin
from secateur.formats.kernels.launch import Kernel, Launch, load, prepare, readable
from secateur.formats.kernels.nvrtc import Source, arch_of
from tests.formats.kernels.cubin_info import info

GPU = torch.device("cuda:0")


def gpu(test: Any) -> Any:
    """A test for a machine with a GPU."""
    needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    return pytest.mark.gpu(needed(test))


def test_what_16_byte_loads_cannot_read_is_copied() -> None:
    whole = torch.arange(64, dtype=torch.bfloat16)
    assert readable(whole).data_ptr() == whole.data_ptr()
    assert readable(whole[8:]).data_ptr() == whole[8:].data_ptr()
    for part in (whole[4:12], whole.view(8, 8).t()):
        copy = readable(part)
        assert copy.data_ptr() % 16 == 0 and copy.is_contiguous() and torch.equal(copy, part)
        assert copy.data_ptr() != part.data_ptr()


@dataclass
class Driver:
    """Stands in for the driver: it notes what it is told and reads arguments where they lie."""

    letters: str = ""
    errors: list[int] = field(default_factory=list)  # of the launches to come
    context: int = 7
    told: list[tuple[Any, ...]] = field(default_factory=list)
    shared_bytes: int = 48 * 1024

    def launch(self, config: Any, function: Any, parameters: int, extra: int) -> tuple[Any]:
        kinds = {"P": ctypes.c_uint64, "i": ctypes.c_int32, "f": ctypes.c_float}
        kinds["T"] = ctypes.c_char * 128
        pointers = (ctypes.c_void_p * max(1, len(self.letters))).from_address(parameters)
        values = [
            kinds[letter].from_address(pointer).value
            for letter, pointer in zip(self.letters, pointers, strict=False)
        ]
        self.told.append(("launch", int(config.hStream), int(function), *values, extra))
        return (self.errors.pop(0) if self.errors else 0,)

    def set_attribute(self, function: Any, attribute: Any, value: int) -> tuple[Any]:
        self.told.append((attribute.name, value))
        if attribute.name.endswith("DYNAMIC_SHARED_SIZE_BYTES"):
            self.shared_bytes = value
        return (0,)

    def get_attribute(self, attribute: Any, function: Any) -> tuple[Any, int]:
        known = {"NUM_REGS": 40, "LOCAL_SIZE_BYTES": 16, "SHARED_SIZE_BYTES": self.shared_bytes}
        return 0, next(value for name, value in known.items() if attribute.name.endswith(name))

    def set_context(self, context: Any) -> tuple[Any]:
        self.context = int(context)
        return (0,)

    def clusters(self, function: Any, config: Any) -> tuple[Any, int]:
        return 0, 10 * config.attrs[0].value.clusterDim.x

    def functions(self) -> SimpleNamespace:
        """What `cuda.bindings.driver` would have: its own structures, and these functions."""
        bindings = pytest.importorskip("cuda.bindings.driver", reason="needs secateur[cuda]")
        structures = {
            name: vars(bindings)[name]
            for name in (
                *("CUlaunchConfig", "CUlaunchAttribute", "CUlaunchAttributeID", "CUresult"),
                *("CUfunction_attribute", "CUdevice_attribute", "CUcontext", "CUfunction"),
            )
        }
        return SimpleNamespace(
            **structures,
            cuLaunchKernelEx=self.launch,
            cuFuncSetAttribute=self.set_attribute,
            cuFuncGetAttribute=self.get_attribute,
            cuCtxGetCurrent=lambda: (0, bindings.CUcontext(self.context)),
            cuCtxSetCurrent=self.set_context,
            cuCtxPushCurrent=lambda context: (self.told.append(("push",)), (0,))[1],
            cuCtxPopCurrent=lambda: (self.told.append(("pop",)), (0, None))[1],
            cuGetErrorName=lambda error: (0, b"CUDA_ERROR_OF_" + str(int(error)).encode()),
            cuGetErrorString=lambda error: (0, b"in words"),
            cuOccupancyMaxActiveBlocksPerMultiprocessor=lambda function, threads, bytes: (0, 3),
            cuOccupancyMaxActiveClusters=self.clusters,
            cuInit=lambda flags: (0,),
            cuDeviceGet=lambda index: (0, 100 + index),
            cuDevicePrimaryCtxRetain=lambda device: (0, bindings.CUcontext(device)),
            cuDriverGetVersion=lambda: (0, 12080),
            cuModuleLoadData=lambda code: (self.told.append(("load", code)), (0, 5))[1],
            cuModuleGetFunction=lambda of, name: (0, bindings.CUfunction(len(name))),
            cuDeviceGetAttribute=lambda attribute, device: (0, 132),
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver()
    functions = stand_in.functions()
    monkeypatch.setattr(module, "_driver", lambda: functions)
    return stand_in


def kernel(capability: tuple[int, int] = (9, 0)) -> Kernel:
    from cuda.bindings import driver as bindings

    return Kernel(
        entry="decode",
        capability=capability,
        registers=40,
        local_bytes=0,
        multiprocessors=132,
        function=bindings.CUfunction(0x1234),
        context=bindings.CUcontext(0x99),
    )


def config_of(launch: Launch) -> Any:
    return launch._config


def attributes(launch: Launch) -> list[tuple[str, int]]:
    found = []
    for attribute in config_of(launch).attrs:
        value = attribute.value
        if attribute.id.name.endswith("CLUSTER_DIMENSION"):
            size = value.clusterDim
            assert (size.y, size.z) == (1, 1)
            found.append(("cluster", size.x))
        else:
            assert attribute.id.name.endswith("PROGRAMMATIC_STREAM_SERIALIZATION")
            found.append(("dependent", value.programmaticStreamSerializationAllowed))
    assert config_of(launch).numAttrs == len(found)
    return found


def test_arguments_lie_where_the_driver_reads_them(driver: Driver) -> None:
    driver.letters = "PiTfPi"
    launch = prepare(kernel(), 4, 1, 128, 0, False, "PiTfPi")
    first, second = bytes(range(1, 129)), bytes(range(128, 0, -1))
    launch(0, 2**63 + 5, -6, first, 0.5, 16, 2**31 - 1)
    launch(0, 1, 2, second, -3.0, 4, -5)
    assert driver.told[-2:] == [
        ("launch", 0, 0x1234, 2**63 + 5, -6, first, 0.5, 16, 2**31 - 1, 0),
        ("launch", 0, 0x1234, 1, 2, second, -3.0, 4, -5, 0),
    ]


def test_a_kernel_without_arguments(driver: Driver) -> None:
    prepare(kernel(), 1, 1, 32, 0, False, "")(3)
    assert driver.told[-1] == ("launch", 3, 0x1234, 0)


@pytest.mark.parametrize("values", [(1,), (1, 2, 3), (1, 2**31), (-1, 2)])
def test_values_that_do_not_fit_are_never_launched(driver: Driver, values: Sequence[int]) -> None:
    launch = prepare(kernel(), 1, 1, 32, 0, False, "Pi")
    before = list(driver.told)
    with pytest.raises(Exception, match="argument|expected|requires|format|range"):
        launch(0, *values)
    assert driver.told == before


def test_the_configuration(driver: Driver) -> None:
    launch = prepare(kernel(), 264, 2, 256, 60_000, True, "P")
    config = config_of(launch)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (264, 1, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (256, 1, 1)
    assert config.sharedMemBytes == 60_000
    assert attributes(launch) == [("cluster", 2), ("dependent", 1)]
    assert attributes(prepare(kernel(), 3, 1, 32, 0, True, "")) == [("dependent", 1)]
    assert attributes(prepare(kernel(), 4, 4, 32, 0, False, "")) == [("cluster", 4)]
    assert attributes(prepare(kernel(), 4, 1, 32, 0, False, "")) == []


def test_before_hopper_a_dependent_launch_is_an_ordinary_one(driver: Driver) -> None:
    assert attributes(prepare(kernel((8, 9)), 4, 1, 32, 0, True, "")) == []


def test_the_stream_is_set_when_it_changes(driver: Driver) -> None:
    class Config:
        def __init__(self) -> None:
            self.streams: list[int] = []

        @property
        def hStream(self) -> int:
            return self.streams[-1] if self.streams else 0

        @hStream.setter
        def hStream(self, stream: int) -> None:
            self.streams.append(stream)

    config = Config()
    launch = Launch(kernel(), config, "")
    for stream in (0, 0, 5, 5, 6, 0, 0):
        launch(stream)
    assert config.streams == [5, 6, 0]
    assert [told[1] for told in driver.told] == [0, 0, 5, 5, 6, 0, 0]


def test_what_the_driver_refuses_is_said_in_its_words(driver: Driver) -> None:
    launch = prepare(kernel(), 1, 1, 32, 0, False, "")
    driver.errors = [1]
    expected = r"^the launch of decode failed with CUDA_ERROR_OF_1: in words$"
    with pytest.raises(RuntimeError, match=expected):
        launch(0)
    launch(0)  # the lock is free again


def test_a_thread_without_a_device_gets_the_kernels(driver: Driver) -> None:
    launch = prepare(kernel(), 1, 1, 32, 0, False, "")
    driver.errors, driver.context = [201], 0
    launch(0)
    assert driver.context == 0x99
    assert [told[0] for told in driver.told[-2:]] == ["launch", "launch"]


def test_a_thread_on_another_device_keeps_it(driver: Driver) -> None:
    launch = prepare(kernel(), 1, 1, 32, 0, False, "")
    driver.errors, driver.context = [201], 7
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OF_201"):
        launch(0)
    assert driver.context == 7


def test_shared_memory_is_only_ever_raised(driver: Driver) -> None:
    for shared_bytes in (1000, 100_000, 60_000, 100_000, 110_000):
        prepare(kernel(), 1, 1, 32, shared_bytes, False, "")
    name = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    told = [what for what in driver.told if what[0] not in ("push", "pop")]
    assert told == [(name, 100_000), (name, 110_000)]
    assert [w[0] for w in driver.told].count("push") == [w[0] for w in driver.told].count("pop")


def test_large_clusters_are_asked_for(driver: Driver) -> None:
    prepare(kernel(), 16, 8, 32, 0, False, "")
    assert {what[0] for what in driver.told} == {"push", "pop"}
    prepare(kernel(), 16, 16, 32, 0, False, "")
    assert ("CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 1) in driver.told


def test_how_many_clusters_fit(driver: Driver) -> None:
    assert kernel().most_clusters(1, 128, 1000) == 3 * 132
    assert kernel().most_clusters(4, 128, 1000) == 40


@pytest.mark.parametrize(("grid", "cluster"), [(0, 1), (3, 2), (4, 0)])
def test_grids_of_whole_clusters(driver: Driver, grid: int, cluster: int) -> None:
    expected = f"whole clusters, got {grid} blocks in clusters of {cluster}: round"
    with pytest.raises(ValueError, match=expected):
        prepare(kernel(), grid, cluster, 32, 0, False, "")


def test_unknown_letters(driver: Driver) -> None:
    with pytest.raises(ValueError, match="letters P, i, f, T, got d, q in 'Pqd'"):
        prepare(kernel(), 1, 1, 32, 0, False, "Pqd")


def test_threads_may_share_a_launch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch finds the arguments that belong together, though the driver takes its time."""
    launch = prepare(kernel(), 1, 1, 32, 0, False, "PP")
    driver.letters = "PP"
    read = driver.launch

    def slow(*of: Any) -> tuple[Any]:
        read(*of)
        threading.Event().wait(1e-4)  # lets the other threads go on
        return read(*of)

    monkeypatch.setattr(launch, "_launch", slow)

    def run(number: int) -> None:
        for _ in range(20):
            launch(number, number, number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launches = [told for told in driver.told if told[0] == "launch"]
    assert len(launches) == 2 * 4 * 20
    assert all(told[1] == told[3] == told[4] for told in launches)
    assert all(one == other for one, other in zip(launches[::2], launches[1::2], strict=True))


@pytest.fixture
def loading(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is compiled for a GPU 9.0 that is not there."""
    compiled: list[tuple[Any, ...]] = []

    def compile_(*of: Any) -> bytes:
        compiled.append(of)
        return b"code"

    monkeypatch.setattr(module, "cubin", compile_)
    monkeypatch.setattr(module, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    module._load.cache_clear()
    return compiled


SOURCE = Source("none.cu", "decode")


def test_a_kernel_is_loaded_once_for_each_device(
    driver: Driver, loading: list[tuple[Any, ...]]
) -> None:
    first = load(SOURCE, (("A", 1),), GPU)
    assert (first.entry, first.registers, first.local_bytes) == ("decode", 40, 16)
    assert (first.capability, first.multiprocessors) == ((9, 0), 132)
    assert int(first.context) == 100
    assert load(Source("none.cu", "decode"), (("A", 1),), GPU) is first
    assert loading == [(SOURCE, (("A", 1),), "sm_90a")]
    assert driver.told == [("push",), ("load", b"code"), ("pop",)]
    assert load(SOURCE, (("A", 2),), GPU) is not first
    second = load(SOURCE, (("A", 1),), torch.device("cuda"))  # the current one, 1
    assert int(second.context) == 101
    assert load(SOURCE, (("A", 1),), torch.device("cuda:1")) is second
    assert len(loading) == 3


def test_in_a_capture_only_a_loaded_kernel_is_given(
    loading: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"none\.cu is not loaded yet.*call warmup\(\)"):
            load(SOURCE, (), GPU)
    assert loading == []
    loaded = load(SOURCE, (), GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert load(SOURCE, (), GPU) is loaded


def test_code_that_the_driver_cannot_load_is_explained(
    loading: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = module._driver()
    monkeypatch.setattr(functions, "cuModuleLoadData", lambda code: (209, None))
    expected = r"loading none\.cu \(NVRTC 13\.0, driver for CUDA 12\.8\) failed with CUDA_ERROR_OF"
    with pytest.raises(RuntimeError, match=expected):
        load(SOURCE, (), GPU)


def test_a_cpu_has_no_kernels() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu: move the tensors"):
        load(SOURCE, (), torch.device("cpu"))


def test_without_the_bindings_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    module._driver.cache_clear()
    with pytest.raises(RuntimeError, match=r"needs cuda-bindings.*pip install 'secateur\[cuda\]'"):
        module._driver()


# On a GPU.

SCALED_SUM = """
extern "C" __global__ void scaled_sum(const float* a, const float* b, float* out, int n, float s) {
  extern __shared__ float shared[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  shared[threadIdx.x] = i < n ? b[i] : 0;
  if (i < n) out[i] = a[i] + s * shared[threadIdx.x];
}
"""

NEXT = """
extern "C" __global__ void next(const int* in, int* out, int n) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = in[i] + 1;
}
"""

# Values that are all alive at the barrier, more than 1024 threads have registers for.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* p) {
  float v[128];
  #pragma unroll
  for (int i = 0; i < 128; i++) v[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 128; i++) p[i * 1024 + threadIdx.x] = v[i] + 1;
}
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Source]:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))

    def write(text: str, entry: str) -> Source:
        (tmp_path / f"{entry}.cu").write_text(text)
        return Source(str(tmp_path / f"{entry}.cu"), entry)

    return write


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def scaled(source: Callable[[str, str], Source], n: int, shared_bytes: int = 1024) -> Launch:
    loaded = load(source(SCALED_SUM, "scaled_sum"), (), GPU)
    return prepare(loaded, -(-n // 256), 1, 256, shared_bytes, False, "PPPif")


@gpu
@pytest.mark.parametrize("shared_bytes", [1024, 90_000])
def test_a_kernel_computes(source: Callable[[str, str], Source], shared_bytes: int) -> None:
    a, b = (torch.arange(1000.0, device=GPU) * factor for factor in (1, 3))
    out = torch.full((1001,), -1.0, device=GPU)
    launch = scaled(source, 1000, shared_bytes)
    launch(stream(), a.data_ptr(), b.data_ptr(), out.data_ptr(), 1000, 0.5)
    assert torch.equal(out[:1000], 2.5 * torch.arange(1000.0, device=GPU))
    assert out[1000] == -1


@gpu
def test_a_launch_can_be_captured_and_reused(source: Callable[[str, str], Source]) -> None:
    a, b = (torch.full((1000,), value, device=GPU) for value in (1.0, 2.0))
    out, other = torch.zeros(1000, device=GPU), torch.zeros(1000, device=GPU)
    launch = scaled(source, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(stream(), a.data_ptr(), b.data_ptr(), out.data_ptr(), 1000, 0.5)
    launch(stream(), a.data_ptr(), b.data_ptr(), other.data_ptr(), 1000, 4.0)
    assert (out == 0).all() and (other == 9).all()
    a.fill_(5)
    graph.replay()
    assert (out == 6).all() and (other == 9).all()  # the graph has arguments of its own


@gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("dependent", [False, True])
def test_a_chain_of_dependent_launches_keeps_its_order(
    source: Callable[[str, str], Source], dependent: bool, cluster: int, captured: bool
) -> None:
    if cluster > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    n, links = 2**16, 200
    steps = torch.full((links + 1, n), -1000, dtype=torch.int32, device=GPU)
    steps[0] = torch.arange(n, dtype=torch.int32, device=GPU)
    link = prepare(load(source(NEXT, "next"), (), GPU), n // 256, cluster, 256, 0, dependent, "PPi")

    def run() -> None:
        handle = stream()
        for step in range(links):
            link(handle, steps[step].data_ptr(), steps[step + 1].data_ptr(), n)

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
    else:
        run()
    torch.cuda.synchronize()
    expected = steps[0] + torch.arange(links + 1, dtype=torch.int32, device=GPU)[:, None]
    assert torch.equal(steps, expected)


@gpu
def test_a_capture_refuses_a_cold_kernel_and_takes_a_warm_one(
    source: Callable[[str, str], Source],
) -> None:
    a, b = (torch.full((1000,), value, device=GPU) for value in (1.0, 2.0))
    out = torch.zeros(1000, device=GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match=r"scaled_sum\.cu is not loaded yet.*warmup"):
            scaled(source, 1000)
        a.add_(1)
    graph.replay()  # the refusal has not spoilt the capture
    assert (a == 2).all()
    scaled(source, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch = scaled(source, 1000)
        launch(stream(), a.data_ptr(), b.data_ptr(), out.data_ptr(), 1000, 0.5)
    graph.replay()
    assert (out == 3).all()


@gpu
def test_a_new_thread_can_launch(source: Callable[[str, str], Source]) -> None:
    a, b = (torch.full((1000,), value, device=GPU) for value in (1.0, 2.0))
    out = torch.zeros(1000, device=GPU)
    launch, pointers = scaled(source, 1000), [t.data_ptr() for t in (a, b, out)]
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: launch(0, *pointers, 1000, 0.5))
    thread.start()
    thread.join()
    assert (out == 2).all()


@gpu
def test_figures_of_a_loaded_kernel_are_those_of_its_code(
    source: Callable[[str, str], Source], tmp_path: Path
) -> None:
    spilling = source(SPILLING, "spilling")
    loaded = load(spilling, (), GPU)
    found = info(cubin(spilling, (), arch_of(torch.cuda.get_device_capability())), tmp_path)
    assert loaded.registers == found.registers == 64
    assert found.stack_bytes > 0 and abs(loaded.local_bytes - found.stack_bytes) < 16  # rounding
    assert load(source(NEXT, "next"), (), GPU).local_bytes == 0


@gpu
def test_how_many_clusters_fit_on_the_device(source: Callable[[str, str], Source]) -> None:
    loaded = load(source(NEXT, "next"), (), GPU)
    device = torch.cuda.get_device_properties(GPU)
    on_each = device.max_threads_per_multi_processor // 1024
    assert loaded.most_clusters(1, 1024, 0) == on_each * device.multi_processor_count
    if device.major >= 9:
        pairs = loaded.most_clusters(2, 1024, 0)
        assert 0 < pairs <= on_each * device.multi_processor_count // 2
        # more than half of an SM's memory for each block leaves one block to an SM
        most = device.shared_memory_per_block_optin
        assert 0 < loaded.most_clusters(2, 256, most) <= device.multi_processor_count // 2


@gpu
def test_too_much_shared_memory_is_refused(source: Callable[[str, str], Source]) -> None:
    loaded = load(source(NEXT, "next"), (), GPU)
    with pytest.raises(RuntimeError, match="giving next 300000 bytes of shared memory failed with"):
        prepare(loaded, 1, 1, 32, 300_000, False, "PPi")


TOGETHER = """
import multiprocessing, sys
import torch
from secateur.formats.kernels.launch import load, prepare
from secateur.formats.kernels.nvrtc import Source

def one(start, results):
    start.wait()
    device = torch.device("cuda:0")
    values = torch.arange(1000, dtype=torch.int32, device=device)
    out = torch.zeros_like(values)
    link = prepare(load(Source(sys.argv[1], "next"), (), device), 4, 1, 256, 0, True, "PPi")
    link(torch.cuda.current_stream().cuda_stream, values.data_ptr(), out.data_ptr(), 1000)
    results.put(int(out.sum()))

fork = multiprocessing.get_context("fork")  # no process has touched the GPU yet
start, results = fork.Barrier(8), fork.Queue()
processes = [fork.Process(target=one, args=(start, results)) for _ in range(8)]
for process in processes:
    process.start()
print(*(results.get(timeout=240) for _ in processes))
for process in processes:
    process.join()
"""


@gpu
def test_processes_share_a_cold_cache(source: Callable[[str, str], Source], tmp_path: Path) -> None:
    path = source(NEXT, "next").file
    ran = subprocess.run(
        [sys.executable, "-c", TOGETHER, path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(sum(range(1, 1001)))] * 8
    (entry,) = (tmp_path / "cache" / "cubins").iterdir()
    stored = entry.read_bytes()
    assert hashlib.sha256(stored[:-32]).digest() == stored[-32:]
