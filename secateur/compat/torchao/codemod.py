"""Rewriting the imports of torchao's and torch's pruning in a source to those of this package.

Only import statements are edited; everything around them stays the same, byte for byte. The modules
themselves say which names they have.
"""

import ast
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

PACKAGE = "secateur.compat.torchao"
SPARSE = f"{PACKAGE}.sparsity"
PROTOTYPE = f"{PACKAGE}.prototype.sparsity"

# Old prefix -> new prefix; the first match wins.
MOVED = {
    "torchao.sparsity.prototype.training": f"{SPARSE}.training",
    "torchao.sparsity.prototype": PROTOTYPE,
    "torchao.sparsity": SPARSE,
    "torchao.prototype.sparsity": PROTOTYPE,
    "torch.ao.pruning._experimental.pruner": f"{PROTOTYPE}.pruner",
    "torch.ao.pruning": PROTOTYPE,
}
# torchao still has these, so they move only in a file that imports a sparse layout from there.
WITH_SPARSE = {
    "torchao.quantization": f"{PACKAGE}.quantization",
    "torchao.dtypes": f"{PACKAGE}.dtypes",
}
SPARSE_NAMES = {
    "BlockSparseLayout",
    "CutlassSemiSparseLayout",
    "Float8DynamicActivationFloat8SemiSparseWeightConfig",
    "MarlinSparseLayout",
    "SemiSparseLayout",
    "float8_dynamic_activation_float8_semi_sparse_weight",
    "int8_dynamic_activation_int8_semi_sparse_weight",
}
BOM = b"\xef\xbb\xbf"
BY_NAME = "import its names one by one (from ... import ...) and migrate again"


@dataclass(frozen=True)
class Moved:
    """A rewritten import: its line, the old module and the new one, and the names."""

    line: int
    old: str
    new: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """A use of the old packages that was left unchanged, and why."""

    line: int
    what: str
    why: str


@dataclass(frozen=True)
class Migration:
    """A source with rewritten imports, and what was moved or left."""

    source: bytes
    moved: tuple[Moved, ...]
    left: tuple[Left, ...]


@dataclass(frozen=True)
class _Edit:
    node: ast.stmt
    statements: tuple[str, ...]
    moved: tuple[Moved, ...]
    left: tuple[Left, ...] = ()


def migrate_source(source: bytes) -> Migration:
    """The Python source with its imports rewritten, and what was moved or left.

    A name that does not exist here is still imported from where it was, and so are modules that are
    used by their full name or for attributes that do not exist here.

    Raises:
        ValueError: if the source is not Python in UTF-8.
    """
    mark, body = (BOM, source[len(BOM) :]) if source.startswith(BOM) else (b"", source)
    try:
        tree = ast.parse(body.decode("utf-8"))
    # ValueError: not UTF-8, or null bytes; the last two: nested too deeply
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it cannot be parsed ({error}): it is left as it is") from None
    rules = MOVED | (WITH_SPARSE if _is_sparse(tree) else {})
    edits = [edit for node in ast.walk(tree) if (edit := _edit(node, tree, rules)) is not None]
    changed = _rewritten(body, [edit for edit in edits if edit.statements])
    ast.parse(changed.decode("utf-8"))  # ours to get right: it raises before a file is written
    left = (*(item for edit in edits for item in edit.left), *_full_names(tree))
    return Migration(
        mark + changed,
        tuple(sorted((item for edit in edits for item in edit.moved), key=lambda m: m.line)),
        tuple(sorted(left, key=lambda item: item.line)),
    )


def _is_sparse(tree: ast.Module) -> bool:
    """Whether the file imports a sparse layout or configuration from torchao."""
    return any(
        alias.name in SPARSE_NAMES
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and _renamed(node.module or "", WITH_SPARSE)
        for alias in node.names
    )


def _edit(node: ast.AST, tree: ast.Module, rules: dict[str, str]) -> _Edit | None:
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return _from(node, node.module, tree, rules)
    if isinstance(node, ast.Import):
        return _import(node, tree, rules)
    return None


def _from(node: ast.ImportFrom, old: str, tree: ast.Module, rules: dict[str, str]) -> _Edit | None:
    """The edit of `from old import names`; names that do not exist here keep their old import."""
    kept, homes = list[ast.alias](), dict[str, list[ast.alias]]()
    left = list[Left]()
    for alias in node.names:
        found = _home(old, alias, tree, rules)
        if isinstance(found, tuple):
            homes.setdefault(found[0], []).append(found[1])
            continue
        kept.append(alias)
        if found is not None:
            left.append(Left(node.lineno, f"{old}.{alias.name}", found))
    if not homes:
        return _Edit(node, (), (), tuple(left)) if left else None
    statements = [_written(old, kept)] if kept else []
    statements += [_written(new, aliases) for new, aliases in homes.items()]
    moved = tuple(
        Moved(node.lineno, old, new, tuple(alias.name for alias in aliases))
        for new, aliases in homes.items()
    )
    return _Edit(node, tuple(statements), moved, tuple(left))


