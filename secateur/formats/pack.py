"""`pack_` and `unpack_`: the linears of a model, from dense to packed and back.

GPT-2's `Conv1D` is a linear too, whose weight is read and given back transposed.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from secateur.core.conv1d import as_linear, conv1d, is_conv1d
from secateur.core.coverage import coverage, left_alone
from secateur.core.memory import room_for
from secateur.core.shown import Shown
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.weights import adapters, require_data, require_module, tied_weights, why_computed
from secateur.core.wrappers import adapted, unwrapped
from secateur.formats.contract import Format
from secateur.formats.experts import SparseExperts, matrices_of, open_experts_, put_, stack_experts_
from secateur.formats.format import parse_format, weight_error
from secateur.formats.fuse import separate_activations_
from secateur.formats.linear import SparseLinear, Table

# The name under which transformers knows the packed form.
QUANT_METHOD = "secateur"

REASONS_SHOWN = 3  # enough to see what is wrong without a page of text


@dataclass(frozen=True)
class PackReport(Shown):
    """What `pack_` or `unpack_` changed, layer by layer in order.

    A layer is (name, format, bytes before, bytes after, weight error). Bytes count
    the weight in use, with what implementations arranged; a checkpoint holds less. The error is
    ||W - W'|| / ||W||, which is 0 but for formats that round weights to a grid. `model_bytes` is
    the size of the whole model before, parameters and buffers.
    """

    layers: tuple[tuple[str, str, int, int, float], ...]
    model_bytes: int

    @property
    def bytes_before(self) -> int:
        return sum(before for _, _, before, _, _ in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(after for _, _, _, after, _ in self.layers)

    @property
    def weight_error(self) -> float:
        """The largest weight error of a layer."""
        return max((error for *_, error in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        names = ("layer", "format", "bytes_before", "bytes_after", "weight_error")
        layers = [dict(zip(names, layer, strict=True)) for layer in self.layers]
        return {"layers": layers, "model_bytes": self.model_bytes}

    @property
    def paragraphs(self) -> tuple[str]:
        rounded = f", weights off by up to {self.weight_error:.1%}" if self.weight_error else ""
        return (
            f"{len(self.layers)} layers, {self.bytes_before / 1e6:.1f} MB of weights before, "
            f"{self.bytes_after / 1e6:.1f} MB after{rounded}; "
            f"{whole_model(self.model_bytes, self.bytes_before, self.bytes_after)}",
        )


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of the model, each once."""
    return sum(
        # torch refuses to say it of sparse tensors: as if they were dense
        t.nbytes if t.layout is torch.strided else t.numel() * t.itemsize
        for t in (*model.parameters(), *model.buffers())
    )


def whole_model(bytes: int, before: int, after: int) -> str:
    """The size of the whole model, told after its weights went from `before` to `after` bytes."""
    now = bytes - before + after
    return f"the whole model takes {now / 1e6:.1f} MB instead of {bytes / 1e6:.1f} MB"


@torch.inference_mode(False)  # or the packed tensors could not be trained around
def pack_(
    model: nn.Module, format: str | Format = "semi24", layers: Sequence[str] | None = None
) -> PackReport:
    """The layers that now hold a packed weight: each listed `nn.Linear` becomes a `SparseLinear`.

    So does a subclass that has the forward and the tensors of `nn.Linear` and no others, GPT-2's
    `Conv1D`, and the matrix of an expert that transformers stores in a stack
    (`experts.down_proj.3`): its module becomes a `SparseExperts`, which runs expert by expert.

    Without `layers`: every `nn.Linear` whose weight fits the format and is smaller for it, which
    takes zeros, but for `int4`, `int8`, `int8_dynamic` and `fp8_dynamic`, and which is of no
    adapter. This saves room on disk, and memory unless a kernel arranges a copy of the weight for
    itself, as the report says; whether it saves time is for `accelerate_` to measure. Packed
    weights are frozen. The formats `semi24_int4`, `semi24_int8`, `semi24_fp8`, `semi48_int4`,
    `bitmap_int4`, `int4` and `int8` round weights to a grid, and the report says how far; a weight
    reconstructed on that grid is not changed by it. Those that end in `_dynamic` round inputs, too.

    Cost: dense and packed weights of all listed layers at once, until all are known to pack.
    Raises: ValueError if a listed layer cannot be packed, without a list no layer can, or a weight
        is computed (a mask of torch.nn.utils.prune, a parametrization) or has no data; then nothing
        has changed.
    """
    require_module(model)
    with all_or_nothing() as undo:
        return _pack(unwrapped(model), parse_format(format), layers, undo)


