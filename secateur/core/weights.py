"""Whether a weight is an ordinary parameter with data, the model's own, and the remedy if not.

Both halves ask here before they read or write a weight.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from secateur.core.wrappers import base_name, under_adapter

# The dtypes in which weights are pruned and trained: others lose small steps and sums.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_module(model: object, *, changed: bool = True) -> None:
    """Raise unless this is a module, and one whose layers can be changed if they will be.

    Raises:
        ValueError: if it is something else, or a ScriptModule that would be changed.
    """
    if changed and isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"a model needs to be an ordinary nn.Module, {type(model).__name__} is TorchScript, "
            "whose layers cannot be changed: use the module that it was made of, and script that "
            "afterwards"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(f"a model needs to be an nn.Module, got {type(model).__name__}: load it")


# --- ordinary ------------------------------------------------------------------------------------


def why_computed(module: nn.Module, name: str = "weight") -> str | None:
    """What computes the tensor of this name, and how to make it a parameter; None for parameters.

    A tensor that the module does not have counts as a parameter. The reason continues a sentence
    that begins with the tensor's name.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return (
                "has a mask of torch.nn.utils.prune attached: make it permanent with "
                f"torch.nn.utils.prune.remove(layer, {name!r})"
            )
        if isinstance(hook, WeightNorm) and hook.name == name:
            return (
                "is computed by weight_norm: make it a parameter with "
                f"torch.nn.utils.remove_weight_norm(layer, {name!r})"
            )
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return (
                "is computed by spectral_norm: make it a parameter with "
                f"torch.nn.utils.remove_spectral_norm(layer, {name!r})"
            )
    if parametrize.is_parametrized(module, name):
        return (
            "is computed by a parametrization: make it a parameter with "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        )
    if name in module._parameters or not hasattr(module, name):
        return None
    if hasattr(module, "packed"):
        return "is packed: unpack_(model) first"
    return (
        f"is no parameter of its own, {type(module).__name__} computes it: make it one, "
        f"layer.{name} = torch.nn.Parameter(...)"
    )


def names_of_computed(module: nn.Module) -> list[str]:
    """The names of the module's tensors that a mask or a parametrization computes."""
    kinds = (BasePruningMethod, WeightNorm, SpectralNorm)
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]
    masked = [h._tensor_name if isinstance(h, BasePruningMethod) else h.name for h in hooks]
    parametrized = getattr(module, "parametrizations", None)
    made = list(parametrized) if isinstance(parametrized, nn.ModuleDict) else []
    return list(dict.fromkeys([*masked, *made]))


def why_no_data(module: nn.Module, name: str = "weight") -> str | None:
    """Why the module has no dense weight of its own to read, and the remedy; None if it has one.

    The reason continues a sentence that begins with the weight's name.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "belongs to a ScriptModule: use the module that it was made of"
    if reason := why_computed(module, name):
        return reason
    weight = module._parameters.get(name)
    if weight is None:
        return f"is missing from this {type(module).__name__}: leave the layer out"
    if is_lazy(weight):
        return f"has no shape yet in this {type(module).__name__}: run the model once on a batch"
    if weight.is_meta and hasattr(module, "_hf_hook"):
        return (
            "has no data (meta device), accelerate has offloaded it: load the model without "
            "offloading, or take its hooks off with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    if weight.is_meta:
        return "has no data (meta device): load the weights first"
    if weight.layout is not torch.strided:
        return (
            f"is stored as {weight.layout}: make it dense, "
            f"layer.{name} = torch.nn.Parameter(layer.{name}.to_dense())"
        )
    return None


def why_not_ordinary(
    module: nn.Module, name: str = "weight", *, written: bool = True
) -> str | None:
    """Why the module's weight is not an ordinary parameter with data, and the remedy; or None.

    The reason continues a sentence that begins with the weight's name. A weight that is only read
    may be an inference tensor.
    """
    if reason := why_no_data(module, name):
        return reason
    weight = module._parameters[name]
    assert weight is not None
    if weight.dtype not in DTYPES:
        return f"is {_short(weight.dtype)}: {_remedy_for_dtype(weight, name)}"
    if written and weight.is_inference():
        return (
            "was made in torch.inference_mode, outside of which it cannot be changed: go on with a "
            "copy.deepcopy(model) that is made outside"
        )
    if written and _shares_elements(weight):
        return (
            f"has elements that share memory (strides {tuple(weight.stride())}, as expand makes "
            f"them): give it its own, layer.{name} = torch.nn.Parameter(layer.{name}.contiguous())"
        )
    return None


def require_ordinary(layers: Mapping[str, nn.Module], *, written: bool = True) -> None:
    """Raise unless the weights of these layers are ordinary parameters with data.

    Raises:
        ValueError: if one is not, with its name, the reason and the remedy.
    """
    for name, module in layers.items():
        if reason := why_not_ordinary(module, written=written):
            raise ValueError(f"{name}.weight {reason}")


def require_data(layers: Mapping[str, nn.Module]) -> None:
    """Raise unless every layer has a weight of its own to read, of whatever kind.

    Raises:
        ValueError: if one has none, with its name, the reason and the remedy.
    """
    for name, module in layers.items():
        if reason := why_no_data(module):
            raise ValueError(f"{name}.weight {reason}")


def _remedy_for_dtype(weight: Tensor, name: str) -> str:
    if weight.is_complex():
        return "complex weights have no pattern here, leave the layer out"
    if weight.is_floating_point():
        return (
            f"cast it to bfloat16 or a wider dtype, layer.{name} = "
            f"torch.nn.Parameter(layer.{name}.to(torch.bfloat16)), and quantise it afterwards"
        )
    return "leave the layer out, or prune the floating-point model that it was quantised from"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shares_elements(tensor: Tensor) -> bool:
    """Whether two positions of the tensor are, or may be, one element in memory.

    In ascending order, each stride has to step over everything that the smaller ones reach.
    """
    reached = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel():
            if stride < reached:
                return True
            reached += (size - 1) * stride
    return False


# --- adapters ------------------------------------------------------------------------------------

MODULES_TO_SAVE = "modules_to_save"  # PEFT's name for the copies, in its configs too
DORMANT = "the adapter's copy in modules_to_save runs in its place"


def adapters(model: nn.Module) -> dict[str, str]:
    """The modules that belong to an adapter and not to the adapted model, and what they are.

    They are all that a module of PEFT's holds but for what it adapts, whatever the method. Where
    that is a full copy of a module, the copy runs and the original is dormant.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        base = under_adapter(module)
        for child in module._modules if base is not None else ():
            if child != base:
                what = f"an adapter's weight ({child})"
                found |= dict.fromkeys(_inside(module, name, child), what)
            elif MODULES_TO_SAVE in module._modules:
                found |= dict.fromkeys(_inside(module, name, child), DORMANT)
        if is_adapters(model, name):  # also what is named so without PEFT
            found.setdefault(name, "an adapter's weight (LoRA)")
    return found


