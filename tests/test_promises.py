"""Every test named on the page of promises exists, and every promise names one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
PROMISES = re.findall(r"^- .*(?:\n  .*)*", PAGE, re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def defined_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", sorted({file for file, _ in TEST.findall(PAGE)}))
def test_every_test_that_is_named_exists(file: str) -> None:
    named = {name for found, name in TEST.findall(PAGE) if found == file}
    assert named - defined_in(file) == set()


def test_every_promise_is_held_by_a_test() -> None:
    assert len(PROMISES) > 50
    assert [promise for promise in PROMISES if not TEST.search(promise)] == []
    assert PAGE.count("`tests/") - 1 == len(TEST.findall(PAGE))  # all but this file are well named
