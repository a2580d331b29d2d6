"""The reference: a page for each room of the library, with every public name on one of them.

The pages follow from `secateur.__all__` and from where each name is defined, so that a new public
name cannot be missing: in a room that is not listed here it lands on a page of its own.
"""

import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.pycode import ModuleAnalyzer

import secateur

# Room -> title of its page, in the order of the work.
ROOMS = {
    "model": "Plans",
    "patterns": "Patterns and number grids",
    "criteria": "Criteria",
    "prune": "Pruning and checking",
    "reconstruct": "Reconstruction",
    "allocation": "Sensitivity and allocation",
    "train": "Training",
    "accelerate": "Acceleration",
    "formats": "Formats and packed layers",
    "files": "Models as files",
    "llm": "Language models",
}

# Modules with no name in `secateur.__all__` that users import from all the same.
MODULES = {
    "allocation.costs": "Costs for a budget",
    "compat.torchao": "Names of torchao",
    "model.evaluate": "Evaluation",
    "model.statistics": "Statistics",
    "prune.free_dimensions": "Free dimensions",
    "prune.permutation": "Orders of columns",
    "report.inspection": "Inspection",
    "train.schedules": "Schedules",
}


# Public values, which have no docstring of their own: the module that says what they are.
VALUES = dict.fromkeys(("best", "thorough"), "secateur.reconstruct.presets")


@dataclass(frozen=True)
class Page:
    """One room: its public names, and what else it exports."""

    room: str
    title: str
    public: tuple[str, ...]
    others: tuple[str, ...]

    def __str__(self) -> str:
        module = importlib.import_module(f"secateur.{self.room}")
        parts = [f"# {self.title}", (inspect.getdoc(module) or "").split("\n\n")[0]]
        parts += [
            _value(name)
            if name in VALUES
            else _directive(f"secateur::{name}", vars(secateur)[name])
            for name in self.public
        ]
        if self.public and self.others:
            parts.append(f"## Also in `secateur.{self.room}`")
        elif self.others:
            parts.append(f"Import these from `secateur.{self.room}`.")
        parts += [_directive(f"{module.__name__}::{n}", vars(module)[n]) for n in self.others]
        return "\n\n".join(parts) + "\n"


def pages() -> list[Page]:
    """Every page, those with public names first."""
    rooms = list(ROOMS)
    for name in secateur.__all__:
        if (room := _room(name)) not in rooms:
            rooms.append(room)
    titles = {**{room: room.capitalize() for room in rooms}, **ROOMS, **MODULES}
    return [_page(room, titles[room]) for room in [*rooms, *MODULES] if _exists(room)]


def write(folder: Path) -> None:
    """Write the pages and their table of contents; a page that has not changed is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    texts = {f"{page.room}.md": str(page) for page in written} | {"index.md": _index(written)}
    for file in set(folder.glob("*.md")) - {folder / name for name in texts}:
        file.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _page(room: str, title: str) -> Page:
    public = tuple(name for name in secateur.__all__ if _room(name) == room)
    others = tuple(n for n in _exported(importlib.import_module(f"secateur.{room}")))
    # Verbs before what they take, and what they return last.
    public = tuple(sorted(public, key=lambda name: (inspect.isclass(vars(secateur)[name]), name)))
    return Page(room, title, public, tuple(name for name in others if name not in public))


def _exported(module: ModuleType) -> Iterator[str]:
    """Functions and classes that the module lists, or defines without an underscore."""
    listed = vars(module).get("__all__")
    for name, value in vars(module).items():
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        own = value.__module__ == module.__name__ and not name.startswith("_")
        if name in listed if listed is not None else own:
            yield name


def _index(written: list[Page]) -> str:
    lines = ["# Public names", "", "Everything in `import secateur as sc`.", ""]
    for page in written:
        if page.public:
            lines += [f"**[{page.title}]({page.room}.md)**", ""]
            lines += [f"- `sc.{name}`: {_summary(name)}" for name in page.public]
            lines.append("")
    toctree = ["```{toctree}", ":hidden:", "", *(page.room for page in written), "```"]
    return "\n".join([*lines, *toctree]) + "\n"


def _directive(target: str, value: object) -> str:
    kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
    options = "   :members:\n" if kind == "class" else ""
    body = f".. auto{kind}:: {target}\n{options}"
    return "```{eval-rst}\n" + textwrap.dedent(body).rstrip() + "\n```"


def _value(name: str) -> str:
    """A public value under its public name, with the string that follows it in its module."""
    body = textwrap.indent(_said_of(name), "   ").rstrip()
    return f"```{{eval-rst}}\n.. py:data:: secateur.{name}\n\n{body}\n```"


def _said_of(name: str) -> str:
    return "\n".join(ModuleAnalyzer.for_module(VALUES[name]).find_attr_docs()["", name])


def _summary(name: str) -> str:
    said = _said_of(name) if name in VALUES else inspect.getdoc(vars(secateur)[name]) or ""
    return " ".join(said.split("\n\n")[0].split())


def _room(name: str) -> str:
    return str(vars(secateur)[name].__module__).split(".")[1]


def _exists(room: str) -> bool:
    return importlib.util.find_spec(f"secateur.{room}") is not None


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx: the pages have to be there before it looks for pages."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "reference" / "generated"))
    return {"parallel_read_safe": True}