def is_adapters(model: nn.Module, name: str) -> bool:
    """Whether the module or parameter of this name belongs to an adapter."""
    plain = base_name(model, name)
    return plain is None or any(part.startswith("lora_") for part in plain.split("."))


def _inside(module: nn.Module, prefix: str, child: str) -> Iterator[str]:
    """The names of the module's child and all that is in it."""
    if isinstance(inner := getattr(module, child, None), nn.Module):
        for name, _ in inner.named_modules(prefix=f"{prefix}.{child}" if prefix else child):
            yield name


# --- shared storage ------------------------------------------------------------------------------


def tied_weights(model: nn.Module) -> dict[str, str]:
    """The weights that share memory with another parameter of the model, and with which.

    Two modules with one parameter are tied, and so are overlapping views of one storage, such as
    `weight` and `weight.T`, whoever holds them. A weight is named by its module, another parameter
    in full.
    """
    tensors = dict(_parameters(model))
    tied: dict[str, str] = {}
    for name, other in pairs_sharing_memory(tensors):
        for one, two in ((name, other), (other, name)):
            tied.setdefault(_owner(one), _owner(two))
    return tied


def _owner(name: str) -> str:
    module, _, key = name.rpartition(".")
    return module if module and key == "weight" else name


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of every module, shared ones once for each module that holds them."""
    for prefix, module in model.named_modules():
        yield from module.named_parameters(prefix, recurse=False, remove_duplicate=False)


def pairs_sharing_memory(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of names whose tensors share an element of memory, in the given order."""
    order = {name: i for i, name in enumerate(tensors)}
    places: dict[Any, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if (found := _place(tensor)) is not None:
            memory, begin, end = found
            places.setdefault(memory, []).append((begin, end, name))
    pairs = []
    for inside in places.values():
        open_: list[tuple[int, int, str]] = []
        for begin, end, name in sorted(inside):
            open_ = [before for before in open_ if before[1] > begin]
            for _, _, other in open_:
                if _share_an_element(tensors[other], tensors[name]):
                    pairs.append((other, name))
            open_.append((begin, end, name))
    in_order = [pair if order[pair[0]] < order[pair[1]] else pair[::-1] for pair in pairs]
    yield from sorted(in_order, key=lambda pair: (order[pair[0]], order[pair[1]]))


def _place(tensor: Tensor) -> tuple[Any, int, int] | None:
    """The memory that a tensor lies in, its first byte there, and the byte after its last.

    A tensor without an address, as on the meta device, lies in its storage; one without a storage,
    such as a sparse tensor, is a place of its own. None for an empty tensor.
    """
    if is_lazy(tensor) or not tensor.numel():
        return None
    try:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
    except (NotImplementedError, RuntimeError):
        return id(tensor), 0, 1
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = address + int(tensor.storage_offset()) * tensor.itemsize
    memory: Any = tensor.device if address else storage._cdata
    return memory, begin, begin + (int(reach) + 1) * tensor.itemsize


def _share_an_element(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors share an element; the second begins within the memory of the first.

    Two slices of a matrix's columns share none, although their memory interleaves.
    """
    place, other = _place(one), _place(two)
    assert place is not None and other is not None
    (_, first, end), (_, begin, until) = place, other
    size = one.itemsize
    if begin == first or one.is_contiguous() or two.itemsize != size or (begin - first) % size:
        return True
    seen = torch.zeros((max(end, until) - first) // size, dtype=torch.bool, device="cpu")
    seen.as_strided(one.shape, one.stride()).fill_(True)
    return bool(seen.as_strided(two.shape, two.stride(), (begin - first) // size).any())