def _home(
    old: str, alias: ast.alias, tree: ast.Module, rules: dict[str, str]
) -> tuple[str, ast.alias] | str | None:
    """The new module and alias of a name, or why it stays, or None if it is none of ours."""
    new, here = _renamed(old, rules), alias.asname or alias.name
    if new is None and (module := _renamed(f"{old}.{alias.name}", rules)) is not None:
        parent, _, name = module.rpartition(".")  # from torchao import sparsity
        renamed = ast.alias(name, None if name == here else here)
        return _why_not_module(module, here, tree) or (parent, renamed)
    if new is None:
        return None
    if alias.name == "*":
        return f"it does not say which names: {BY_NAME}"
    found = _module(new)
    if found is not None and alias.name in _names(found):
        return new, alias
    if found is not None and _module(f"{new}.{alias.name}") is not None:
        return _why_not_module(f"{new}.{alias.name}", here, tree) or (new, alias)
    if alias.name in _names(importlib.import_module(PACKAGE)):
        return PACKAGE, alias
    return f"{PACKAGE} has no {alias.name}"


def _import(node: ast.Import, tree: ast.Module, rules: dict[str, str]) -> _Edit | None:
    """The edit of `import old as name`, if every attribute that is used of it exists here."""
    written, moved, left = list[str](), list[Moved](), list[Left]()
    for alias in node.names:
        new = _renamed(alias.name, rules)
        kept = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        problem = None if new is None else BY_NAME
        if new is not None and alias.asname is not None:
            problem = _why_not_module(new, alias.asname, tree)
        if new is None or problem is not None:
            written.append(kept)
            if problem is not None:
                left.append(Left(node.lineno, alias.name, problem))
        else:
            written.append(f"import {new} as {alias.asname}")
            moved.append(Moved(node.lineno, alias.name, new, ()))
    if not moved:
        return _Edit(node, (), (), tuple(left)) if left else None
    return _Edit(node, tuple(written), tuple(moved), tuple(left))


def _why_not_module(new: str, name: str, tree: ast.Module) -> str | None:
    """Why `name` cannot be this new module, or None if it has all that the file uses of it."""
    module = _module(new)
    if module is None:
        return f"{new} does not exist: {PACKAGE} has no such module"
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
    }
    missing = sorted(used - _names(module))
    return f"{new} has no {', '.join(missing)}" if missing else None


def _full_names(tree: ast.Module) -> Iterator[Left]:
    """Uses such as `torch.ao.pruning.X(...)`, which no import statement shows."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = _dotted(node)
            if name is not None and _renamed(name, MOVED) is not None:
                yield Left(node.lineno, name, f"it is used by its full name: {BY_NAME}")


def _dotted(node: ast.expr) -> str | None:
    parts = list[str]()
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _renamed(module: str, rules: dict[str, str]) -> str | None:
    for old, new in rules.items():
        if module == old or module.startswith(f"{old}."):
            return new + module.removeprefix(old)
    return None


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _names(module: ModuleType) -> set[str]:
    return set(vars(module).get("__all__", ()))


def _written(module: str, aliases: Sequence[ast.alias]) -> str:
    names = (a.name + (f" as {a.asname}" if a.asname else "") for a in aliases)
    return f"from {module} import {', '.join(names)}"


def _rewritten(body: bytes, edits: Sequence[_Edit]) -> bytes:
    """The source with each node's text replaced, from the last so that positions stay valid."""
    lines = body.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for edit in sorted(edits, key=lambda edit: (-edit.node.lineno, -edit.node.col_offset)):
        node = edit.node
        start = starts[node.lineno - 1] + node.col_offset
        assert node.end_lineno is not None and node.end_col_offset is not None
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        indent = body[starts[node.lineno - 1] : start]
        newline = b"\r\n" if lines[node.lineno - 1].endswith(b"\r\n") else b"\n"
        between = b"; " if indent.strip() else newline + indent
        text = _in_place(body[start:stop], edit) or between.join(
            statement.encode() for statement in edit.statements
        )
        body = body[:start] + text + body[stop:]
    return body


def _in_place(text: bytes, edit: _Edit) -> bytes | None:
    """The statement with only its module replaced, or None if not all of its names move there."""
    moved, node = edit.moved[0], edit.node
    if not isinstance(node, ast.ImportFrom):
        return None
    if edit.statements != (_written(moved.new, node.names),):
        return None
    exchanged = text.replace(moved.old.encode(), moved.new.encode(), 1)
    return exchanged if exchanged != text else None
