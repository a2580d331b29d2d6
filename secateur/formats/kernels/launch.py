"""Compiled kernels on a device, and launches of them that cost Python as little as possible.

What a launch needs is laid out once by `prepare`: the driver's configuration with its attributes,
and one block of memory for the arguments. A launch then writes the arguments, and the stream if it
has changed, and calls the driver, which copies the arguments before it returns. The same launch can
be captured into a CUDA graph.
"""

import contextlib
import ctypes
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, final

import torch
from torch import Tensor

from secateur.formats.kernels.cubins import cubin
from secateur.formats.kernels.nvrtc import Source, arch_of, nvrtc_version

PORTABLE_CLUSTER = 8  # blocks; the most that every device with clusters promises
DEPENDENT_SINCE = (9, 0)  # the first capability with griddepcontrol
SLOT_BYTES = 8
WORD_BYTES = 8  # of a run of bytes, as the copy engine counts them
ALIGNMENT = 16  # bytes of a kernel's load, and what torch promises to cuSPARSELt
# Pointer, int32, float32, tensor map, each at the start of a slot.
SLOTS = {"P": "Q", "i": "i4x", "f": "f4x", "T": "128s"}


@final
@dataclass(frozen=True, slots=True, eq=False)  # one for each loaded function, so identity will do
class Kernel:
    """A loaded function: its registers and its spilled or local bytes, both for each thread."""

    entry: str
    capability: tuple[int, int]
    registers: int
    local_bytes: int
    multiprocessors: int
    function: Any = field(repr=False)
    context: Any = field(repr=False)

    def most_clusters(self, cluster: int, threads: int, shared_bytes: int) -> int:
        """The number of clusters of `cluster` blocks that an empty device holds at once.

        Raises:
            RuntimeError: the device knows no such cluster, or has no such shared memory.
        """
        driver, doing = _driver(), f"counting how often {self.entry} fits"
        _allow(self, cluster, shared_bytes)
        with _current(self.context):
            if cluster == 1:
                blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    self.function, threads, shared_bytes
                )
                return int(_checked(blocks, doing)) * self.multiprocessors
            config = _config(cluster, cluster, threads, shared_bytes, dependent=False)
            clusters = driver.cuOccupancyMaxActiveClusters(self.function, config)
            return int(_checked(clusters, doing))


