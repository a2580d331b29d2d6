"""Kernels compile for every architecture on a machine without a GPU, and become what was meant."""

import sys
from pathlib import Path

import pytest

from secateur.formats.kernels import nvrtc
from secateur.formats.kernels.nvrtc import (
    ARCHS,
    Source,
    arch_of,
    compile_cubin,
    nvrtc_version,
    options,
)
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, info

# One warp's product, of a 2:4 or a dense A; `operand` has no `__device__` on purpose.
MMA = """
#include "operand.cuh"
extern "C" __global__ void product(const unsigned* in, float* out) {
  unsigned a0 = operand(in, 0), a1 = operand(in, 1), a2 = operand(in, 2), a3 = operand(in, 3);
  unsigned b0 = operand(in, 4), b1 = operand(in, 5), b2 = operand(in, 6), b3 = operand(in, 7);
  unsigned metadata = operand(in, 8);
  float c0 = 0, c1 = 0, c2 = 0, c3 = 0;
  if (SPARSE)
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(b2), "r"(b3), "r"(metadata));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  out[threadIdx.x] = c0 + c1 + c2 + c3;
}
"""
OPERAND = "inline unsigned operand(const unsigned* in, int i) { return in[32 * i + threadIdx.x]; }"

# A warpgroup's product of a 2:4 A in shared memory, of Hopper alone.
WGMMA = """
extern "C" __global__ void product(unsigned long long a, unsigned long long b, unsigned metadata,
                                   float* out) {
  float c0 = 0, c1 = 0, c2 = 0, c3 = 0;
  asm volatile("wgmma.fence.sync.aligned;");
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 "
      "{%0,%1,%2,%3}, %4, %5, %6, 0, 1, 1, 1, 0, 0;"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "l"(a), "l"(b), "r"(metadata));
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  out[threadIdx.x] = c0 + c1 + c2 + c3;
}
"""

# COUNT values that are all alive at the barrier, in 1024 threads that have 64 registers each.
ALIVE = """
extern "C" __global__ void __launch_bounds__(1024) alive(float* p) {
  __shared__ float kept[COUNT];
  float v[COUNT];
  #pragma unroll
  for (int i = 0; i < COUNT; i++) v[i] = p[i * 1024 + threadIdx.x];
  kept[threadIdx.x % COUNT] = v[0];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < COUNT; i++) p[i * 1024 + threadIdx.x] = v[i] * kept[i];
}
"""


def written(folder: Path, text: str, entry: str, **headers: str) -> Source:
    """A source outside the package: a path from the root stays what it is."""
    (folder / f"{entry}.cu").write_text(text)
    for name, header in headers.items():
        (folder / f"{name}.cuh").write_text(header)
    paths = tuple(str(folder / f"{name}.cuh") for name in headers)
    return Source(str(folder / f"{entry}.cu"), entry, paths)


@NEEDS_NVRTC
@pytest.mark.parametrize("arch", ARCHS)
def test_sparse_and_dense_products_are_told_apart(arch: str, tmp_path: Path) -> None:
    source = written(tmp_path, MMA, "product", operand=OPERAND)
    sparse = info(compile_cubin(source, (("SPARSE", 1),), arch), tmp_path)
    dense = info(compile_cubin(source, (("SPARSE", 0),), arch), tmp_path)
    assert [o for o in sparse.opcodes if "MMA" in o] == ["HMMA.SP.16832.F32.BF16"]
    assert [o for o in dense.opcodes if "MMA" in o] == ["HMMA.16816.F32.BF16"]
    assert (sparse.sparse_mma, dense.sparse_mma) == (True, False)


@NEEDS_NVRTC
def test_the_letter_of_the_architecture_gives_its_own_instructions(tmp_path: Path) -> None:
    source = written(tmp_path, WGMMA, "product")
    found = info(compile_cubin(source, (), arch_of((9, 0))), tmp_path)
    assert found.sparse_mma
    assert any(opcode.startswith("HGMMA") for opcode in found.opcodes)
    with pytest.raises(RuntimeError, match=r"product\.cu did not compile for sm_90 with no macros"):
        compile_cubin(source, (), "sm_90")


