"""Layers by name, and a layer's weight as a matrix whose rows are outputs and columns inputs.

Every algorithm here sees `[out, in]` matrices; this file knows how Linear, Conv2d, Embedding and
GPT-2's transposed Conv1D store them, and how an input becomes rows that match the columns; a layer
for each expert of a stack comes from `experts`.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from secateur.core.conv1d import is_conv1d
from secateur.core.weights import (
    DTYPES,
    adapters,
    require_module,
    require_ordinary,
    tied_weights,
)
from secateur.core.wrappers import base_name, unwrapped
from secateur.model.attention import outputs_of_attention, projections_of
from secateur.model.einsum import heads_of
from secateur.model.experts import experts_of
from secateur.model.piece import Piece, is_expert, owner_name, parameter_name
from secateur.model.recurrent import gates_of
from secateur.patterns import Pattern

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Convolutions that have no matrix here; they are skipped with a reason.
OTHER_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d, *TRANSPOSED)

# Sizes of the inputs on which a linear layer's own forward is tried. Of the largest output it may
# differ by two roundings of its dtype, and by float32's sums in another order.
TRIED, ROUNDINGS, IN_ANOTHER_ORDER = (0.01, 1.0, 100.0), 2, 64 * torch.finfo(torch.float32).eps


def is_prunable(module: nn.Module) -> bool:
    """Whether the module's weight can be seen as an `[out, in]` matrix here."""
    return isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)) or is_conv1d(module)


def by_default(name: str, module: nn.Module) -> bool:
    """Whether the layer is of a kind that is pruned unless the user selects otherwise."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or is_conv1d(module)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module whose weight can be seen as a matrix, and each matrix inside a parameter.

    By name, in module order: a model that is one layer has the name "".
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_prunable(module):
            found[name] = module
        prefix = f"{name}." if name else ""
        found |= {f"{prefix}{inner}": piece for inner, piece in pieces_of(module).items()}
    return found


def pieces_of(module: nn.Module) -> dict[str, Piece]:
    """The matrices in the module's own parameters that are layers of their own, by name."""
    found = experts_of(module), projections_of(module), gates_of(module), heads_of(module)
    return {name: piece for pieces in found for name, piece in pieces.items()}


def weight_of(module: nn.Module) -> nn.Parameter:
    """The module's weight; `weights_of` has made sure that it is an ordinary parameter."""
    if isinstance(module, Piece):
        return module.current()
    parameter = module._parameters["weight"]
    assert parameter is not None
    return parameter


def parameter_of(module: nn.Module) -> nn.Parameter:
    """The parameter that holds the module's weight, alone or among others."""
    return module.parameter if isinstance(module, Piece) else weight_of(module)


