"""A method of the user's own: a function in a Python file, which is run only if that is wanted."""

import difflib
import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

# Characters of the file's hash that a method's name ends in: reports then say which code it was.
HASH = 8


def names_file(method: str) -> bool:
    """Whether the method is in a file: `file.py:function`, perhaps without the function."""
    return re.search(r"\.py(:|$)", method) is not None


def function_in(method: str, trusted: bool) -> Callable[..., Any]:
    """The function that `file.py:function` names; reports call it so, with a hash of the file.

    Raises:
        ValueError: if the code is not `trusted`, the file does not exist or cannot be run, or has
            no such function.
    """
    file, _, function = method.rpartition(":") if ".py:" in method else (method, "", "")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--method {method}: there is no file {file}")
    if not trusted:
        raise ValueError(
            f"--method {method} runs the code in {file}: give --trust-code if you trust it"
        )
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()[:HASH]
    module = _module(path, f"secateur_own_{digest}")
    own = {
        name: thing
        for name, thing in vars(module).items()
        if inspect.isfunction(thing)
        and re.match(rf"{module.__name__}$|secateur\.", thing.__module__)
    }
    if function not in own:
        listed = ", ".join(own) or "none"
        close = difflib.get_close_matches(function, own, n=1)
        hint = f": did you mean {close[0]!r}?" if close else f": write {file}:FUNCTION"
        raise ValueError(
            f"--method {method}: {file} has no function {function!r}, it has {listed}{hint}"
        )
    found = own[function]
    if found.__module__ == module.__name__:  # a function that the file imports keeps its name
        found.__name__ = f"{path.name}:{function}@{digest}"
    return found


def _module(path: Path, name: str) -> ModuleType:
    """The file, run as a module of this name.

    Raises:
        ValueError: with the line, if it raises.
    """
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line, why = lines[-1] if lines else None, str(error)
        if isinstance(error, SyntaxError):
            line, why = error.lineno, error.msg
        place = f", line {line}" if line else ""
        raise ValueError(f"{path} cannot be run{place}: {type(error).__name__}: {why}") from error
    return module
