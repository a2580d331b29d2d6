"""Texts in memory and on disk, document by document."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path


def read_documents(text: str | Path | Sequence[str]) -> list[str]:
    """The documents that are not blank: the strings of a list, or the texts in a path's files.

    Each line of a `.jsonl` file is a document, its "text"; any other file is one. A folder stands
    for all files in and below it, except those whose names begin with a dot.

    Raises: ValueError if a file cannot be read, with its line.
    """
    if not isinstance(text, (str, Path)):
        for number, document in enumerate(text):
            if not _is_text(document):
                raise ValueError(
                    f"text {number} of the list is no text that can be encoded, got "
                    f"{type(document).__name__}: leave it out"
                )
        return [document for document in text if document.strip()]
    return [document for file in _files(text) for document in _read(file)]


def read_passages(text: str | Path | Sequence[str]) -> list[list[str]]:
    """The passages of each document: the paragraphs of a plain file, else the whole document."""
    if not isinstance(text, (str, Path)):
        return [[document] for document in read_documents(text)]
    found = list[list[str]]()
    for file in _files(text):
        if file.suffix == ".jsonl":
            found += [[document] for document in _read(file)]
        else:
            found += [_paragraphs(document) for document in _read(file)]
    return found


def _files(name: str | Path) -> list[Path]:
    """The file, or the files of the folder, in an order that is always the same."""
    path = Path(name)
    if not path.exists():
        listed = ", or pass texts in a list" if isinstance(name, str) else ""
        raise ValueError(
            f"{path} does not exist: name a text file, a .jsonl file or a folder of them{listed}"
        )
    if not path.is_dir():
        return [path]
    below = (file for file in sorted(path.rglob("*")) if file.is_file())
    found = [file for file in below if not _is_hidden(file.relative_to(path))]
    if not found:
        raise ValueError(f"{path} has no files: name a folder with a text in each file")
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> Iterator[str]:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text in UTF-8: {error}") from error
    if path.suffix == ".jsonl":
        yield from _json_lines(path, content)
    elif content.strip():
        yield content.replace("\r\n", "\n").strip()


def _json_lines(path: Path, content: str) -> Iterator[str]:
    """The texts. A line ends only at a line feed: a text may contain other separators."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            document = None
        if not _is_text(document):
            raise ValueError(f'{path}, line {number}: needs a JSON object with a string "text"')
        if document.strip():
            yield document


def _is_text(document: object) -> bool:
    """Whether it is a string that can be encoded; half of a surrogate pair cannot."""
    try:
        return isinstance(document, str) and document.encode() is not None
    except UnicodeEncodeError:
        return False


def _paragraphs(content: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", content) if part.strip()]
