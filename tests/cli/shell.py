"""The shell of these tests: a command run, and what it printed or how it refused."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from secateur.cli import app
from secateur.integrations.transformers import load_folder

WIDTH, ROWS, LENGTH = 32, 8, 24
WORDS = [f"w{i}" for i in range(90)]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result: Any, code: int = 0) -> str:
    """What a command printed on stdout, once it has ended as expected."""
    assert result.exit_code == code, result.output
    text: str = result.stdout
    return text


def refused(result: Any, code: int = 2) -> str:
    """The one line that an error is."""
    said(result, code)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return str(lines[0])


def tokens(folder: Path, key: str) -> str:
    return f"{folder / 'tokens.safetensors'}:{key}"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: nn.Module, folder: Path) -> bool:
    """Whether the model, rounded as files are, has the folder's weights."""
    saved = load_folder(folder).state_dict()
    return all(torch.equal(t.to(saved[n].dtype), saved[n]) for n, t in one.state_dict().items())


def same_tensors(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
