"""What `generate` and `serve` say of a model: which of its linear layers run in which way."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from secateur.core.conv1d import is_conv1d
from secateur.formats import SparseLinear


def linear_layers(model: nn.Module) -> dict[str, int]:
    """How many linear layers run in which way, one token at a time."""
    found = Counter[str]()
    for module in model.modules():
        if isinstance(module, SparseLinear):
            of_one_token = module.dispatch.split()[0].partition("<=")[0]
            found[f"{module.format} by {of_one_token}"] += 1
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            found["dense"] += 1
    return dict(found)


def counted(layers: Mapping[str, int]) -> str:
    """The same as a person reads it."""
    return "linear layers: " + ", ".join(f"{count} {what}" for what, count in layers.items())
