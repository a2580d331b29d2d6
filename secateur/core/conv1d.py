"""transformers' `Conv1D`, GPT-2's linear layer, whose weight is stored as `[in, out]`.

It is known by its name and its `nf`, so that transformers is not imported.
"""

from jaxtyping import Float
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is a `Conv1D`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def as_linear(module: nn.Module) -> nn.Linear:
    """The `Conv1D` as an `nn.Linear` that multiplies by the same memory, with the very bias."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    width, out = weight.shape
    linear = nn.Linear(width, out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().mT, requires_grad=weight.requires_grad)
    linear.register_parameter("bias", bias)
    return linear.train(module.training)


def conv1d(kind: type[nn.Module], weight: Float[Tensor, "out in"]) -> nn.Module:
    """A `Conv1D` of this class with this weight, and without a bias."""
    out, width = weight.shape
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.__dict__ |= {"nf": out, "nx": width}
    made.weight = nn.Parameter(weight.mT.contiguous())
    made.register_parameter("bias", None)
    return made
