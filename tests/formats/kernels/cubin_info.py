"""What a compiled kernel needs and which instructions it has, read without a GPU.

The tools are NVIDIA's own, from their packages: cuobjdump for the figures, nvdisasm for the code.
"""

import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from secateur.formats.kernels.nvrtc import nvrtc_version


@dataclass(frozen=True)
class CubinInfo:
    """Figures of the one function in a cubin, for each thread, and its opcodes in order."""

    registers: int
    stack_bytes: int  # spills and arrays that no register can hold: the driver's LOCAL_SIZE_BYTES
    shared_bytes: int  # for each block, without what is asked for at launch
    opcodes: tuple[str, ...]

    @property
    def sparse_mma(self) -> bool:
        """Whether a sparse tensor core instruction is among them.

        HMMA.SP, IMMA.SP, QMMA.SP of `mma.sp`; HGMMA.SP, IGMMA.SP, QGMMA.SP of `wgmma.mma_async.sp`.
        """
        return any(re.match(r"[A-Z]+MMA\..*\bSP\b", opcode) for opcode in self.opcodes)


def info(cubin: bytes, folder: Path) -> CubinInfo:
    """The figures and opcodes of a cubin with one function; `folder` is for a file of it."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = _output("cuobjdump", "-res-usage", str(path))
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    registers, stack, shared, local = map(int, found)
    # /*0070*/  @P0 HMMA.SP.16832.F32.BF16 R4, R4, R8, RZ, R0, 0x0 ;
    code = re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)",
        _output("nvdisasm", "-c", str(path)),
        re.MULTILINE,
    )
    return CubinInfo(registers, max(stack, local), shared, tuple(code))


def _output(tool: str, *arguments: str) -> str:
    command = [str(_path_of(tool)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _path_of(tool: str) -> Path:
    """The program in its package; the test is skipped without it."""
    package = f"nvidia-cuda-{tool}"
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        pytest.skip(f"needs {package}, of the extra `dev`")
    return next(Path(str(file.locate())) for file in listed if file.stem == tool)


def _has_nvrtc() -> bool:
    try:
        nvrtc_version()
    except RuntimeError:
        return False
    return True


NEEDS_NVRTC = pytest.mark.skipif(
    not _has_nvrtc(), reason="needs NVRTC: pip install 'secateur[cuda]'"
)
