"""Free dimensions: hidden units whose order only the layers that make and read them can see."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.model import layers as _layers
from secateur.model.layers import weight_of
from secateur.patterns import NM, Pattern


@dataclass(frozen=True)
class Free:
    """A free dimension by name: outputs of the producers that only the consumer reads.

    Names are the last parts of module names with a common prefix: `("fc1",)` and `"fc2"` match
    `layers.3.fc1` and `layers.3.fc2`. `within_heads` is for the values and the output projection of
    attention, whose channels may change places only within their head.
    """

    producers: tuple[str, ...]
    consumer: str
    within_heads: bool = False


# The first match decides, so gated MLPs come before MLPs with an up-projection alone.
FREE = (
    Free(("gate_proj", "up_proj"), "down_proj"),
    Free(("up_proj",), "down_proj"),
    Free(("w1", "w3"), "w2"),
    Free(("w1",), "w2"),
    Free(("wi_0", "wi_1"), "wo"),
    Free(("wi",), "wo"),
    Free(("fc1",), "fc2"),
    Free(("lin1",), "lin2"),
    Free(("linear1",), "linear2"),
    Free(("c_fc",), "c_proj"),
    Free(("dense_h_to_4h",), "dense_4h_to_h"),
    Free(("intermediate.dense",), "output.dense"),
    Free(("up",), "down"),
    Free(("v_proj",), "o_proj", within_heads=True),
    Free(("v_proj",), "out_proj", within_heads=True),
    Free(("v_lin",), "out_lin", within_heads=True),
    Free(("self.value",), "output.dense", within_heads=True),
    Free(("attention.value",), "output.dense", within_heads=True),
    Free(("v",), "o", within_heads=True),
)


@dataclass(frozen=True)
class Pair:
    """A consumer and its producers; each head has an order of its own.

    An MLP is one head. With grouped queries, neighbouring query heads, each a run of the consumer's
    columns, read the same head of the producer.
    """

    name: str
    consumer: nn.Module
    producers: Mapping[str, nn.Module]
    pattern: NM
    heads: int
    width: int

    def columns(self) -> Int[Tensor, "heads queries width"]:
        weight = _layers.matrix(self.consumer)
        return torch.arange(weight.shape[1], device=weight.device).view(self.heads, -1, self.width)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that `permute_` changes."""
        modules = {**self.producers, self.name: self.consumer}
        return {
            f"{name}.{key}": parameter
            for name, module in modules.items()
            for key, parameter in module.named_parameters(recurse=False)
        }

    def permute_(self, order: Int[Tensor, "heads width"]) -> None:
        """Reorder the columns of the consumer, and the rows and biases of the producers."""
        columns = self.columns()
        order = order.to(columns.device)
        moved = columns.gather(2, order[:, None].expand_as(columns)).flatten()
        _write_(self.consumer, _layers.matrix(self.consumer)[:, moved])
        first = torch.arange(self.heads, device=order.device)[:, None] * self.width
        rows = (first + order).flatten()
        for module in self.producers.values():
            weight = _layers.matrix(module)
            rows = rows.to(weight.device)
            _write_(module, weight[rows])
            if (bias := module._parameters.get("bias")) is not None:
                bias.copy_(bias[rows])


def _write_(module: nn.Module, rows: Float[Tensor, "out in"]) -> None:
    weight_of(module).copy_(_layers.from_matrix(module, rows))


def find_pairs(
    model: nn.Module, patterns: Mapping[str, Pattern], free: Sequence[Free]
) -> tuple[dict[str, Pair], dict[str, str]]:
    """The layers with free inputs and an N:M pattern, and why each of the others is left alone."""
    modules = dict(model.named_modules())
    addresses = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    shared = {address for address, n in Counter(addresses).items() if n > 1}
    found = {
        name: _pair(name, pattern, modules, free, shared) for name, pattern in patterns.items()
    }
    pairs = {name: pair for name, pair in found.items() if isinstance(pair, Pair)}
    left = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    feeds = Counter(producer for pair in pairs.values() for producer in pair.producers)
    for name in list(pairs):
        if several := [p for p in pairs[name].producers if feeds[p] > 1]:
            left[name] = f"{several[0]} feeds {feeds[several[0]]} layers, which share one order"
            del pairs[name]
    return pairs, left


def _pair(
    name: str,
    pattern: Pattern,
    modules: Mapping[str, nn.Module],
    free: Sequence[Free],
    shared: set[int],
) -> Pair | str:
    """The layer with its producers, or why it has none."""
    if not isinstance(pattern, NM):
        return f"{pattern} is no N:M pattern, and no other has groups of inputs to rearrange"
    known = next(((f, p) for f in free if (p := _producers(name, f, modules))), None)
    if known is None:
        return "no name in free= makes its inputs a free dimension"
    dimension, names = known
    for member in (*names, name):
        if reason := _why_fixed(modules[member], shared):
            return f"{member}: {reason}"
    outputs = {_layers.matrix(modules[producer]).shape[0] for producer in names}
    inputs = _layers.matrix(modules[name]).shape[1]
    width = _head_width(names[0], modules) if dimension.within_heads else inputs
    if width is None:
        return f"no module around {names[0]} says how wide a head is: {', '.join(HEAD_WIDTHS)}"
    out = outputs.pop()
    if outputs or out % width or inputs % out:
        return f"the outputs of {', '.join(names)} are not its {inputs} inputs in heads of {width}"
    if width % pattern.m:
        return f"{pattern} has groups across heads of {width} inputs, or a remainder"
    producers = {producer: modules[producer] for producer in names}
    return Pair(name, modules[name], producers, pattern, out // width, width)


def _producers(name: str, free: Free, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The producers' names for a consumer of this name; empty where `free` does not match it."""
    if not f".{name}".endswith(f".{free.consumer}"):
        return ()
    beginning = name.removesuffix(free.consumer)
    names = tuple(beginning + producer for producer in free.producers)
    return names if all(producer in modules for producer in names) else ()


def _why_fixed(module: nn.Module, shared: set[int]) -> str | None:
    """Why rows and columns of this module cannot be moved, or None."""
    if not _layers.is_prunable(module) or isinstance(module, (nn.Conv2d, nn.Embedding)):
        return f"{type(module).__name__} is no linear layer"
    if reason := _layers.why_not_prunable(module):
        return reason
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own or ("bias" not in own and module.bias is not None):
        return "its weight or bias is computed: remove its parametrizations first"
    if any(p.is_meta for p in own.values()):
        return "its weight has no data (meta device)"
    if any(p.data_ptr() in shared for p in own.values()):
        return "its weight or bias is tied to another layer's, which would be permuted with it"
    return None


# The attributes in which attention modules keep the width of a head.
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")


def _head_width(name: str, modules: Mapping[str, nn.Module]) -> int | None:
    """The width of a head, from the innermost module around this one that has it."""
    while name:
        name = name.rpartition(".")[0]
        known = [vars(modules[name]).get(key) for key in HEAD_WIDTHS]
        if (width := next((w for w in known if isinstance(w, int)), None)) is not None:
            return width
    return None