@NEEDS_NVRTC
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_registers_spills_and_shared_memory_are_read(arch: str, tmp_path: Path) -> None:
    source = written(tmp_path, ALIVE, "alive")
    few = info(compile_cubin(source, (("COUNT", 8),), arch), tmp_path)
    many = info(compile_cubin(source, (("COUNT", 128),), arch), tmp_path)
    assert few.stack_bytes == 0 and 8 < few.registers < 64
    # 128 floats alive in 64 registers: at least the other half is in memory, and hardly all
    assert many.registers == 64 and 4 * 64 <= many.stack_bytes < 2 * 4 * 128
    assert many.shared_bytes - few.shared_bytes == 4 * (128 - 8)  # the macro arrived


@NEEDS_NVRTC
def test_headers_come_from_the_source_and_never_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '#include "size.cuh"\nextern "C" __global__ void k() { static_assert(SIZE == 3, ""); }'
    listed = tmp_path / "listed"
    listed.mkdir()
    source = written(listed, text, "k", size="#define SIZE 3")
    (tmp_path / "size.cuh").write_text("#define SIZE 4")
    monkeypatch.chdir(tmp_path)
    assert compile_cubin(source, (), "sm_90a")[:4] == b"\x7fELF"
    with pytest.raises(RuntimeError, match=r"could not open source file \"size\.cuh\""):
        compile_cubin(Source(source.file, "k"), (), "sm_90a")


@NEEDS_NVRTC
def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = written(tmp_path, MMA, "product", operand=OPERAND)
    one, other = (compile_cubin(source, (("SPARSE", 1),), "sm_90a") for _ in range(2))
    assert one == other


@NEEDS_NVRTC
def test_an_error_has_the_compilers_words_the_macros_and_the_architecture(tmp_path: Path) -> None:
    source = written(tmp_path, 'extern "C" __global__ void k() {\n  nothing();\n}', "k")
    with pytest.raises(RuntimeError) as raised:
        compile_cubin(source, (("ROWS", 64), ("BIAS", 0)), "sm_100a")
    message = str(raised.value)
    assert message.startswith("k.cu did not compile for sm_100a with ROWS=64, BIAS=0 (NVRTC_ERROR")
    assert 'k.cu(2): error: identifier "nothing" is undefined' in message
    assert not message.endswith(("\0", "\n"))


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        *(((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_87"), ((8, 9), "sm_89")),
        *(((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "sm_120a")),
        *(((10, 3), "sm_103"), ((11, 0), "sm_110"), ((12, 1), "sm_121")),
    ],
)
def test_architectures(capability: tuple[int, int], arch: str) -> None:
    assert arch_of(capability) == arch


def test_an_old_gpu_is_told_what_still_works() -> None:
    expected = (
        r"need compute capability 8\.0 or newer, got 7\.5: "
        "dense layers and the reference implementations"
    )
    with pytest.raises(ValueError, match=expected):
        arch_of((7, 5))


def test_options_are_in_order() -> None:
    found = options((("ROWS", 64), ("SHIFT", -1)), "sm_90a")
    assert found[0] == "--gpu-architecture=sm_90a"
    assert "--std=c++17" in found and "-default-device" in found
    assert found[-2:] == ("-DROWS=64", "-DSHIFT=-1")


def test_files_of_the_package_are_read_when_asked_for(tmp_path: Path) -> None:
    source = Source("timing.py", "none", ("__init__.py",))
    assert source.name == "timing.py"
    assert "def compare(" in source.text()
    ((name, text),) = source.included()
    assert name == "__init__.py" and text.startswith('"""Plumbing')
    late = Source(str(tmp_path / "late.cu"), "k")
    with pytest.raises(FileNotFoundError):
        late.text()
    (tmp_path / "late.cu").write_text("text")
    assert late.text() == "text"


def test_without_the_bindings_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    nvrtc._nvrtc.cache_clear()
    with pytest.raises(RuntimeError, match=r"needs cuda-bindings and NVRTC.*secateur\[cuda\]"):
        nvrtc_version()


@NEEDS_NVRTC
def test_without_the_library_too_and_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc as bindings

    def missing() -> None:
        raise RuntimeError("no libnvrtc.so")

    nvrtc._nvrtc.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(bindings, "nvrtcVersion", missing)
        with pytest.raises(RuntimeError, match=r"got: no libnvrtc\.so: pip install 'secateur\[cu"):
            nvrtc_version()
    assert nvrtc_version() >= (12, 9)
