"""The cache of compiled kernels: found again, never trusted blindly, never in the way."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.formats.kernels import cubins
from secateur.formats.kernels.cubins import cubin, folder, is_kept, key
from secateur.formats.kernels.nvrtc import Source
from tests.formats.kernels.cubin_info import NEEDS_NVRTC

DEFINES = (("ROWS", 64),)


class Compiler:
    """Stands in for NVRTC: code that names what was asked for, and a count."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: Source, defines: tuple[tuple[str, int], ...], arch: str) -> bytes:
        self.calls += 1
        return f"{source.text()} {defines} {arch} ".encode() * 50


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    compiler = Compiler()
    monkeypatch.setattr(cubins, "compile_cubin", compiler)
    monkeypatch.setattr(cubins, "nvrtc_version", lambda: (13, 0))
    cubins.warn_unkept.cache_clear()
    yield compiler
    cubins.warn_unkept.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "k.cu").write_text("kernel")
    (tmp_path / "h.cuh").write_text("header")
    return Source(str(tmp_path / "k.cu"), "k", (str(tmp_path / "h.cuh"),))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubins"


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_what_is_kept_is_known_and_a_damaged_entry_is_not(
    compiler: Compiler, source: Source, cache: Path
) -> None:
    assert not is_kept(source, DEFINES, "sm_90a")
    cubin(source, DEFINES, "sm_90a")
    assert is_kept(source, DEFINES, "sm_90a") and not is_kept(source, DEFINES, "sm_80")
    (cache / names(cache)[0]).write_bytes(b"half of it")
    assert not is_kept(source, DEFINES, "sm_90a")
    assert compiler.calls == 1


def test_the_second_call_does_not_compile(compiler: Compiler, source: Source, cache: Path) -> None:
    expected = b"kernel (('ROWS', 64),) sm_90a " * 50
    assert cubin(source, DEFINES, "sm_90a") == expected
    assert cubin(source, DEFINES, "sm_90a") == expected
    assert compiler.calls == 1
    assert names(cache) == [f"{key(source, DEFINES, 'sm_90a')}.cubin"]
    # the code is at the start of the file, as tools expect it
    assert (cache / names(cache)[0]).read_bytes().startswith(expected)


def test_each_of_the_inputs_has_an_entry_of_its_own(
    compiler: Compiler, source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubin(source, DEFINES, "sm_90a")
    cubin(source, DEFINES, "sm_80")
    cubin(source, (("ROWS", 32),), "sm_90a")
    cubin(source, (("ROW", 64),), "sm_90a")
    cubin(source, (*DEFINES, ("BIAS", 1)), "sm_90a")
    cubin(Source(source.file, "k"), DEFINES, "sm_90a")
    Path(source.headers[0]).write_text("another header")
    cubin(source, DEFINES, "sm_90a")
    Path(source.file).write_text("another kernel")
    cubin(source, DEFINES, "sm_90a")
    monkeypatch.setattr(cubins, "nvrtc_version", lambda: (13, 1))
    cubin(source, DEFINES, "sm_90a")
    assert compiler.calls == len(names(cache)) == 9


def test_texts_do_not_run_together(compiler: Compiler, tmp_path: Path) -> None:
    """One file that ends where another begins is not the same as the border moved."""
    for name, text in {"a": "12", "b": "3", "c": "1", "d": "23"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.cuh").write_text(text)
    (tmp_path / "k.cu").write_text("kernel")
    first, second = (
        Source(str(tmp_path / "k.cu"), "k", tuple(str(tmp_path / n / "same.cuh") for n in pair))
        for pair in ("ab", "cd")
    )
    assert key(first, (), "sm_90a") != key(second, (), "sm_90a")


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "only a digest", "another's"])
def test_a_damaged_entry_is_compiled_anew(
    damage: str, compiler: Compiler, source: Source, cache: Path
) -> None:
    expected = cubin(source, DEFINES, "sm_90a")
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-100],
            "changed": whole[:10] + bytes([whole[10] ^ 1]) + whole[11:],
            "empty": b"",
            "only a digest": hashlib.sha256(b"").digest(),
            "another's": whole[32:],
        }[damage]
    )
    assert cubin(source, DEFINES, "sm_90a") == expected
    assert compiler.calls == 2
    assert path.read_bytes() == whole
    assert cubin(source, DEFINES, "sm_90a") == expected
    assert compiler.calls == 2


def test_a_folder_that_cannot_be_written_warns_once_and_works(
    compiler: Compiler, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    with pytest.warns(
        RuntimeWarning, match="kernels cannot be kept .*set SECATEUR_CACHE"
    ) as warned:
        found = [cubin(source, DEFINES, arch) for arch in ("sm_80", "sm_90a")]
    assert len(warned) == 1
    assert found == [compiler(source, DEFINES, arch) for arch in ("sm_80", "sm_90a")]


def test_a_read_only_folder_warns_and_leaves_nothing_behind(
    compiler: Compiler, source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superuser may write anywhere, so the refusal is made."""

    def refused(path: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        with pytest.warns(
            RuntimeWarning, match=r"kernels cannot be kept \(.*cubins: Read-only file system\)"
        ):
            assert cubin(source, DEFINES, "sm_90a") == compiler(source, DEFINES, "sm_90a")
    assert names(cache) == []
    assert cubin(source, DEFINES, "sm_90a")
    assert len(names(cache)) == 1


def test_a_user_without_a_home_is_no_failure(
    compiler: Compiler, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SECATEUR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(
        RuntimeWarning, match=r"kernels cannot be kept \(the home folder: Could not determine"
    ):
        assert cubin(source, DEFINES, "sm_90a") == compiler(source, DEFINES, "sm_90a")


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECATEUR_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "own" / "cubins"
    monkeypatch.setenv("SECATEUR_CACHE", "")
    assert folder() == tmp_path / "xdg" / "secateur" / "cubins"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder() == tmp_path / ".cache" / "secateur" / "cubins"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == tmp_path / ".cache" / "secateur" / "cubins"


# The processes are forked after the imports, which are most of the time, and start together.
TOGETHER = """
import hashlib, multiprocessing, sys
from secateur.formats.kernels.cubins import cubin
from secateur.formats.kernels.nvrtc import Source

def one(start, results):
    start.wait()
    code = cubin(Source(sys.argv[1], "k"), (("COUNT", 4),), "sm_90a")
    results.put(hashlib.sha256(code).hexdigest())

fork = multiprocessing.get_context("fork")
start, results = fork.Barrier(8), fork.Queue()
processes = [fork.Process(target=one, args=(start, results)) for _ in range(8)]
for process in processes:
    process.start()
print(*(results.get(timeout=120) for _ in processes))
for process in processes:
    process.join()
"""


@NEEDS_NVRTC
def test_processes_on_one_cold_folder_get_the_same(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "k.cu").write_text(
        'extern "C" __global__ void k(float* p) { for (int i = 0; i < COUNT; i++) p[i] *= 2; }'
    )
    ran = subprocess.run(
        [sys.executable, "-c", TOGETHER, str(tmp_path / "k.cu")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    digests = ran.stdout.split()
    assert len(digests) == 8 and len(set(digests)) == 1
    (entry,) = cache.iterdir()
    assert (
        entry.name == f"{key(Source(str(tmp_path / 'k.cu'), 'k'), (('COUNT', 4),), 'sm_90a')}.cubin"
    )
    code = cubin(Source(str(tmp_path / "k.cu"), "k"), (("COUNT", 4),), "sm_90a")
    assert hashlib.sha256(code).hexdigest() == digests[0]
    assert code[:4] == b"\x7fELF"
