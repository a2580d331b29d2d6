"""`secateur migrate`: the imports of torchao's and torch's pruning in source files, rewritten."""

import difflib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say, table
from secateur.core.disk.atomic import file_appearing_whole
from secateur.report.rows import Row

if TYPE_CHECKING:
    from secateur.compat.torchao.codemod import Migration

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the changes as a diff, and write no file.")
]
Sources = Annotated[
    Path,
    typer.Argument(metavar="PATH", help="A Python file, or a folder of them.", show_default=False),
]
MOVED = ("place", "old", "new", "names")
LEFT = ("place", "left alone", "why")
DIFFERENT = ("name", "what is different")


@command()
def migrate(*, path: Sources, dry_run: DryRun = False, json: o.Json = False) -> None:
    """Move imports of torchao.sparsity and torch.ao.pruning to secateur; say what is different.

    Files are changed in place, import statements alone. A name that is not here stays where it was,
    and is listed; so is a file that cannot be parsed.
    """
    before = {file: file.read_bytes() for file in _python_files(path)}
    found, broken = _migrated(before)
    changed = {f: m.source for f, m in found.items() if m.source != before[f]}
    if not dry_run:
        for file, source in changed.items():
            _write(file, source)
    tables = {
        MOVED: _moved(found),
        DIFFERENT: _different(found),
        LEFT: [*_left(found), *broken],
    }
    if json:
        emit({"files": list(changed), "written": not dry_run, **_as_data(tables)})
        return
    if dry_run:
        for file, source in changed.items():
            say(*_diff(file, before[file], source))
    for columns, rows in tables.items():
        if rows:
            table(columns, rows)
    done = "would be changed" if dry_run else "changed"
    say(f"{len(changed)} file{'s' * (len(changed) != 1)} {done}")


def _migrated(before: Mapping[Path, bytes]) -> tuple[dict[Path, "Migration"], list[Row]]:
    """Each file that can be parsed, and a row for each that cannot."""
    from secateur.compat.torchao.codemod import migrate_source

    found, broken = dict[Path, "Migration"](), list[Row]()
    for file, source in before.items():
        try:
            found[file] = migrate_source(source)
        except ValueError as error:
            broken.append((str(file), "the file", str(error)))
    return found, broken


def _moved(found: Mapping[Path, "Migration"]) -> list[Row]:
    return [
        (f"{file}:{item.line}", item.old, item.new, ", ".join(item.names))
        for file, migration in found.items()
        for item in migration.moved
    ]


def _left(found: Mapping[Path, "Migration"]) -> list[Row]:
    return [
        (f"{file}:{item.line}", item.what, item.why)
        for file, migration in found.items()
        for item in migration.left
    ]


def _different(found: Mapping[Path, "Migration"]) -> list[Row]:
    from secateur.compat.torchao.differences import difference

    names = {name for m in found.values() for item in m.moved for name in item.names}
    return [(name, difference(name)) for name in sorted(names)]


def _as_data(tables: Mapping[Row, list[Row]]) -> dict[str, object]:
    keys = {MOVED: "moved", DIFFERENT: "differences", LEFT: "left"}
    return {
        keys[columns]: [dict(zip(columns, row, strict=True)) for row in rows]
        for columns, rows in tables.items()
    }


def _python_files(path: Path) -> Iterator[Path]:
    """The file itself, or a folder's in order, without hidden folders and environments."""
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: name a Python file or a folder of them")
    for folder, inner, files in os.walk(path):
        here = Path(folder)
        inner[:] = sorted(
            name
            for name in inner
            if not name.startswith(".") and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(files) if name.endswith(".py"))


def _diff(file: Path, before: bytes, after: bytes) -> list[str]:
    old, new = (text.decode("utf-8").splitlines() for text in (before, after))
    return list(difflib.unified_diff(old, new, str(file), str(file), lineterm=""))


def _write(file: Path, source: bytes) -> None:
    """Replace the file whole or not at all, with its permissions; follow a link to its file."""
    file = file.resolve()
    with file_appearing_whole(file) as partial:
        partial.write_bytes(source)
        shutil.copymode(file, partial)
