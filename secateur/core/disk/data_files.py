"""JSON and YAML as plain data: the one reader of each, for files that anybody may have written.

Plain data is mappings with text keys, lists, text, finite numbers, true, false and null. What a
parser would silently accept is refused: a duplicate key, NaN or infinity, a YAML tag or alias that
makes something else, and nesting so deep that recursive code would end in a RecursionError.
"""

import json
import math
from pathlib import Path
from typing import Any

# Real files have a dozen levels; recursive code can take ten times as many as this.
MOST_LEVELS = 100

_TAGS = "tag:yaml.org,2002:"


def read_json(path: Path, *, infinite: bool = False) -> dict[str, Any]:
    """The object in a JSON file; `infinite` allows infinite numbers in it.

    Raises:
        ValueError: if it holds anything else; the message names the file.
        OSError: if the file cannot be read.
    """
    return parse_json(path.read_bytes(), str(path), infinite=infinite)


def parse_json(content: str | bytes, where: str, *, infinite: bool = False) -> dict[str, Any]:
    """The object in a JSON text; `where` is the file's name in errors.

    Raises:
        ValueError: if it is anything else.
    """

    def constant(word: str) -> float:
        if word == "NaN" or not infinite:
            raise ValueError(f"{word} is no number")
        return float(word)

    def number(digits: str) -> float:
        found = float(digits)
        if math.isinf(found):
            raise ValueError(f"{_short(digits)} is too large a number")
        return found

    try:
        data = json.loads(
            _text(content),
            object_pairs_hook=_mapping,
            parse_constant=constant,
            parse_float=number,
        )
        if not isinstance(data, dict):
            raise ValueError(f"it needs an object in braces, got {_kind(data)}")
        _require_shallow(data)
        _require_whole_characters(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON: {_reason(error)}") from None
    return data


def read_yaml(path: Path) -> Any:
    """The data in a YAML or JSON file.

    Raises:
        ValueError: if it is not plain data; the message names the file.
        OSError: if the file cannot be read.
    """
    return parse_yaml(path.read_bytes(), str(path))


def parse_yaml(content: str | bytes, where: str) -> Any:
    """The data in a YAML text, keys as they are written; `where` is the file's name in errors.

    Numbers in base 60 are text, as in YAML 1.2, so that `2:4` is what it looks like.

    Raises:
        ValueError: if it is no plain data.
    """
    import yaml  # files are rare, and importing it costs 15 ms

    try:
        # Nodes become data here, not in PyYAML's constructor, which would make dates, sets and
        # whatever tags name, and keep only the last of several equal keys.
        node = yaml.compose(_text(content), yaml.SafeLoader)
        data = None if node is None else _data(node, set(), 1)
        _require_whole_characters(data)
        return data
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as YAML: {_reason(error)}") from None


def first_fault(error: Any) -> str:
    """The first place that a pydantic `ValidationError` names, and what is wrong there."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "the top level"
    return f"at {place}: {first['msg']}"


def _data(node: Any, seen: set[int], level: int) -> Any:
    """The data of a YAML node; `seen` are the nodes above and before it."""
    import yaml

    if level > MOST_LEVELS:
        raise RecursionError
    tag = node.tag.removeprefix(_TAGS)
    place = f"line {node.start_mark.line + 1}"
    if id(node) in seen:
        raise ValueError(f"{place} is repeated by an alias, write it out")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and tag == "map":
        pairs = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAGS}merge":
                raise ValueError(f"{place} needs keys of text")
            pairs.append((str(key.value), _data(value, seen, level + 1)))
        return _mapping(pairs)
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return [_data(item, seen, level + 1) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and tag in ("str", "int", "float", "bool", "null"):
        return _scalar(node, tag, place)
    raise ValueError(f"{place} has the tag {_short(node.tag)}, which is no plain data")


def _scalar(node: Any, tag: str, place: str) -> Any:
    import yaml

    text = node.value
    if tag == "str" or (tag in ("int", "float") and ":" in text):
        return text
    try:
        found = yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, KeyError, IndexError):
        raise ValueError(f"{place} has {_short(text)!r}, which is no {tag}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{place} has {_short(text)}, which is no number")
    return found


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {_short(key)!r} twice")
        found[key] = value
    return found


def _require_shallow(data: Any) -> None:
    level = [data]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def _require_whole_characters(data: Any) -> None:
    """Raise if an escape names a lone surrogate, which cannot be encoded."""
    json.dumps(data, ensure_ascii=False).encode()


def _text(content: str | bytes) -> str:
    """The text without the byte order mark that some editors write."""
    return content if isinstance(content, str) else content.decode("utf-8-sig")


def _reason(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, RecursionError):
        return f"it is nested more than {MOST_LEVELS} levels deep"
    return " ".join(str(error).split())


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _kind(data: object) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(data), "a number")
