"""Docstrings as they are written here, in Markdown with sections of their own, for autodoc.

A section is a line such as `Cost: one dense mask at a time.` or `Raises:` with indented text after
it; it becomes a field of the function. Code, tables and fences become their reStructuredText.
"""

import re
from collections.abc import Iterator
from typing import Any

SECTION = re.compile(r"(Cost|Error|Raises|Needs|Source):\s*(.*)")
# *word*, once its asterisks have been escaped; a product has spaces around its own.
EMPHASIS = re.compile(r"(?<!\w)\\\*(\w[^*]*?)\\\*(?!\w)")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def to_rst(lines: list[str]) -> list[str]:
    """The docstring's lines in reStructuredText."""
    rest = list(lines)
    out: list[str] = []
    while rest:
        if rest[0].startswith("```"):
            rest.pop(0)
            code = _take(rest, lambda line: not line.startswith("```"))
            rest.pop(0)
            out += ["", "::", "", *(f"    {line}" for line in code), ""]
        elif rest[0].startswith("|") and rest[0].rstrip().endswith("|"):
            out += ["", *_table(_take(rest, lambda line: line.startswith("|"))), ""]
        elif found := SECTION.fullmatch(rest[0]):
            rest.pop(0)
            body = [found[2], *_take(rest, lambda line: line.startswith(" "))]
            text = _inline(" ".join(line.strip() for line in body).strip())
            if not (out and out[-1].startswith(":")):
                out.append("")
            out.append(f":{found[1]}: {text}")
            if rest and rest[0] and not SECTION.fullmatch(rest[0]):
                out.append("")
        else:
            paragraph = _take(
                rest,
                lambda line: not (line.startswith(("```", "|")) or SECTION.fullmatch(line)),
            ) or [rest.pop(0)]
            out += _inline("\n".join(paragraph)).split("\n")
    return out


def _take(rest: list[str], wanted: Any) -> list[str]:
    """Remove and return the leading lines that are wanted."""
    taken = []
    while rest and wanted(rest[0]):
        taken.append(rest.pop(0))
    return taken


def _inline(text: str) -> str:
    return "".join(_spans(text))


def _spans(text: str) -> Iterator[str]:
    """Code in double backquotes, everything else without a meaning in reStructuredText."""
    for i, span in enumerate(re.split(r"`([^`]+)`", text)):
        if i % 2:
            yield rf"\ ``{span.strip()}``\ "
        else:
            plain = re.sub(r"([\\*|_`])", r"\\\1", span)
            plain = EMPHASIS.sub(r"*\1*", plain)
            yield ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", plain)


def _table(rows: list[str]) -> Iterator[str]:
    yield ".. list-table::"
    yield "   :header-rows: 1"
    yield ""
    for row in rows:
        if set(row) <= set("|-: "):
            continue
        for i, cell in enumerate(row.strip().strip("|").split("|")):
            yield f"   {'*' if i == 0 else ' '} - {_inline(cell.strip())}"


def _process(
    app: Any, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    lines[:] = to_rst(lines)


def _no_protocol_signature(
    app: Any, what: str, name: str, value: object, options: object, signature: str, returns: str
) -> tuple[str, str] | None:
    """A protocol is satisfied, never called."""
    return ("", returns) if getattr(value, "_is_protocol", False) and what == "class" else None


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _no_protocol_signature)
    return {"parallel_read_safe": True}
