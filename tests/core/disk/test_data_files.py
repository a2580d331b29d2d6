"""The readers of JSON and YAML: data as it was written, or a one-line error that names the file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.disk.data_files import MOST_LEVELS, parse_json, parse_yaml, read_json, read_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner)
)


@given(st.dictionaries(st.text(), DATA, max_size=4))
def test_plain_data_comes_back_from_json(data: dict[str, Any]) -> None:
    for text in (json.dumps(data), json.dumps(data, ensure_ascii=False, indent=1)):
        found = parse_json(text.encode(), "x")
        assert found == data and repr(found) == repr(data)


@given(st.dictionaries(st.text(), DATA, max_size=4))
def test_plain_data_comes_back_from_yaml(data: dict[str, Any]) -> None:
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    for flow in (None, True):
        text = yaml.dump(data, Dumper=dumper, default_flow_style=flow, sort_keys=False)
        found = parse_yaml(text, "x")
        assert found == data and repr(found) == repr(data)


def assert_refused(read: Callable[[Path], Any], content: bytes, reason: str, path: Path) -> None:
    """Assert that a file with this content is refused in one line that names it."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read(path)
    kind = path.suffix[1:].upper()
    assert str(raised.value).startswith(f"{path} cannot be read as {kind}: {reason}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "it has the key 'c' twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": [-Infinity]}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (json.dumps({"a": 1}).encode("utf-16"), "'utf-8' codec can't decode"),
        (b'{"\\ud800": 1}', "'utf-8' codec can't encode character '\\ud800'"),
        (b"[1]", "it needs an object in braces, got a list"),
        (b'"a"', "it needs an object in braces, got text"),
        (b"null", "it needs an object in braces, got null"),
        (b"true", "it needs an object in braces, got true or false"),
        (b"7", "it needs an object in braces, got a number"),
        (b"", "Expecting value"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": ' * 20000 + b"1" + b"}" * 20000, "it is nested more than 100 levels deep"),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "it is nested more than 100 levels deep"),
    ],
)
def test_what_is_no_plain_json_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    assert_refused(read_json, content, reason, tmp_path / "data.json")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"a: 1\nb: {c: 1, c: 2}", "it has the key 'c' twice"),
        (b"a: .nan", "line 1 has .nan, which is no number"),
        (b"\na: -.inf", "line 2 has -.inf, which is no number"),
        (b"a: !!timestamp x", "line 1 has the tag tag:yaml.org,2002:timestamp, which is no plain"),
        (b"a: 2024-01-01", "line 1 has the tag tag:yaml.org,2002:timestamp, which is no plain"),
        (b"a: !!python/object/apply:os.system [ls]", "line 1 has the tag tag:yaml.org,2002:python"),
        (b"a: !!set {b}", "line 1 has the tag tag:yaml.org,2002:set, which is no plain data"),
        (b"a: !!binary YQ==", "line 1 has the tag tag:yaml.org,2002:binary, which is no plain"),
        (b"a: !mine b", "line 1 has the tag !mine, which is no plain data"),
        (b"a: !!int b", "line 1 has 'b', which is no int"),
        (b"a: !!int ''", "line 1 has '', which is no int"),
        (b"a: !!float b", "line 1 has 'b', which is no float"),
        (b"a: !!bool b", "line 1 has 'b', which is no bool"),
        (b"a: !!map b", "line 1 has the tag tag:yaml.org,2002:map, which is no plain data"),
        (b"a: &x [1]\nb: *x", "line 1 is repeated by an alias, write it out"),
        (b"a: &x [*x]", "line 1 is repeated by an alias, write it out"),
        (b"a: &x {b: 1}\nc:\n  <<: *x", "line 3 needs keys of text"),
        (b"[a]: 1", "line 1 needs keys of text"),
        (b"a: \xff", "'utf-8' codec can't decode byte 0xff"),
        (b'a: "\\ud800"', "'utf-8' codec can't encode character '\\ud800'"),
        (b"a: \x07", "unacceptable character"),
        (b"a: [1", "while parsing a flow sequence"),
        (b"a: 1\n---\nb: 2", "expected a single document in the stream"),
        (b"[" * 20000 + b"]" * 20000, "it is nested more than 100 levels deep"),
        (b"[" * 101 + b"]" * 101, "it is nested more than 100 levels deep"),
    ],
)
def test_what_is_no_plain_yaml_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    assert_refused(read_yaml, content, reason, tmp_path / "data.yaml")


def test_as_deep_as_allowed_is_read(tmp_path: Path) -> None:
    text = '{"a": ' + "[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1) + "}"
    data = parse_json(text, "x")
    assert json.dumps(data, separators=(", ", ": ")) == text
    assert parse_yaml(text, "x") == data


def test_infinity_is_read_where_it_may_be() -> None:
    data = parse_json('{"time_step_limit": [0.0, Infinity, -Infinity]}', "x", infinite=True)
    assert data == {"time_step_limit": [0.0, math.inf, -math.inf]}
    with pytest.raises(ValueError, match="x cannot be read as JSON: NaN is no number"):
        parse_json('{"a": NaN}', "x", infinite=True)


def test_keys_are_text_and_patterns_are_not_minutes() -> None:
    text = "0: {pattern: 2:4, shape: [8, 16]}\non: yes\n1.50: ~\n"
    assert parse_yaml(text, "x") == {
        "0": {"pattern": "2:4", "shape": [8, 16]},
        "on": True,
        "1.50": None,
    }


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x") == parse_yaml(b"\xef\xbb\xbfa: 1", "x")
    assert parse_yaml(b"", "x") is None