@final
class Launch:
    """A prepared launch: `launch(stream, *values)`, the values in the order of its arguments.

    Threads may share it: one at a time has the block of arguments, under a lock.
    """

    __slots__ = (
        *("_config", "_function", "_kernel", "_launch", "_lock", "_pack"),
        *("_parameters", "_pointers", "_slots", "_stream"),
    )

    def __init__(self, kernel: Kernel, config: Any, arguments: str) -> None:
        sizes = [struct.calcsize("=" + SLOTS[letter]) for letter in arguments]
        starts = [sum(sizes[:slot]) for slot in range(len(sizes))]
        self._kernel = kernel
        self._function = kernel.function
        self._config = config
        self._stream = int(config.hStream)
        self._launch = _driver().cuLaunchKernelEx
        self._lock = threading.Lock()
        self._pack = struct.Struct("=" + "".join(SLOTS[letter] for letter in arguments)).pack_into
        self._slots = (ctypes.c_uint64 * max(1, sum(sizes) // SLOT_BYTES))()
        first = ctypes.addressof(self._slots)
        self._pointers = (ctypes.c_void_p * max(1, len(sizes)))(*(first + at for at in starts))
        self._parameters = ctypes.addressof(self._pointers)

    def __call__(self, stream: int, *values: int | float | bytes) -> None:
        """Launch on the stream with this handle, of the kernel's device.

        The device must be the current one where the handle is 0, as for any use of that stream.

        Raises:
            RuntimeError: the driver refuses; it reports here what an earlier kernel did wrong, too.
        """
        with self._lock:
            if stream != self._stream:
                self._config.hStream = stream
                self._stream = stream
            self._pack(self._slots, 0, *values)
            (error,) = self._launch(self._config, self._function, self._parameters, 0)
            if error:
                self._with_context(error)

    def _with_context(self, error: Any) -> None:
        """Launch once more if the thread is new and had no device yet; else raise the error."""
        driver, kernel = _driver(), self._kernel
        if error == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            _, context = driver.cuCtxGetCurrent()
            if not int(context):
                _checked(driver.cuCtxSetCurrent(kernel.context), "making the device current")
                (error,) = self._launch(self._config, self._function, self._parameters, 0)
        _checked((error,), f"the launch of {kernel.entry}")


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose numbers lie in order and can be read 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def address(tensor: Tensor | None) -> int:
    """The address of the tensor's numbers, or 0, which kernels read as none."""
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=1024)  # buffers come back at the same addresses
def tensor_map(pointer: int, rows: int, columns: int, box_rows: int, box_columns: int) -> bytes:
    """A matrix of bytes, row by row at this address, for copies of boxes of it by the copy engine.

    In shared memory a box's rows of 128 bytes follow each other, the 16-byte pieces of each
    permuted by the row: the swizzle that wgmma reads. What it has beyond the matrix is zeros.

    Raises:
        RuntimeError: the driver refuses: the address and `columns` are multiples of 16, a box has
            at most 256 rows and 128 columns.
    """
    driver = _driver()
    large, small = driver.cuuint64_t, driver.cuuint32_t
    answer = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        pointer,
        [large(columns), large(rows)],
        [large(columns)],
        [small(box_columns), small(box_rows)],
        [small(1), small(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    made = _checked(answer, f"describing {rows} x {columns} bytes to the copy engine")
    return ctypes.string_at(made.getPtr(), struct.calcsize(SLOTS["T"]))


@lru_cache(maxsize=1024)
def pieces_map(
    pointer: int, rows: int, pieces: int, piece_bytes: int, box_rows: int, box_pieces: int
) -> bytes:
    """Rows of `pieces` runs of bytes at this address, for copies of boxes by the copy engine.

    In shared memory the box's runs follow each other, row by row. What it has beyond the rows is
    zeros.

    Raises:
        RuntimeError: the driver refuses: the address and `piece_bytes` are multiples of 16, a run
            has at most 2048 bytes.
    """
    driver = _driver()
    large, small = driver.cuuint64_t, driver.cuuint32_t
    answer = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
        3,
        pointer,
        [large(piece_bytes // WORD_BYTES), large(pieces), large(rows)],
        [large(piece_bytes), large(pieces * piece_bytes)],
        [small(piece_bytes // WORD_BYTES), small(box_pieces), small(box_rows)],
        [small(1), small(1), small(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    made = _checked(answer, f"describing {rows} x {pieces} runs of bytes to the copy engine")
    return ctypes.string_at(made.getPtr(), struct.calcsize(SLOTS["T"]))


def load(source: Source, defines: tuple[tuple[str, int], ...], device: torch.device) -> Kernel:
    """The kernel, loaded on this CUDA device; once in a process for each source, macros and device.

    Cost: the first call reads or compiles the machine code; others look it up.
    Raises:
        RuntimeError: it is not loaded yet and the stream is being captured into a graph, it does
            not compile, or the driver cannot load it.
        ValueError: the device is not a CUDA GPU, or too old.
    """
    if device.type != "cuda":
        raise ValueError(f"load needs a CUDA device, got {device}: move the tensors to the GPU")
    index = torch.cuda.current_device() if device.index is None else device.index
    return _load(source, defines, index)


def prepare(
    kernel: Kernel,
    grid: int,
    cluster: int,
    threads: int,
    shared_bytes: int,
    dependent: bool,
    arguments: str,
) -> Launch:
    """A launch of `grid` blocks in clusters of `cluster`, each of `threads` with shared memory.

    A `dependent` launch may begin before the kernel ahead of it in the stream has ended, and waits
    for it at `griddepcontrol.wait`; on GPUs before 9.0, which lack both, it begins after that
    kernel's end. `arguments` has a letter for each: `P` a pointer, `i` an int32, `f` a
    float32.

    Raises:
        RuntimeError: the device has no such shared memory, or no such clusters.
        ValueError: the grid is no multiple of the cluster, or a letter is unknown.
    """
    if grid < 1 or cluster < 1 or grid % cluster:
        raise ValueError(
            f"prepare needs a grid of whole clusters, got {grid} blocks in clusters of {cluster}: "
            "round the grid up"
        )
    unknown = sorted(set(arguments) - set(SLOTS))
    if unknown:
        raise ValueError(
            f"prepare needs arguments of the letters {', '.join(SLOTS)}, got "
            f"{', '.join(unknown)} in {arguments!r}: pass pointers, int32, float32, tensor maps"
        )
    _allow(kernel, cluster, shared_bytes)
    dependent = dependent and kernel.capability >= DEPENDENT_SINCE
    return Launch(kernel, _config(grid, cluster, threads, shared_bytes, dependent), arguments)


@cache
def _load(source: Source, defines: tuple[tuple[str, int], ...], index: int) -> Kernel:
    torch.cuda.init()  # first, so that the device's context is torch's
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{source.name} is not loaded yet, and compiling inside a CUDA graph capture is not "
            "possible: call warmup(), or run the model once, before the capture"
        )
    capability = torch.cuda.get_device_capability(index)
    code = cubin(source, defines, arch_of(capability))
    driver, doing = _driver(), f"loading {source.name}"
    _checked(driver.cuInit(0), doing)
    device = _checked(driver.cuDeviceGet(index), doing)
    context = _checked(driver.cuDevicePrimaryCtxRetain(device), doing)
    names, counts = driver.CUfunction_attribute, driver.CUdevice_attribute
    with _current(context):
        module = _checked(driver.cuModuleLoadData(code), f"{doing} {_versions()}")
        function = _checked(driver.cuModuleGetFunction(module, source.entry.encode()), doing)
        # asking for attributes also loads the function now: its first launch may be captured
        registers, local_bytes = (
            int(_checked(driver.cuFuncGetAttribute(name, function), doing))
            for name in (
                names.CU_FUNC_ATTRIBUTE_NUM_REGS,
                names.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
            )
        )
    count = driver.cuDeviceGetAttribute(counts.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)
    return Kernel(
        entry=source.entry,
        capability=capability,
        registers=registers,
        local_bytes=local_bytes,
        multiprocessors=int(_checked(count, doing)),
        function=function,
        context=context,
    )


def _config(grid: int, cluster: int, threads: int, shared_bytes: int, dependent: bool) -> Any:
    """The driver's launch configuration, on stream 0."""
    driver = _driver()
    ids = driver.CUlaunchAttributeID
    attributes = []
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x = cluster
        attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
        attributes.append(attribute)
    if dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs = attributes  # copied, so it is set once and whole
    config.numAttrs = len(attributes)
    return config


def _allow(kernel: Kernel, cluster: int, shared_bytes: int) -> None:
    """Let the function have this much shared memory and this cluster; never less than before."""
    driver, function = _driver(), kernel.function
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    larger = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    with _current(kernel.context):
        doing = f"giving {kernel.entry} {shared_bytes} bytes of shared memory"
        # launches of the same function with more shared memory stay possible
        if shared_bytes > int(_checked(driver.cuFuncGetAttribute(most, function), doing)):
            _checked(driver.cuFuncSetAttribute(function, most, shared_bytes), doing)
        if cluster > PORTABLE_CLUSTER:
            doing = f"giving {kernel.entry} clusters of {cluster}"
            _checked(driver.cuFuncSetAttribute(function, larger, 1), doing)


@contextlib.contextmanager
def _current(context: Any) -> Iterator[None]:
    """Make the device's context the thread's; afterwards the one before is back."""
    driver = _driver()
    _checked(driver.cuCtxPushCurrent(context), "making the device current")
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()


@lru_cache(maxsize=1)
def _driver() -> Any:
    """The driver's bindings. A failure is not remembered."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RuntimeError(
            f"launching CUDA kernels needs cuda-bindings, got: {error}: "
            "pip install 'secateur[cuda]'"
        ) from error
    return driver


def _checked(answer: tuple[Any, ...], doing: str) -> Any:
    """The value that the driver answered beside its code, or None.

    Raises:
        RuntimeError: the code is an error.
    """
    error, *values = answer
    if error:
        driver = _driver()
        (_, name), (_, text) = driver.cuGetErrorName(error), driver.cuGetErrorString(error)
        raise RuntimeError(f"{doing} failed with {name.decode()}: {text.decode()}")
    return values[0] if values else None


def _versions() -> str:
    """Driver and compiler: code of a newer major version than the driver's cannot be loaded."""
    _, version = _driver().cuDriverGetVersion()
    major, minor = nvrtc_version()
    return f"(NVRTC {major}.{minor}, driver for CUDA {version // 1000}.{version % 1000 // 10})"