def parameters_of(layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that hold the layers' weights, by name: one for all that it holds."""
    return {parameter_name(name, module): parameter_of(module) for name, module in layers.items()}


def weight_in(module: nn.Module, whole: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The place of the module's weight in a tensor of its parameter's shape, a view."""
    return module.piece_of(whole) if isinstance(module, Piece) else whole


def gradient_of(module: nn.Module) -> Shaped[Tensor, "..."] | None:
    """The gradient of the module's weight, in the memory that an optimizer reads."""
    whole = parameter_of(module).grad
    return None if whole is None else weight_in(module, whole)


def weights_of(layers: Mapping[str, nn.Module], *, written: bool = True) -> dict[str, nn.Parameter]:
    """The layers' weights, checked to be ordinary parameters with data.

    Raises:
        ValueError: if one is not, with the layer, the reason and the remedy.
    """
    require_ordinary(layers, written=written)
    return {name: weight_of(module) for name, module in layers.items()}


def matrix(
    module: nn.Module, weight: Shaped[Tensor, "..."] | None = None
) -> Shaped[Tensor, "out in"]:
    """The module's weight (or another tensor of its shape) as `[out, in]`; a view where possible.

    A Conv2d's columns run over its input channels first, position by position, so that N:M groups
    lie along the input channels as hardware wants them. An Embedding's rows are its entries.
    """
    own = module.current() if isinstance(module, Piece) else module.weight
    tensor = weight if weight is not None else own
    assert isinstance(tensor, Tensor)
    if isinstance(module, nn.Conv2d):
        tensor = tensor.permute(0, 2, 3, 1).flatten(1)
    return tensor.mT if is_conv1d(module) else tensor


def from_matrix(module: nn.Module, rows: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "..."]:
    """An `[out, in]` matrix in the shape that the module stores: the inverse of `matrix`."""
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        stored: Tensor = rows.unflatten(1, (height, width, -1)).permute(0, 3, 1, 2)
        return stored.contiguous()
    return rows.mT if is_conv1d(module) else rows


def input_rows(module: nn.Module, x: Float[Tensor, "..."]) -> Float[Tensor, "tokens in"]:
    """The module's input as rows that its matrix multiplies: `matrix @ row` is an output."""
    if isinstance(module, nn.Conv2d):
        x = x if x.dim() == 4 else x[None]
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        columns = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
        # unfold orders channel, then position; `matrix` orders position, then channel.
        by_position: Tensor = columns.unflatten(1, (module.in_channels, -1)).transpose(1, 2)
        return by_position.flatten(1, 2).transpose(1, 2).flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


def rows_key(module: nn.Module) -> Hashable:
    """A key that is equal for modules which make the same `input_rows` of the same input."""
    if not isinstance(module, nn.Conv2d):
        return None
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    sizes = (module.kernel_size, module.stride, module.dilation)
    return (*sizes, padding, module.padding_mode)


def pattern_for(module: nn.Module, pattern: Pattern) -> Pattern:
    """The pattern for the module's matrix: N:M groups start again at each position of a kernel."""
    return pattern.on_kernel(module.weight.shape[1]) if isinstance(module, nn.Conv2d) else pattern


def why_not_prunable(module: nn.Module) -> str | None:
    """Why this module is skipped by default although it has a weight, or None."""
    if _is_scripted(module):
        return "a ScriptModule, which cannot be changed: use the module that it was made of"
    weight = module._parameters.get("weight")
    if weight is not None and not is_lazy(weight) and not weight.numel():
        return "its weight is empty"
    if isinstance(module, OTHER_CONVOLUTIONS):
        transposed = isinstance(module, TRANSPOSED)
        kind = "transposed convolution" if transposed else type(module).__name__
        return f"{kind}: of convolutions only Conv2d can be pruned"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        kind = "depthwise" if module.groups == module.in_channels else "grouped"
        return f"{kind} convolution: its groups do not share inputs"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(module, Piece):
        return None
    if isinstance(module, nn.Linear) and not _multiplies(module):
        return f"{type(module).__name__} computes something else than x @ weight.T"
    return None


def _multiplies(module: nn.Linear) -> bool:
    """Whether a linear layer computes x W^T + b; a forward of its own is tried on small numbers."""
    if type(module).forward is nn.Linear.forward:
        return True
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    others = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if others or weight is None or is_lazy(weight) or weight.is_meta or weight.dtype not in DTYPES:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        len(TRIED), weight.shape[1], generator=generator, dtype=torch.float32, device="cpu"
    )
    x = (x * torch.tensor(TRIED, dtype=torch.float32, device="cpu")[:, None]).to(weight)
    with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        try:
            found = type(module).forward(module, x)
        except Exception:  # whatever a forward that wants something else raises
            return False
        expected = F.linear(x, weight, bias)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    off, most = ((found - expected).abs().amax(1), expected.abs().amax(1))
    near = ROUNDINGS * torch.finfo(weight.dtype).eps + IN_ANOTHER_ORDER
    return bool((off <= near * most).all())


@dataclass(frozen=True)
class Selection:
    """The layers that selectors chose, by name and in module order, and why others were skipped."""

    layers: Mapping[str, nn.Module]
    matched_by: Mapping[str, int]
    skipped: Mapping[str, str]


def select(
    model: nn.Module,
    selectors: Selector | Sequence[Selector] | None = None,
    ignore: Selector | Iterable[Selector] = (),
) -> Selection:
    """The prunable layers that the selectors choose, minus `ignore`; the first match wins.

    A selector is a full name, a glob (`*.mlp.*`), a regular expression after `re:`, a module type
    or a callable `(name, module) -> bool`. `None` means every Linear, Conv2d, Conv1D
    of GPT-2, expert's matrix (`experts.down_proj.3`), and matrix of attention and recurrent modules
    (`self_attn.in_proj_weight.q`, `lstm.weight_hh_l0`). A name or glob may be the weight's,
    `blocks.0.up_proj.weight`. Names are without the wrappers of `torch.compile`, `DataParallel` and
    `DistributedDataParallel`, and may be without PEFT's: `*.q_proj` is the layer under an adapter
    that PEFT calls `base_model.model.*.q_proj.base_layer`. The output head and the weights of
    adapters (PEFT's, of every method) are skipped, with the reason, unless named in full. So are
    weights that share memory with another and convolutions that cannot be pruned; naming one is an
    error.

    Raises:
        ValueError: if the model is no ordinary module, a selector or an ignore matches nothing
            (with the closest names) or names a layer whose weight cannot be pruned, or no layer is
            left.
    """
    selection = select_any(model, selectors, ignore)
    if not selection.layers:
        raise ValueError(
            f"no layer is left to prune in {type(model).__name__}: {_why_none(selection.skipped)}"
        )
    return selection


def select_any(
    model: nn.Module,
    selectors: Selector | Sequence[Selector] | None = None,
    ignore: Selector | Iterable[Selector] = (),
) -> Selection:
    """What `select` returns, even if no layer is left.

    Raises:
        ValueError: as `select`, except for that.
    """
    require_module(model)
    model = unwrapped(model)
    others = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OTHER_CONVOLUTIONS) or _is_scripted(module)
    }
    modules = _in_order(model, layers_of(model) | others)
    plain = {name: base_name(model, name) for name in modules}  # None for an adapter's
    default: list[Selector] = [by_default, *OTHER_CONVOLUTIONS, torch.jit.ScriptModule]
    chosen = default if selectors is None else _listed(selectors)
    ignored = _listed(ignore)
    if selectors is not None:
        for selector in chosen:
            _require_match(model, modules, plain, selector)
    for selector in ignored:
        _require_match(model, modules, plain, selector)

    shared, called = tied_weights(model), outputs_of_attention(model)
    optional = dict.fromkeys(_output_heads(model), "output head") | adapters(model)
    layers: dict[str, nn.Module] = {}
    matched_by: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        names = _names_of(name, plain[name], module)
        index = next((i for i, s in enumerate(chosen) if _matches(s, names, module)), None)
        if index is None:
            continue
        named = _names(chosen[index], names)
        if any(_matches(selector, names, module) for selector in ignored):
            skipped[name] = "ignored"
        elif module not in called and (reason := why_not_prunable(module)):
            if named:
                raise ValueError(f"{name} cannot be pruned: {reason}")
            skipped[name] = reason
        elif other := shared.get(_holder(name, module)):
            if named:
                raise ValueError(
                    f"{name} cannot be pruned: its weight is tied to {other}, which would "
                    "be pruned with it: untie them first, layer.weight = "
                    "torch.nn.Parameter(layer.weight.detach().clone())"
                )
            skipped[name] = f"its weight is tied to {other}"
        elif name in optional and not named:
            skipped[name] = f"{optional[name]}: name it to prune it"
        else:
            layers[name], matched_by[name] = module, index
    return Selection(layers, matched_by, skipped)


