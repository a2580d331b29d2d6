"""What happens once a module has been imported, and that nothing of it stays."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from secateur.integrations.when_imported import when_imported


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in a package that can be imported."""
    folder = tmp_path / "some_library"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "registry.py").write_text("entries = ['own']\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield "some_library.registry"
    assert sys.meta_path == before
    for name in [name for name in sys.modules if name.startswith("some_library")]:
        del sys.modules[name]


def test_it_is_called_once_after_the_module_has_been_executed(package: str) -> None:
    seen = list[list[str]]()
    when_imported(package, lambda: seen.append(list(sys.modules[package].entries)))
    assert package not in sys.modules and not seen
    module = importlib.import_module(package)
    importlib.import_module(package)
    assert seen == [["own"]]
    assert module.__loader__ is module.__spec__.loader
    assert isinstance(module.__loader__, SourceFileLoader)
    assert inspect.getsource(module) == "entries = ['own']\n"
    when_imported(package, lambda: seen.append(["now"]))
    assert seen == [["own"], ["now"]]


def test_two_that_wait_are_both_called(package: str) -> None:
    seen = list[int]()
    when_imported(package, lambda: seen.append(1))
    when_imported(package, lambda: seen.append(2))
    importlib.import_module(package)
    assert sorted(seen) == [1, 2]


def test_a_module_that_fails_is_waited_for_again(package: str, tmp_path: Path) -> None:
    path = tmp_path / "some_library" / "registry.py"
    path.write_text("1 / 0\n")
    seen = list[int]()
    when_imported(package, lambda: seen.append(1))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(package)
    assert not seen and package not in sys.modules
    path.write_text("entries = []  # repaired\n")
    importlib.invalidate_caches()
    importlib.import_module(package)
    assert seen == [1]


def test_a_module_that_does_not_exist_is_as_missing_as_ever(package: str) -> None:
    before = list(sys.meta_path)
    when_imported("some_library.nothing", lambda: pytest.fail("there is nothing"))
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'some_library\.nothing'"):
        importlib.import_module("some_library.nothing")
    assert importlib.util.find_spec("some_library.registry") is not None
    sys.meta_path[:] = before
