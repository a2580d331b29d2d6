"""Every Python block of torchao.sparsity's README, as it was written but for its imports."""

import ast
import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.compat.torchao.codemod import migrate_source

SEED = Path(__file__).parents[4] / "shared" / "seed.txt"
FORMATS = ("semi24_int4", "semi24_int8_dynamic", "semi24", "block:64x64")
PERFORMANCE = "# Performance"

pytestmark = pytest.mark.skipif(not SEED.is_file(), reason=f"the README is not at {SEED}")


class Model(nn.Module):
    """Two linear layers that are moved to a GPU where there is one, and stay where there is none.

    So that `model.cuda()` of the blocks runs everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x).relu())
        return result

    def cuda(self, device: Any = None) -> "Model":
        return super().cuda(device) if torch.cuda.is_available() else self


def blocks() -> list[str]:
    """The Python in the README: from a line with an import as far as it parses."""
    lines, found, at = SEED.read_text().splitlines(), list[str](), 0
    while at < len(lines):
        if not re.match(r"(from [\w.]+ import|import) \w", lines[at]):
            at += 1
            continue
        stop = max(end for end in range(at, len(lines) + 1) if _parses(lines[at:end]))
        found.append(_without_prose("\n".join(lines[at:stop])))
        at = stop
    return found


def _parses(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def _without_prose(text: str) -> str:
    """Without a heading of one word at the end, which parses as a name."""
    last = ast.parse(text).body[-1]
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Name):
        text = "\n".join(text.splitlines()[: last.lineno - 1])
    return text


def migrated(block: str) -> str:
    found = migrate_source(block.encode())
    assert found.moved and not found.left
    return found.source.decode()


def code(block: str) -> list[str]:
    """What is written in a block besides its imports."""
    body = ast.parse(block).body
    return [
        ast.unparse(node) for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))
    ]


def pruned(pattern: str) -> Model:
    torch.manual_seed(0)
    model = Model()
    sc.prune_(model, pattern)
    return model


def test_the_readme_has_five_blocks_and_only_their_imports_change() -> None:
    found = blocks()
    assert len(found) == 5
    verbs = ("quantize_(", "quantize_(", "sparsify_(", "sparsify_(", "squash_mask()")
    assert all(verb in block for verb, block in zip(verbs, found, strict=True))
    for block in found:
        assert code(migrated(block)) == code(block)
        assert not re.search(r"torchao\.(sparsity|quant|dtypes|proto)", block) or (
            "from torchao" not in migrated(block)
        )


@pytest.mark.parametrize("index", range(4))
def test_an_inference_block_packs_every_layer(index: int) -> None:
    model = pruned("block:64x64@0.5" if index == 3 else "2:4")
    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a reference runs where there is no kernel
        exec(migrated(blocks()[index]), {"model": model})
    assert isinstance(model.up, sc.SparseLinear) and isinstance(model.down, sc.SparseLinear)
    assert {str(model.up.format), str(model.down.format)} == {FORMATS[index]}
    weight = model.up.packed["values"]
    x = torch.randn(4, 256, device=weight.device)
    dense = dense.to(weight.device)
    if index == 0:
        x, dense = x.half(), dense.half()
    with torch.no_grad():
        error = float((model(x) - dense(x)).norm() / dense(x).norm())
    # exact formats round sums only; 8 bits are off by a hundredth, 4 bits by a tenth of the weight
    assert error < (0.2, 0.03, 1e-3, 1e-3)[index]


def test_unpruned_weights_are_refused_by_the_2_4_blocks() -> None:
    for block in blocks()[:3]:
        model = Model()
        with pytest.raises(ValueError, match=r"up \(2:4\).*first columns 0\.\.3 of row 0"):
            exec(migrated(block), {"model": model})
        assert type(model.up) is nn.Linear


def test_the_frontend_block_leaves_2_4_zeros() -> None:
    """Its first half; the second hands weights to torch's tensors, which need a GPU."""
    accuracy, performance = migrated(blocks()[4]).split(PERFORMANCE)
    assert "to_sparse_semi_structured" in performance
    model = Model()
    exec(accuracy, {"model": model})
    assert sc.check(model, "2:4") == {"up": 0.5, "down": 0.5}
    assert type(model.up) is nn.Linear and model.up.weight.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's sparse tensors need a GPU")
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype")
def test_the_frontend_block_runs_whole() -> None:
    model = Model()
    exec(migrated(blocks()[4]), {"model": model})
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    assert bool(model(x).isfinite().all())
