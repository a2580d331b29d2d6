"""Compiles the kernels for a CPU into the wheel; where nothing compiles, the wheel is pure Python.

`SECATEUR_COMPILER` names the compiler: a command, `zig` (which is then fetched from the package
registry), or `none`. Without it `$CXX`, `c++`, `g++` or `clang++` is taken, the first that is here.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("secateur/formats/kernels/simd")
LIBRARY = "kernels.so"
ZIG = "ziglang==0.17.1"
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -ffp-contract=fast"
# Which instructions the functions of a body may use; the machine is asked before one is called.
X86_BODIES = {
    "avx512_vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni "
    "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
    "scalar": "",
}
OTHER_BODIES = {"scalar": ""}
# Its only undefined symbols are memcpy and memset, so that it runs where the tag says, and before.
TAGS = {
    ("Linux", "x86_64"): "py3-none-manylinux_2_28_x86_64",
    ("Linux", "aarch64"): "py3-none-manylinux_2_28_aarch64",
}


class Kernels(BuildHookInterface[Any]):
    """Puts the library into the wheel, or into the package folder where that is installed."""

    work: str | None = None

    def dependencies(self) -> list[str]:
        """zig, if it is asked for."""
        return [ZIG] if os.environ.get("SECATEUR_COMPILER") == "zig" else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library and say so, or say why there is none."""
        folder = Path(self.root) / FOLDER
        if version != "editable":  # what a wheel takes along does not lie in the checkout
            self.work = tempfile.mkdtemp()
        built = (folder if self.work is None else Path(self.work)) / LIBRARY
        tag = TAGS.get((platform.system(), platform.machine()))
        compiler, why = _compiler()
        if tag is None:
            why = f"there are none for {platform.system()} on {platform.machine()}"
        elif compiler is not None:
            why = _compile(compiler, folder, built)
        if why:
            built.unlink(missing_ok=True)
            self.app.display_warning(f"secateur is built without its kernels for a CPU: {why}")
            return
        build_data["tag"] = tag
        build_data["pure_python"] = False
        build_data["force_include"][str(built)] = (FOLDER / LIBRARY).as_posix()

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel has taken along."""
        if self.work is not None:
            shutil.rmtree(self.work)


def _compiler() -> tuple[list[str] | None, str]:
    """The command that compiles C++, or None and why there is none."""
    named = os.environ.get("SECATEUR_COMPILER") or os.environ.get("CXX")
    if named == "none":
        return None, "SECATEUR_COMPILER is none"
    if named == "zig":  # for the oldest processor and library that the wheel promises
        target = f"{platform.machine()}-linux-gnu.2.28"
        return [sys.executable, "-m", "ziglang", "c++", "-target", target, "-mcpu=baseline"], ""
    for command in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command), ""
    missing = named or "C++ compiler"
    return None, f"no {missing} is here: install one, or set SECATEUR_COMPILER=zig"


def _compile(compiler: list[str], folder: Path, built: Path) -> str:
    """Compile all bodies into one library; what the compiler said if it failed."""
    bodies = X86_BODIES if platform.machine() == "x86_64" else OTHER_BODIES
    with tempfile.TemporaryDirectory() as work:
        objects = []
        for body, instructions in bodies.items():
            made = str(Path(work) / f"{body}.o")
            names = [f"-DBODY={body}", f"-DBODY_{body.upper()}", f'-DSOURCES="{hash_of(folder)}"']
            what = ["-c", str(folder / "kernels.cpp"), "-o", made]
            objects.append(made)
            if why := _run([*compiler, *FLAGS.split(), *instructions.split(), *names, *what]):
                return why
        fresh = Path(work) / LIBRARY
        link = ["-shared", "-s", "-Wl,--as-needed", "-o", str(fresh), *objects]
        # nothing of a C++ library is used, and zig would compile its own first
        linker = ["cc" if word == "c++" and "ziglang" in compiler else word for word in compiler]
        if why := _run([*linker, *link]):
            return why
        # under a new name, then renamed: a process may have the old one in its memory
        beside = built.with_suffix(f".{os.getpid()}")
        shutil.copyfile(fresh, beside)
        beside.replace(built)
    return ""


def hash_of(folder: Path) -> str:
    """A hash of what the library is compiled from, which its loader compares."""
    texts = (folder / name for name in ("kernels.cpp", "vectors.h"))
    return hashlib.sha256(b"".join(text.read_bytes() for text in texts)).hexdigest()[:16]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
    return f"{command[0]} failed: {lines[0].strip()}"
