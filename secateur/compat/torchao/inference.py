"""`sparsify_` and `quantize_`: pack the linear layers of a model, under the old names."""

import warnings
from collections.abc import Callable, Iterator, Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from secateur.accelerate.candidates import why_not_each
from secateur.compat.torchao.configs import TWO_OF_FOUR, Config
from secateur.core.undo import all_or_nothing
from secateur.core.weights import tied_weights
from secateur.formats.linear import SparseLinear
from secateur.formats.pack import packed_linear, swap, why_not_layer
from secateur.model.plan import Plan, plan
from secateur.prune.verbs import check, prune_

Filter = Callable[[nn.Module, str], bool]
Change = Callable[[nn.Module], nn.Module]

NAMES_SHOWN = 3  # of the layers that a filter could have matched


def sparsify_(
    model: nn.Module, config: Config | Change, filter_fn: Filter | None = None
) -> nn.Module:
    """The same model, with its matching layers packed in the format that the config stands for.

    `filter_fn(module, name)` selects modules; it is not asked again inside a module that matches.
    Without it, all linear layers match except packed and tied ones and those of
    `nn.MultiheadAttention`. The config may also be a function that returns a module's replacement.

    All weights are checked before anything is changed. A layer that no kernel can run here is still
    packed, with a warning: its reference computes the right result, slower than dense.

    Cost: dense and packed weights of all matching layers at once.
    Raises:
        ValueError: naming the layer and the first weights at fault, if a weight lacks the zeros of
            the format or cannot be stored in it, or if no module matches. Nothing has changed then,
            unless a function changed modules in place.
    """
    return _apply("sparsify_", model, config, filter_fn)


def quantize_(
    model: nn.Module, config: Config | Change, filter_fn: Filter | None = None
) -> nn.Module:
    """The same model, with its matching layers packed: the same function as `sparsify_`.

    Formats that round weights, or inputs as well, expect weights that are already 2:4: nothing is
    zeroed on the way.

    Cost: as `sparsify_`.
    Raises:
        ValueError: as `sparsify_`.
    """
    return _apply("quantize_", model, config, filter_fn)


def apply_fake_sparsity(model: nn.Module, filter_fn: Filter | None = None) -> nn.Module:
    """The same model, with its matching layers 2:4 by magnitude, in ordinary dense weights.

    The same as `sc.prune_(model, "2:4")` on the layers that `sparsify_` would pack.

    Raises:
        ValueError: before anything is changed, if a layer's inputs are no multiple of 4, naming
            the layers, or if no module matches.
    """
    names = list(_chosen("apply_fake_sparsity", model, filter_fn))
    prune_(model, plan(model, TWO_OF_FOUR, layers=names))
    return model


def _apply(verb: str, model: nn.Module, config: object, filter_fn: Filter | None) -> nn.Module:
    if isinstance(config, type) or not (isinstance(config, Config) or callable(config)):
        raise ValueError(f"{verb} needs a config of secateur.compat.torchao{_advice(config)}")
    chosen = _chosen(verb, model, filter_fn)
    replaced: Mapping[str, nn.Module]
    if isinstance(config, Config):
        replaced = _packed(verb, model, config, chosen)
    else:
        replaced = _called(verb, config, chosen)
    if "" in replaced:
        raise ValueError(
            f"{verb} needs a model that holds its layers, got a bare {type(model).__name__}: "
            "wrap it in nn.Sequential"
        )
    with all_or_nothing() as undo:
        swap(model, replaced, undo)
        return model


def _advice(config: object) -> str:
    if isinstance(config, type):
        return f", got the class {config.__name__}: write {config.__name__}()"
    kind = type(config)
    if kind.__module__.partition(".")[0] == "torchao":
        return (
            f", got torchao's own {kind.__name__}: import it from there if it is sparse, else "
            "give it to torchao.quantization.quantize_, for other layers"
        )
    return f" or a function of a module, got {config!r}: semi_sparse_weight() is one"


