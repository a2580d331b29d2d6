"""The processor's name: from Linux, or from Python where there is no /proc."""

import platform
from pathlib import Path

import pytest

from secateur.core import processor as module
from secateur.core.processor import processor


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"processor\t: 0\nmodel name\t: A Chip @ 2 GHz\n\nmodel name\t: Another\n",
            "A Chip @ 2 GHz",
        ),
        (b"model name\t: \xffChip\n", "\ufffdChip"),
        (b"Hardware\t: a board\n", "what Python knows"),
        (None, "what Python knows"),
    ],
)
def test_the_first_model_name_is_the_processors(
    content: bytes | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "cpuinfo").write_bytes(content)
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "what Python knows")
    processor.cache_clear()
    assert processor() == expected
    processor.cache_clear()
