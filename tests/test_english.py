"""Prose as a native engineer would write it: phrases that no docstring, message or page has."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# How a docstring does not begin: it says what is returned, or, with a verb, what is done.
OPENING = r"(?:Nothing|None|That|Those|So|Also|Here|Then)\b(?! `)"

# Word for word from another language, and what to write instead.
TRANSLATED = {
    r"of equals": "ties go to the first",
    r"for the while": "meanwhile, or leave it out",
    r"how manieth": "the number of",
    r"in (?:its|their) turns?": "in order, or one after the other",
    r"(?:at most|as|by|of|over|to|within) so (?:much|many)": "the number, or its name",
    r"also where": "even where, even if",
    r"(?:is|are) another(?! \w)": "differs, has changed",
    r"(?:is|are|was|were) told (?:by|in|why)": "is reported, says",
    r"what it has to say": "what it must define",
    r"(?:that|those) of (?:those|that|them)": "name it again",
    r"of which (?:that|this|it) is so": "for which this holds",
    r"hangs? on whether": "depends on whether",
    r"puts? out": "returns, gives",
    r"foretells?": "predicts",
    r"in the same words": "alike",
}

# "That of" and "those of" stand for a noun that is mostly better repeated.
CHAINS = r"\b(?:that|those) of\b"
CHAINS_PER_1000_LINES = 1.2


def faults(text: str) -> list[str]:
    """The translated phrases in a text, each with what to write instead."""
    plain = " ".join(text.split())
    return [
        f"{found[0]!r} in {plain[max(0, found.start() - 40) : found.end() + 20]!r}: write {better}"
        for phrase, better in TRANSLATED.items()
        if (found := re.search(rf"\b(?:{phrase})(?!\w)", plain, re.IGNORECASE))
    ]


def docstrings(source: str) -> list[str]:
    tree = ast.walk(ast.parse(source))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in tree if isinstance(node, documented)]


def prose(source: str) -> Iterator[str]:
    """Yield the strings of a source, docstrings and messages among them, and its comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [(t.start[0], t.string.lstrip("# ")) for t in tokens if t.type == tokenize.COMMENT]
    for _, block in groupby(enumerate(comments), key=lambda item: item[1][0] - item[0]):
        yield " ".join(text for _, (_, text) in block)


def covered() -> list[Path]:
    """All sources but this one, and the pages of the documentation, except the log."""
    folders = ("secateur", "bench", "tests", "examples")
    sources = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    sources -= {Path(__file__)}
    pages = [
        page
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        if not {"log", "_build"} & set(page.relative_to(ROOT).parts)
    ]
    return [*sorted(sources), *sorted(pages)]


@pytest.mark.parametrize("path", covered(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_phrase_is_translated(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        texts = re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n\n")
    else:
        texts = list(prose(text))
        for documented in docstrings(text):
            assert not re.match(OPENING, documented), f"{documented.splitlines()[0]!r}: say what"
    assert [fault for text in texts for fault in faults(text)] == []


def test_few_nouns_are_replaced_by_that_of_and_those_of() -> None:
    texts = [path.read_text(encoding="utf-8") for path in covered()]
    lines = sum(text.count("\n") for text in texts)
    chains = sum(len(re.findall(CHAINS, text)) for text in texts)
    assert 1000 * chains / lines <= CHAINS_PER_1000_LINES


@pytest.mark.parametrize(
    "text",
    [
        "The largest, of equals\nthe first.",
        "It is kept for the while.",
        "The how manieth call of which module.",
        "Layers come in their turn.",
        "Choices that add at most so much.",
        "It is verified, also where nothing was asked.",
        "In units of so many bytes.",
        "Its hash is another.",
        "The fastest, or those of those that were measured.",
    ],
)
def test_translated_phrases_are_found_in_strings_and_comments(text: str) -> None:
    assert len(faults(text)) == 1
    comment = "\n".join(f"# {line}" for line in text.splitlines())
    for source in (f'"""{text}"""\n', f"x = 1\n{comment}\n", f"f({text!r})\n"):
        assert [fault for part in prose(source) for fault in faults(part)] == faults(text)
    for opening in ("Nothing; the file has this too.", "None if it fits, else why not."):
        assert re.match(OPENING, opening)
