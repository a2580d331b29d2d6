"""Kernel sources, compiled in memory by NVRTC to the machine code of one architecture.

A kernel is a `.cu` file of the package with the `.cuh` files that it includes. Nothing but NVRTC is
needed to compile it: no toolkit, no host compiler, no include path, no GPU.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

# What the kernels are compiled for in the tests. The letter `a` gives the instructions that one
# generation alone has (wgmma, tcgen05); without it the assembler refuses them.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
OLDEST = (8, 0)  # the first with a sparse tensor core and with cp.async
OWN_ARCHS = {(9, 0): "sm_90a", (10, 0): "sm_100a", (12, 0): "sm_120a"}

OPTIONS = (
    "--std=c++17",
    "-default-device",  # a function without `__device__` is one all the same
    "-no-source-include",  # else a header of that name in the working directory could be taken
)

KERNELS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Source:
    """A kernel's source: its file, its `extern "C"` function, and the headers that it includes.

    Files are named from the package's folder (`kernels/ptx.cuh`) and included by their last part:
    `#include "ptx.cuh"`. They are read when asked for.
    """

    file: str
    entry: str
    headers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's last part: what messages of the compiler call it."""
        return Path(self.file).name

    def text(self) -> str:
        """The file's text."""
        return (KERNELS / self.file).read_text(encoding="utf-8")

    def included(self) -> tuple[tuple[str, str], ...]:
        """The name and the text of each header."""
        paths = [KERNELS / header for header in self.headers]
        return tuple((path.name, path.read_text(encoding="utf-8")) for path in paths)


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture to compile for, as NVRTC calls it.

    Raises:
        ValueError: the GPU is older than the kernels' instructions.
    """
    major, minor = capability
    if capability < OLDEST:
        raise ValueError(
            f"CUDA kernels need compute capability {OLDEST[0]}.{OLDEST[1]} or newer, got "
            f"{major}.{minor}: dense layers and the reference implementations still work there"
        )
    return OWN_ARCHS.get(capability, f"sm_{major}{minor}")


def options(defines: tuple[tuple[str, int], ...], arch: str) -> tuple[str, ...]:
    """The compiler's options; with the source and the compiler's version they decide the result."""
    return (
        f"--gpu-architecture={arch}",
        *OPTIONS,
        *(f"-D{name}={value}" for name, value in defines),
    )


def nvrtc_version() -> tuple[int, int]:
    """The version of the NVRTC that would compile.

    Raises:
        RuntimeError: it is not installed.
    """
    _, major, minor = _nvrtc().nvrtcVersion()
    return major, minor


def compile_cubin(source: Source, defines: tuple[tuple[str, int], ...], arch: str) -> bytes:
    """The machine code of the source with these macros, for this architecture alone.

    Cost: 0.05 to 1.5 seconds, by the length of the kernel.
    Raises:
        RuntimeError: it does not compile, with the compiler's words, or NVRTC is not installed.
    """
    nvrtc = _nvrtc()
    included = source.included()
    _, program = nvrtc.nvrtcCreateProgram(
        source.text().encode(),
        source.name.encode(),
        len(included),
        [text.encode() for _, text in included],
        [name.encode() for name, _ in included],
    )
    chosen = [option.encode() for option in options(defines, arch)]
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(chosen), chosen)
        if error:
            raise RuntimeError(
                f"{source.name} did not compile for {arch} with {_written(defines)} "
                f"({error.name}):\n{_log(nvrtc, program)}"
            )
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    """The bindings, once they have found their library. A failure is not remembered."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"compiling CUDA kernels needs cuda-bindings and NVRTC, got: {error}: "
            "pip install 'secateur[cuda]'"
        ) from error
    return nvrtc


def _written(defines: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{name}={value}" for name, value in defines) or "no macros"


def _log(nvrtc: Any, program: Any) -> str:
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.rstrip(b"\0").decode(errors="replace").strip()
