"""Compiled kernels, kept on disk so that a machine compiles each of them once.

Many processes may meet on one cold folder (the ranks of a job): each compiles, writes a file of its
own and renames it, so a reader sees a whole entry or none, and the last of several stays.
"""

import hashlib
import os
import warnings
from functools import cache
from pathlib import Path

from secateur.core.disk.atomic import write_whole
from secateur.formats.kernels.nvrtc import Source, compile_cubin, nvrtc_version, options

FOLDER_VARIABLE = "SECATEUR_CACHE"
DIGEST_BYTES = 32  # SHA-256, behind the machine code: tools that read the code pass over it


def cubin(source: Source, defines: tuple[tuple[str, int], ...], arch: str) -> bytes:
    """The machine code of the source with these macros, compiled unless an entry has it.

    A damaged entry is compiled anew. Where nothing can be written the code is compiled in memory
    and a warning says so once.

    Cost: under a millisecond where there is an entry.
    Raises:
        RuntimeError: the kernel does not compile, or NVRTC is not installed.
    """
    name = f"{key(source, defines, arch)}.cubin"
    try:
        path = folder() / name
    except RuntimeError as error:  # a user without a home
        warn_unkept("compiled kernels", f"the home folder: {error}", "compiles them")
        return compile_cubin(source, defines, arch)
    stored = _read(path)
    if stored is not None:
        return stored
    code = compile_cubin(source, defines, arch)
    try:
        _write(path, code)
    except OSError as error:
        warn_unkept(
            "compiled kernels", f"{path.parent}: {error.strerror or error}", "compiles them"
        )
    return code


def is_kept(source: Source, defines: tuple[tuple[str, int], ...], arch: str) -> bool:
    """Whether the machine code of the source with these macros need not be compiled."""
    try:
        return _read(folder() / f"{key(source, defines, arch)}.cubin") is not None
    except RuntimeError:  # a user without a home
        return False


def folder() -> Path:
    """Where the entries are: `$SECATEUR_CACHE`, else the user's cache folder.

    Raises:
        RuntimeError: neither a variable nor the user's record says where that is.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser() / "cubins"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the standard says to pass over a relative path
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return home / "secateur" / "cubins"


def key(source: Source, defines: tuple[tuple[str, int], ...], arch: str) -> str:
    """A name for all that decides the machine code: texts, options (with the arch), compiler."""
    major, minor = nvrtc_version()
    parts = [f"NVRTC {major}.{minor}", *options(defines, arch), "", source.name, source.text()]
    for header in source.included():
        parts += header
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))  # so that no two lists run together alike
        digest.update(data)
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    """The code of a whole entry; None where there is none, or a damaged one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, code + hashlib.sha256(code).digest())


@cache
def warn_unkept(what: str, reason: str, again: str) -> None:
    """Warn once in a process for each of these that `what` is not kept, and what is done again."""
    warnings.warn(
        f"{what} cannot be kept ({reason}), so every process {again} again: "
        f"set {FOLDER_VARIABLE} to a folder that can be written",
        RuntimeWarning,
        stacklevel=3,
    )