def _pack(model: nn.Module, chosen: Format, layers: Sequence[str] | None, undo: Undo) -> PackReport:
    tied = tied_weights(model)
    if layers is None:
        linears = _fitting(model, chosen, tied)
    else:
        linears = named_linears(model, layers)
        for name in linears:
            problem = why_not_layer(name, linear_at(model, name, linears), tied)
            if problem is not None:
                raise ValueError(f"pack_ cannot take layer {name!r}: {problem}")
    packed = dict[str, SparseLinear]()
    for name, linear in linears.items():
        with room_for([name], f"its weight in {chosen}", "pack fewer layers at once (layers=)"):
            packed[name] = packed_linear(name, linear, chosen)
    report = PackReport(
        tuple(
            (name, str(chosen), linear.weight.nbytes, *_size_and_error(linear, packed[name]))
            for name, linear in linears.items()
        ),
        bytes_of(model),
    )
    swap(model, packed, undo)
    return report


@torch.inference_mode(False)
def unpack_(model: nn.Module) -> PackReport:
    """The layers that are plain again: every `SparseLinear` becomes an `nn.Linear`, weights exact.

    Or a `Conv1D`, where one was packed; experts are stacks again.

    A quantised weight becomes scale x code, rounded once to the layer's dtype: packing it in the
    same format again changes nothing.
    The restored weights require gradients, whatever they did before they were packed.

    Cost: dense and packed weights of all packed layers at once.
    Raises: ValueError if the model itself is one lone `SparseLinear`; then nothing has changed.
    """
    require_module(model)
    with all_or_nothing() as undo:
        return _unpack(unwrapped(model), undo)


def _unpack(model: nn.Module, undo: Undo) -> PackReport:
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)
    }
    _refuse_lone_layer(model, found, "unpack_")
    dense = dict[str, nn.Module]()
    for name, layer in found.items():
        with room_for([name], "its dense weight", "unpack_ on a machine with more memory"):
            dense[name] = _dense_linear(layer)
    report = PackReport(
        tuple(
            (name, str(layer.format), layer.nbytes, _dense_bytes(layer), 0.0)
            for name, layer in found.items()
        ),
        bytes_of(model),
    )
    swap(model, dense, undo)
    stack_experts_(model, undo)
    separate_activations_(model, undo)
    return report


def packed_linear(
    name: str, linear: nn.Linear, format: Format, table: Table | None = None
) -> SparseLinear:
    """A `SparseLinear` with this layer's weight, its very bias and its training mode.

    Without a table it runs, at each number of tokens, the first implementation that can.

    Raises: ValueError where the format cannot hold the weight; the message names the layer.
    """
    try:
        packed = format.pack(linear.weight.detach())
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    bias: nn.Parameter | None = linear.bias
    return SparseLinear(packed, bias, name, table).train(linear.training)


def named_linears(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Linear]:
    """The listed layers of the model, a `Conv1D` as the linear that it computes.

    Raises: ValueError for a name that the model does not have, a module that is no linear, or a
        weight that is computed or has no data.
    """
    modules = {**dict(model.named_modules()), **matrices_of(model)}
    found: dict[str, nn.Module] = {}
    for name in layers:
        if name not in modules:
            close = get_close_matches(name, modules, n=1)
            hint = f"closest: {close[0]!r}" if close else "the model has no name like it"
            raise ValueError(f"no layer is named {name!r}: {hint}")
        module = modules[name]
        if not (is_linear(module) or is_conv1d(module)):
            raise ValueError(
                f"layer {name!r} needs to be an nn.Linear, got {type(module).__name__}: "
                "leave it out of layers"
            )
        found[name] = module
    _refuse_lone_layer(model, found, "pack_")
    return _as_linears(found)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of the model, what is one but for its type, and experts' matrices.

    Raises: ValueError if the weight of one is computed or has no data.
    """
    found = {name: m for name, m in model.named_modules() if is_linear(m) or is_conv1d(m)}
    return _as_linears({**found, **matrices_of(model)})


def linear_at(model: nn.Module, name: str, linears: Mapping[str, nn.Linear]) -> nn.Module:
    """The module of a linear layer; the matrix itself for an expert, which has none."""
    modules = dict(model.named_modules())
    return modules[name] if name in modules else linears[name]


def packed_share(model: nn.Module) -> str:
    """One sentence: the share of the model's parameters that is packed, and what stays dense."""
    linears = [name for name, m in model.named_modules() if is_linear(m) or is_conv1d(m)]
    left = left_alone(model, {}, dict.fromkeys(linears, "linear layers that stay dense"))
    packed = [m.shape for m in model.modules() if isinstance(m, SparseLinear)]
    return coverage("packed are", sum(map(prod, packed)), left)


