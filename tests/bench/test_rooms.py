"""A bench is started, and imports what it shares; nothing imports a bench, and nothing a circle."""

import ast
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
MAY_IMPORT = {"run": {"lib"}, "lib": {"lib"}, "tables": {"lib", "tables"}}


def imported(path: Path) -> set[str]:
    """The modules of the bench that the file imports, as `lib.rows`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = (BENCH.parent / node.module.replace(".", "/")).is_dir()
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if package else {node.module}
    return {name.removeprefix("bench.") for name in found if name.startswith("bench.")}


def test_a_folder_imports_only_what_it_may() -> None:
    paths = [path for folder in MAY_IMPORT for path in (BENCH / folder).glob("*.py")]
    assert len(paths) > 30
    for path in paths:
        folders = {name.partition(".")[0] for name in imported(path)}
        assert folders <= MAY_IMPORT[path.parent.name], f"{path.name} imports from {folders}"


def test_no_import_is_a_circle() -> None:
    modules = {
        f"{path.parent.name}.{path.stem}": imported(path)
        for folder in MAY_IMPORT
        for path in (BENCH / folder).glob("*.py")
    }
    while ready := {name for name, needs in modules.items() if not needs & modules.keys()}:
        for name in ready:
            del modules[name]
    assert not modules, f"these import one another: {sorted(modules)}"