def _holder(name: str, module: nn.Module) -> str:
    """What holds the layer's weight: the layer, or another module's parameter."""
    return parameter_name(name, module) if isinstance(module, Piece) else name


def _in_order(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers in module order, those inside a parameter where the module stands that has it."""
    places = {name: i for i, (name, _) in enumerate(model.named_modules())}

    def place(name: str) -> int:
        return places[owner_name(name, found[name])]

    return {name: found[name] for name in sorted(found, key=place)}


def _listed(selectors: Selector | Iterable[Selector]) -> list[Selector]:
    """The selectors as a list, one selector as a list of one."""
    if isinstance(selectors, (str, type)) or callable(selectors):
        return [selectors]
    return list(selectors)


def _names_of(name: str, plain: str | None, module: nn.Module) -> list[str]:
    """What a layer may be called: its name in the model, and that without PEFT's wrappers.

    Every matrix of a recurrent module goes by that module's name, too.
    """
    names = [name] if plain is None or plain == name else [name, plain]
    if isinstance(module, Piece) and gates_of(module.owner):
        names += [owner_name(each, module) for each in names]
    return names


def _matches(selector: Selector, names: Sequence[str], module: nn.Module) -> bool:
    if isinstance(selector, type):
        inside = isinstance(module, Piece) and not is_expert(module)
        return isinstance(module.owner if inside else module, selector)
    if callable(selector):
        return bool(selector(names[0], module))
    if selector.startswith("re:"):
        return any(re.search(selector[3:], name) for name in names)
    if _names(selector, names) or any(fnmatch.fnmatchcase(name, selector) for name in names):
        return True
    return selector.endswith(".weight") and any(
        fnmatch.fnmatchcase(f"{name}.weight", selector) for name in names
    )


def _names(selector: Selector, names: Sequence[str]) -> bool:
    """Whether the selector is the full name of the layer, or of its weight."""
    return any(selector in (name, f"{name}.weight" if name else "weight") for name in names)


def _require_match(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    plain: Mapping[str, str | None],
    selector: Selector,
) -> None:
    if any(_matches(selector, _names_of(n, plain[n], m), m) for n, m in modules.items()):
        return
    if isinstance(selector, str):
        if isinstance(other := dict(model.named_modules()).get(selector), nn.Module):
            inside = any(name.startswith(f"{selector}.") for name in modules)
            remedy = (
                f"to choose the layers inside it write '{selector}.*'"
                if inside
                else ("leave it out, it holds no layer that can be pruned")
            )
            raise ValueError(
                f"{selector!r} is a {type(other).__name__}, which has no weight matrix to prune: "
                f"{remedy}"
            )
        raise ValueError(_no_match(selector, modules))
    raise ValueError(f"no prunable layer of {type(model).__name__} matches {selector!r}")


def _no_match(selector: str, modules: Mapping[str, nn.Module]) -> str:
    if (corrected := _corrected(selector, modules)) is not None:
        return f"No module matches {selector!r}. Did you mean {corrected!r}?"
    close = difflib.get_close_matches(selector, modules, n=3, cutoff=0.5) or list(modules)[:3]
    names = ", ".join(repr(name) for name in close) or "none: the model has no prunable layer"
    return (
        f"No module matches {selector!r}. Closest: {names}. Patterns starting with 're:' are "
        "regular expressions."
    )


def _corrected(selector: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The glob or regular expression with one unknown word replaced, so that it matches a layer.

    None for a full name, and if no replacement makes it match.
    """
    if not re.search(r"[*?\[]|^re:", selector):
        return None
    known = dict.fromkeys(word for name in modules for word in re.findall(r"\w+", name))
    for word in re.findall(r"\w+", selector.removeprefix("re:")):
        for close in difflib.get_close_matches(word, known, n=3) if word not in known else ():
            corrected = re.sub(rf"\b{word}\b", close, selector)
            if any(_matches(corrected, (name,), module) for name, module in modules.items()):
                return corrected
    return None


def _why_none(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return "it has no Linear, Conv2d or Conv1D of GPT-2 that was selected"
    return "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:3])


def _output_heads(model: nn.Module) -> set[str]:
    """The projection to the vocabulary, found by its usual names, even inside a PEFT adapter."""
    return {
        name
        for name, _ in model.named_modules()
        if name.removesuffix(".base_layer").split(".")[-1] in ("lm_head", "embed_out")
    }


def _is_scripted(module: nn.Module) -> bool:
    """Whether the module is a TorchScript layer with a matrix for its weight; its type is lost."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].dim() > 1