def _as_linears(found: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    require_data(found)
    return {name: m if isinstance(m, nn.Linear) else as_linear(m) for name, m in found.items()}


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an `nn.Linear`, or a subclass that computes the same from the same tensors.

    Attention reads the weight of its output projection without calling it.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if type(module) is nn.Linear or why_computed(module):
        return not isinstance(module, SparseLinear)
    others = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    return type(module).forward is nn.Linear.forward and not others


def why_not_layer(name: str, module: nn.Module, tied: Mapping[str, str]) -> str | None:
    """What would be lost beside its dense weight if this layer were replaced, or None.

    `tied` is what `secateur.core.weights.tied_weights` says of the model.
    """
    if name in tied:
        return f"its weight is tied to {tied[name]!r}, and packing would untie them"
    if reason := why_computed(module, "bias"):
        return f"its bias {reason}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which packing would drop: remove them first"
    if "forward" in vars(module):
        return "its forward has been replaced, which packing would undo: restore it first"
    return None


def swap(model: nn.Module, replacements: Mapping[str, nn.Module], undo: Undo) -> None:
    """Put each replacement in every place where the module of that name stands.

    A `SparseLinear` is told what stood there, for `unpack_` to give back. Stacks of experts are
    opened for it.
    """
    open_experts_(model, undo, replacements)
    modules = dict(model.named_modules())
    for name, replacement in replacements.items():
        if isinstance(replacement, SparseLinear):
            replacement.unpacks_to = _plain_class(modules[name])
    put_(model, replacements, undo)
    for module in model.modules():
        if isinstance(module, SparseExperts):
            module.own_()
    tell_writers(model, undo)


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of layer that this one is once it is unpacked."""
    if isinstance(module, SparseLinear):
        return module.unpacks_to
    return type(module) if is_conv1d(module) else nn.Linear


def refuse_save_pretrained(*arguments: object, **ignored: object) -> None:
    """Refuse to write: in the place of a model's own method while layers of it are packed.

    Its loader would find none of the packed tensors, and might go on with random weights.
    """
    raise ValueError(
        "save_pretrained would write packed weights that no other loader knows: write them with "
        "sc.save(model, folder), or call unpack_(model) first"
    )


def tell_writers(model: nn.Module, undo: Undo) -> None:
    """Have models that write themselves know which of their layers are packed now.

    A transformers model carries this library's quantizer meanwhile, by which it writes them; parts
    of one, and models of other libraries, refuse to be written.
    """
    parts = set[nn.Module]()
    for module in model.modules():
        if not hasattr(type(module), "save_pretrained") or adapted(module) is not module:
            continue  # PEFT's wrapper writes adapters alone
        packed = any(isinstance(inner, SparseLinear) for inner in module.modules())
        if (quantizer := _quantizer(module)) is not None and module not in parts:
            quantizer.carry(module, undo)
            parts.update(module.modules())
            packed = False
        own = vars(module).get("save_pretrained")
        if packed and own is None:
            undo.call(delattr, module, "save_pretrained")
            setattr(module, "save_pretrained", refuse_save_pretrained)  # noqa: B010
        elif own is refuse_save_pretrained and not packed:
            undo.call(setattr, module, "save_pretrained", own)
            del module.save_pretrained


def _quantizer(module: nn.Module) -> Any:
    """The class of this library's quantizer, if this is a transformers model; else None.

    It is in a room above, and registered with transformers by `import secateur`.
    """
    models = sys.modules.get("transformers.modeling_utils")
    if models is None or not isinstance(module, models.PreTrainedModel):
        return None
    return sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD)


def _fitting(model: nn.Module, format: Format, tied: Mapping[str, str]) -> dict[str, nn.Linear]:
    fitting, reasons, left = dict[str, nn.Linear](), list[str](), adapters(model)
    linears = linears_of(model)
    for name, linear in linears.items():
        problem = left.get(name) or why_not_layer(name, linear_at(model, name, linears), tied)
        problem = problem or format.why_not(linear.weight.detach())
        if problem is None:
            fitting[name] = linear
        else:
            reasons.append(f"{name!r}: {problem}")
    _refuse_lone_layer(model, fitting, "pack_")
    if not fitting:
        shown = "; ".join(reasons[:REASONS_SHOWN]) or "the model has no nn.Linear"
        raise ValueError(
            f"pack_ needs a layer that fits {format}, got none ({shown}): "
            "prune the model first, or name another format"
        )
    return fitting


def _refuse_lone_layer(model: nn.Module, found: Mapping[str, nn.Module], verb: str) -> None:
    if "" in found:
        raise ValueError(
            f"{verb} needs a model that holds its layers, got a bare {type(model).__name__}: "
            "wrap it in nn.Sequential"
        )


def _dense_linear(layer: SparseLinear) -> nn.Module:
    weight = layer.packed.dense()
    if layer.unpacks_to is nn.Linear:
        dense: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight)
    else:
        dense = conv1d(layer.unpacks_to, weight)
    dense.bias = layer.bias
    return dense.train(layer.training)


def _dense_bytes(layer: SparseLinear) -> int:
    return layer.out_features * layer.in_features * layer.dtype.itemsize


def _size_and_error(linear: nn.Linear, layer: SparseLinear) -> tuple[int, float]:
    return layer.nbytes, weight_error(linear.weight.detach(), layer.packed)
