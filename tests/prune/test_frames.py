"""How many frames lie between a user's line and the formula, as one sees in a debugger."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch

import secateur as sc
from tests.models import Decoder

PACKAGE = str(Path(sc.__file__).parent)


def frames_to(formula: Callable[..., Any], run: Callable[[], object]) -> list[str]:
    """The functions of the library on the stack when the formula is called for the first time."""
    code: CodeType = getattr(formula, "__wrapped__", formula).__code__
    found: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is code and not found:
            while frame is not None:
                if frame.f_code.co_filename.startswith(PACKAGE):
                    found.append(frame.f_code.co_name)
                frame = frame.f_back

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found[::-1]


@pytest.mark.parametrize(
    "formula, verb",
    [(sc.wanda, sc.prune_), (sc.sparsegpt, sc.reconstruct_), (sc.alps, sc.reconstruct_)],
)
def test_five_frames_from_the_verb_to_the_formula(
    formula: Callable[..., Any], verb: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    model, batches = Decoder(), [torch.randint(20, (4, 12)) for _ in range(2)]
    found = frames_to(formula, lambda: verb(model, "2:4", formula, batches))
    assert found[0] == verb.__name__ and found[-1] == formula.__name__
    assert len(found) <= 5, " -> ".join(found)