def _chosen(verb: str, model: nn.Module, filter_fn: Filter | None) -> dict[str, nn.Module]:
    """The outermost modules that match, by the names under which the model lists them."""
    wanted = _by_default(model) if filter_fn is None else filter_fn
    names = {id(module): name for name, module in model.named_modules()}
    chosen = {names[id(module)]: module for module in _matching(model, "", wanted)}
    if not chosen:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        some = ", ".join(repr(name) for name in linears[:NAMES_SHOWN]) or "none"
        wanted_one = "that is neither packed nor tied" if filter_fn is None else "filter_fn matches"
        raise ValueError(
            f"{verb} needs a layer {wanted_one}, {type(model).__name__} has none: its linear "
            f"layers are {some}"
        )
    return chosen


def _matching(module: nn.Module, name: str, wanted: Filter) -> Iterator[nn.Module]:
    if wanted(module, name):
        yield module
        return
    for part, child in module.named_children():
        yield from _matching(child, f"{name}.{part}" if name else part, wanted)


def _by_default(model: nn.Module) -> Filter:
    """The filter for linear layers that are not tied, not packed, and run by being called."""
    tied = tied_weights(model)

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        if isinstance(module, (SparseLinear, NonDynamicallyQuantizableLinear)):
            return False
        return name not in tied

    return wanted


def _packed(
    verb: str, model: nn.Module, config: Config, chosen: Mapping[str, nn.Module]
) -> dict[str, SparseLinear]:
    """Every chosen layer, packed; the model stays as it is."""
    linears = {name: _linear(verb, name, module) for name, module in chosen.items()}
    shapes = {name: (each.out_features, each.in_features) for name, each in linears.items()}
    tied, format = tied_weights(model), config.format
    try:
        check(model, Plan(dict.fromkeys(linears, config.pattern), shapes, {}))
        for name, linear in linears.items():
            problem = why_not_layer(name, linear, tied) or format.why_not(linear.weight.detach())
            if problem is not None:
                raise ValueError(f"layer {name!r}: {problem}")
    except ValueError as error:
        raise ValueError(
            f"{verb} cannot store all {len(linears)} layers as {format}: {error} (zeros are made "
            "by apply_fake_sparsity and sc.prune_, and filter_fn leaves layers out)"
        ) from error
    packed = {name: packed_linear(name, linear, format) for name, linear in linears.items()}
    _warn_of_reference(verb, packed)
    return packed


def _linear(verb: str, name: str, module: nn.Module) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise ValueError(
            f"{verb} needs an nn.Linear, {name!r} is a {type(module).__name__}: squash its mask or "
            "unpack it, or leave it out with filter_fn"
        )
    return module


def _called(verb: str, change: Change, chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The replacements that the function makes, without modules that it returns themselves."""
    made = {name: change(module) for name, module in chosen.items()}
    for name, new in made.items():
        if not isinstance(new, nn.Module):
            raise ValueError(
                f"{verb} needs a function that returns a module, got {type(new).__name__} for "
                f"{name!r}: return the module that takes its place"
            )
    return {name: new for name, new in made.items() if new is not chosen[name]}


def _warn_of_reference(verb: str, packed: Mapping[str, SparseLinear]) -> None:
    slow = [layer for layer in packed.values() if "reference" in layer.dispatch]
    if not slow:
        return
    first = slow[0]
    reasons = [problem for problem in why_not_each(first, 1).values() if problem is not None]
    why = "; ".join(dict.fromkeys(reasons)) or f"it runs {first.dispatch}"
    warnings.warn(
        f"{verb}: {len(slow)} of {len(packed)} layers run {first.format} by its reference here, "
        f"right but slower than dense, first {first.name!r} ({why}). sc.accelerate_ measures "
        "every layer on this machine and packs only where that is faster",
        UserWarning,
        stacklevel=5,  # where sparsify_ or quantize_ was called
    )
