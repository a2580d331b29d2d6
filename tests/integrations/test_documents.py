"""Which documents there are in a list, a file, lines of JSON and a folder."""

import json
from pathlib import Path

import pytest

from secateur.integrations.documents import read_documents, read_passages

# Where str.splitlines ends a line and JSON does not: all of them are legal within a string.
SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=ascii)
def test_only_a_line_feed_ends_a_json_line(
    separator: str, start: bytes, end: str, tmp_path: Path
) -> None:
    """Characters above the controls may be there as they are, controls as JSON writes them."""
    texts = [f"a{separator}b", "c", separator + "d" + separator]
    lines = [json.dumps({"text": text}, ensure_ascii=ord(separator) < 0x20) for text in texts]
    file = tmp_path / "t.jsonl"
    file.write_bytes(start + (end.join([*lines, ""]) + end).encode())
    assert read_documents(file) == texts


@pytest.mark.parametrize(
    "line",
    [
        '{"words": "b"}', "[1]", "3", "{", '{"text": 3}', '{"text": null}', '{"text": "\\ud800"}',
        '{"text": ' * 100_000, '{"text": "a"} {"text": "b"}',
    ],
    ids=range(9),
)  # fmt: skip
def test_a_line_that_is_no_document_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r't.jsonl, line 3: needs a JSON object with a string "te'):
        read_documents(file)


def test_a_folder_has_a_document_in_each_file_but_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.py").write_text("deep\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n{"text": " "}\n{"text": "four"}')
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\xff\xfe")
    assert read_documents(tmp_path) == ["one\n\ntwo", "deep", "three", "four"]
    assert read_documents(str(tmp_path)) == read_documents(tmp_path)
    assert read_passages(tmp_path) == [["one", "two"], ["deep"], ["three"], ["four"]]
    assert read_passages(["a\n\nb", " "]) == [["a\n\nb"]]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no files: name a folder with a text in each file"):
        read_documents(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="weights.bin cannot be read as text in UTF-8: 'utf-8'"):
        read_documents(tmp_path)
