"""Other libraries' ways to prune, for `bench.run.accuracy` to measure ours beside.

    pip install llmcompressor nvidia-modelopt   # neither comes with this project

Each prunes a copy of its own, with its own defaults, on the same calibration batches and the same
layers; what comes back is these layers' weights, in a model that the library never saw.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.integrations.transformers import is_transformers
from secateur.model.blocks import Batch, run_batch
from secateur.patterns import NM, Pattern, Unstructured


@dataclass(frozen=True)
class Peer:
    """A method of another package: it prunes the plan's layers of a model in place."""

    package: str
    prune: Callable[[nn.Module, sc.Plan, list[Batch]], None]

    def library(self) -> str:
        """`llmcompressor 0.14.0`."""
        return f"{self.package} {version(self.package)}"


def llm_compressor(
    modifier: Callable[[], Any], model: nn.Module, plan: sc.Plan, data: list[Batch]
) -> None:
    """Prune the layers by `oneshot` with one modifier, decoder layer by layer.

    Raises: ImportError where it is not installed, ValueError for a pattern that it does not have
        or a model that is none of transformers'.
    """
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader

    if not is_transformers(model):
        raise ValueError(f"llm-compressor takes transformers' models, got {type(model).__name__}")
    structure, sparsity = _mask_structure(_pattern(plan))
    # named exactly: a name without "re:" is compared as a whole
    recipe = modifier()(sparsity=sparsity, mask_structure=structure, targets=list(plan.layers))
    batches: Any = [{"input_ids": one} if isinstance(one, Tensor) else one for one in data]
    pruned = copy.deepcopy(model)
    oneshot(
        model=pruned,
        recipe=recipe,
        dataset=DataLoader(batches, batch_size=None),  # as they are, in their order
        tokenizer=object(),  # it insists on one, which ids have no use for
    )
    _take(model, pruned, plan)


def _sparsegpt_modifier() -> Any:
    from llmcompressor.modifiers.pruning import SparseGPTModifier  # type: ignore[import-not-found]

    return SparseGPTModifier


def _wanda_modifier() -> Any:
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    return WandaPruningModifier


def _mask_structure(pattern: Pattern) -> tuple[str, float]:
    """What it calls the pattern: how many of how many are zero, 0:0 for any; and the sparsity."""
    match pattern:
        case NM(n, m):
            return f"{m - n}:{m}", pattern.sparsity
        case Unstructured(sparsity):
            return "0:0", sparsity
        case _:
            raise ValueError(f"llm-compressor has no {pattern}")


def modelopt_sparsegpt(model: nn.Module, plan: sc.Plan, data: list[Batch]) -> None:
    """Prune the layers by `sparsify`, all from the dense model's inputs.

    Raises: ImportError where it is not installed, ValueError for a pattern that it does not have.
    """
    import modelopt.torch.sparsity as sparsity  # type: ignore[import-not-found]

    if (pattern := _pattern(plan)) != NM(2, 4):
        raise ValueError(f"ModelOpt prunes to 2:4 alone, got {pattern}")

    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in data:
                run_batch(model, batch)

    # the last rule that matches counts, and None leaves a layer dense
    rules: dict[str, dict[str, Any] | None] = {"*": None, **{name: {} for name in plan.layers}}
    mode = [("sparsegpt", {"nn.Linear": rules})]
    pruned = sparsity.sparsify(copy.deepcopy(model), mode, {"forward_loop": forward_loop})
    _take(model, sparsity.export(pruned), plan)


def _pattern(plan: sc.Plan) -> Pattern:
    """The pattern of all layers of the plan."""
    (pattern,) = set(plan.layers.values())
    return pattern


@torch.no_grad()
def _take(model: nn.Module, pruned: nn.Module, plan: sc.Plan) -> None:
    """Give the model's layers the weights that the other model's have."""
    for name in plan.layers:
        model.get_parameter(f"{name}.weight").copy_(pruned.get_parameter(f"{name}.weight"))


PEERS: dict[str, Peer] = {
    "llm-compressor sparsegpt": Peer("llmcompressor", partial(llm_compressor, _sparsegpt_modifier)),
    "llm-compressor wanda": Peer("llmcompressor", partial(llm_compressor, _wanda_modifier)),
    "modelopt sparsegpt": Peer("nvidia-modelopt", modelopt_sparsegpt),
}
