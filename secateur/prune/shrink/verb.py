"""`shrink_`: a model with fewer heads, hidden units, experts or blocks."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.core.stacks import DOWN
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.wrappers import unwrapped
from secateur.criteria import magnitude, wanda
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.calibrate import as_list
from secateur.model.experts import expert_by_expert, experts_of, experts_run_by
from secateur.model.gradients import Loss
from secateur.model.outputs import answer, eval_mode, on_device
from secateur.model.plan import plan as planned
from secateur.model.trace import without_padding
from secateur.patterns import Pattern
from secateur.patterns.keep import count_zeros, keep_top
from secateur.prune.channels import Followed, Removed, follow, remove_, with_tensors
from secateur.prune.channels.trace import first_names, named_states
from secateur.prune.passes import pass_over_, reconstruction
from secateur.prune.preconditions import require_sound
from secateur.prune.shrink.blocks import chain_of, drop_blocks_, influence
from secateur.prune.shrink.columns import Columns
from secateur.prune.shrink.config import (
    Entry,
    Sizes,
    as_made_anew_,
    config_of,
    fitting,
    no_config,
    set_config_,
    shapes_of,
)
from secateur.prune.shrink.dimensions import (
    HEADS,
    WIDTH,
    Dimension,
    choose_together,
    choose_within,
    find_dimensions,
    kept_columns,
    removed_units,
    unit_scores,
)
from secateur.prune.shrink.experts import (
    drop_experts_,
    drop_units_,
    inner_width,
    mixtures_of,
    saliency,
    size_of,
)
from secateur.prune.shrink.report import ShrinkReport, Shrunk
from secateur.reconstruct.refit import refit as refitting

EXPERTS, BLOCKS = "experts", "blocks"

# How many different reasons a message gives for what cannot go.
REASONS = 3


@torch.inference_mode(False)
def shrink_(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    width: float = 0.0,
    heads: float = 0.0,
    experts: float = 0.0,
    blocks: float = 0.0,
    criterion: Callable[..., Tensor] = wanda,
    scope: Literal["layer", "model"] = "layer",
    refit: bool = True,
    loss: Loss | None = None,
) -> ShrinkReport:
    """Remove the hidden units, heads, experts and blocks that matter least, so that shapes shrink.

    Each number is the share that goes: `width` of the hidden units of an MLP (or channels of a
    convolution), `heads` of attention's heads, with grouped queries a head of keys and values with
    its queries; `experts` of each mixture, `blocks` of the chain of blocks. From each
    expert in a stack `width` takes units of its own, as many from all. What goes is chosen by
    the scores that the `criterion` gives the weights that read it; experts by the mean norm of what
    they add to their tokens (REAP), blocks by how little they turn what passes through (ShortGPT).
    With `refit`, layers that read what goes are refitted on what is left.

    With `scope="layer"` the share holds in every layer. With `"model"` all units of a kind compete,
    each layer's scores divided by their mean, and layers end up of different widths: transformers'
    configs have one number for all, so this is for other models.

    The channels that go together are found in the model's graph, and the smaller model is proved
    against it (`secateur.prune.channels`). A model of transformers gets its config rewritten: the
    entries are found by trial, and its class, made anew from them, has to return the same for the
    first batch. What no entry can say, such as fewer heads of GPT-2, is refused. Parameters remain
    the same objects; an optimizer's state is of the old shapes.

    Cost: an export of the model, two where channels go; two passes over the batches, and one with
        Gram matrices for `refit`. Memory: a copy of what is made smaller.
    Raises:
        ValueError: if a share is not in [0, 1), nothing is asked for or can be found, none would be
            left, or no config says what is left. Whatever is raised, also by Ctrl-C, the model is
            left as it was.
    Source: experts, arXiv:2510.13999; blocks, arXiv:2403.03853; scores of the weights that read a
        channel, FLAP, An et al. 2024, arXiv:2312.11983, with `wanda` in place of its fluctuation.
    """
    shares = {WIDTH: width, HEADS: heads, EXPERTS: experts, BLOCKS: blocks}
    _require_shares(shares, scope)
    model, listed = unwrapped(model), as_list(batches)
    with all_or_nothing() as undo:
        work = Work(model, [on_device(batch, model) for batch in listed], undo)
        return _shrink(work, shares, criterion, scope == "model", refit, loss)


@dataclass
class Work:
    """A model that is getting smaller, and what has been removed so far."""

    model: nn.Module
    batches: list[Batch]
    undo: Undo
    removed: list[Shrunk] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def configs(
        self, sizes: Sizes, shapes: Mapping[str, torch.Size], what: str
    ) -> Iterator[Mapping[Entry, Any] | None]:
        """The changes of the config that fit these shapes, or one None if the model has no config.

        Raises:
            ValueError: if none fit.
        """
        if config_of(self.model) is None:
            return iter([None])
        fits = fitting(self.model, sizes, shapes)
        refusals = list[str]()
        for fit in fits:
            if fit.refusal is None:
                others = (other.changed for other in fits if other.refusal is None)
                return itertools.chain([fit.changed], others)
            refusals.append(fit.refusal)
        raise ValueError(no_config(self.model, sizes, what, next(iter(refusals), None)))

    def settle_(
        self,
        configs: Iterator[Mapping[Entry, Any] | None],
        what: str,
        change_: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the change, with the first of these configs from which the model can be made anew.

        Several may fit, as where a head is as wide as there are heads.
        """
        error: ValueError | None = None
        for changed in configs:
            put_back = with_tensors(self.model)
            try:
                entries = {} if changed is None else set_config_(self.model, changed)
                change_()
                if changed is not None:
                    as_made_anew_(self.model, self.batches[0], what)
            except ValueError as found:
                put_back()
                error = found
                continue
            self.config |= entries
            return
        assert error is not None
        raise error


def _shrink(
    work: Work,
    shares: Mapping[str, float],
    criterion: Callable[..., Tensor],
    together: bool,
    refit: bool,
    loss: Loss | None,
) -> ShrinkReport:
    begin = time.perf_counter()
    model = work.model
    before, flops_before = _parameters(model), _flops(model, work.batches[0])
    work.undo.call(with_tensors(model))
    if shares[BLOCKS]:
        _remove_blocks_(work, shares[BLOCKS])
    if shares[EXPERTS]:
        _remove_experts_(work, shares[EXPERTS])
    if shares[WIDTH]:
        _remove_units_of_experts_(work, shares[WIDTH], criterion, refit, loss)
    if shares[WIDTH] or shares[HEADS]:
        _remove_units_(work, shares, criterion, together, refit, loss)
    return ShrinkReport(
        f"shrink({', '.join(f'{kind} {share:g}' for kind, share in shares.items() if share)})",
        tuple(work.removed),
        work.left,
        work.config,
        before,
        _parameters(model),
        flops_before,
        _flops(model, work.batches[0]),
        time.perf_counter() - begin,
    )


# --- blocks and experts ---------------------------------------------------------------------------


def _remove_blocks_(work: Work, share: float) -> None:
    name, chain = chain_of(work.model)
    parts = [part.batch for part in without_padding(work.model, work.batches)]
    influences = list(influence(work.model, chain, parts).values())
    score = torch.tensor(influences, dtype=torch.float64, device="cpu")
    keep = _kept(score, share, name, BLOCKS)
    gone = (~keep).nonzero().flatten().tolist()
    drop_blocks_(work.model, name, gone)
    work.removed.append(_shrunk(BLOCKS, name, score, keep))
    sizes = Sizes([(len(chain), len(chain) - len(gone))], gone=gone, blocks=len(chain))
    work.settle_(work.configs(sizes, shapes_of(work.model), BLOCKS), BLOCKS)


def _remove_experts_(work: Work, share: float) -> None:
    mixtures = mixtures_of(work.model)
    parts = [part.batch for part in without_padding(work.model, work.batches)]
    scores, of_a_token = saliency(work.model, mixtures, parts)
    groups = getattr(config_of(work.model), "n_group", None) or 1
    changes = list[tuple[int, int]]()
    for name, score in scores.items():
        by_group = score.view(groups, -1)
        keep = torch.cat([_kept(part, share, name, EXPERTS) for part in by_group])
        if (left := int(keep.sum())) < of_a_token:
            raise ValueError(
                f"{name} sends each token to {of_a_token} experts, {left} of {len(score)} would be "
                "left: lower experts"
            )
        drop_experts_(work.model, name, keep.nonzero().flatten())
        work.removed.append(_shrunk(EXPERTS, name, score, keep))
        changes.append((len(score), left))
    sizes = Sizes(list(dict.fromkeys(changes)))
    work.settle_(work.configs(sizes, shapes_of(work.model), EXPERTS), EXPERTS)


def _remove_units_of_experts_(
    work: Work, share: float, criterion: Callable[..., Tensor], refit: bool, loss: Loss | None
) -> None:
    """Remove the share of every expert's hidden units, each expert's own; or say why they stay."""
    model = work.model
    mixtures = {n: m for n, m in model.named_modules() if experts_of(m)}
    dimensions = [
        Dimension(WIDTH, units, {f"{name}.{DOWN}.{i}": units}, 1)
        for name, mixture in mixtures.items()
        for units in [np.arange(inner_width(mixture))]
        for i in range(size_of(mixture))
    ]
    if not dimensions:
        return
    modules = _layers.layers_of(model)
    readers = {d.name: modules[d.name] for d in dimensions}
    require_sound(readers)
    totals = unit_scores(model, dimensions, criterion, work.batches, loss)
    kept = [choose_within(d, total, share) for d, total in zip(dimensions, totals, strict=True)]
    left = iter(kept)
    ids = {
        name: torch.stack([next(left).nonzero().flatten() for _ in range(size_of(mixture))])
        for name, mixture in mixtures.items()
    }

    def take_out_() -> None:
        for name, mixture in mixtures.items():
            drop_units_(mixture, ids[name])

    put_back = with_tensors(model)
    take_out_()
    shapes = shapes_of(model)
    put_back()
    try:
        configs = work.configs(_sizes(dimensions, kept, together=False), shapes, WIDTH)
    except ValueError as error:
        work.left |= dict.fromkeys(mixtures, str(error))
        return
    if refit:
        _refit_(work, {d.name: keep for d, keep in zip(dimensions, kept, strict=True)})
        work.undo.call(with_tensors(model))
    try:
        work.settle_(configs, WIDTH, take_out_)
    except ValueError as error:
        units = int(kept[0].sum())
        raise ValueError(
            f"experts of {units} hidden units cannot be run here: {error}; choose a width that "
            "leaves a multiple of 16"
        ) from error
    work.removed += [
        _shrunk(WIDTH, dimension.name, total, keep)
        for dimension, total, keep in zip(dimensions, totals, kept, strict=True)
    ]


# --- channels -------------------------------------------------------------------------------------


def _remove_units_(
    work: Work,
    shares: Mapping[str, float],
    criterion: Callable[..., Tensor],
    together: bool,
    refit: bool,
    loss: Loss | None,
) -> None:
    model, undo = work.model, work.undo
    followed = follow(model, work.batches[0])
    found, left = find_dimensions(model, followed)
    dimensions = [dimension for dimension in found if shares[dimension.kind]]
    for kind in (WIDTH, HEADS):
        done = any(kind == one.kind for one in work.removed)  # in experts
        if shares[kind] and not done and not any(dimension.kind == kind for dimension in found):
            left |= work.left
            first = {why: name for name, why in reversed(left.items())}
            reasons = "; ".join(f"{name}: {why}" for why, name in list(first.items())[:REASONS])
            raise ValueError(
                f"no {kind} of this {type(model).__name__} can go: {reasons}: leave {kind} at 0"
            )
    work.left |= left
    if not dimensions:
        return
    modules = _layers.layers_of(model)
    readers = {name: modules[name] for dimension in dimensions for name in dimension.readers}
    require_sound(readers)
    totals = unit_scores(model, dimensions, criterion, work.batches, loss)
    kept = _choose(dimensions, totals, shares, together)
    removed = removed_units(followed.channels, dimensions, kept)
    sizes = _sizes(dimensions, kept, together)
    what = " and ".join(kind for kind in (WIDTH, HEADS) if shares[kind])
    configs = work.configs(sizes, _shapes_left(model, followed, removed), what)
    if refit:
        _refit_(work, _masks_of(dimensions, readers, removed))
        undo.call(with_tensors(model))
    work.settle_(configs, what, lambda: _take_out_(model, followed, removed, what))
    work.removed += [
        _shrunk(dimension.kind, dimension.name, total, keep)
        for dimension, total, keep in zip(dimensions, totals, kept, strict=True)
    ]


def _choose(
    dimensions: Sequence[Dimension],
    totals: Sequence[Tensor],
    shares: Mapping[str, float],
    together: bool,
) -> list[Bool[Tensor, " _"]]:
    if not together:
        return [
            choose_within(dimension, total, shares[dimension.kind])
            for dimension, total in zip(dimensions, totals, strict=True)
        ]
    kept: dict[int, Tensor] = {}
    for kind in (WIDTH, HEADS):
        own = [i for i, dimension in enumerate(dimensions) if dimension.kind == kind]
        if own:
            masks = choose_together([totals[i] for i in own], shares[kind])
            kept |= dict(zip(own, masks, strict=True))
    return [kept[i] for i in range(len(dimensions))]


def _masks_of(
    dimensions: Sequence[Dimension], readers: Mapping[str, nn.Module], removed: Removed
) -> dict[str, Bool[Tensor, " in"]]:
    """Of each layer that reads what goes, which of its inputs stay."""
    masks: dict[str, Tensor] = {}
    for dimension in dimensions:
        for name, ids in dimension.readers.items():
            width = _layers.matrix(readers[name]).shape[1]
            masks[name] = torch.zeros(width, dtype=torch.bool, device="cpu")
            masks[name][kept_columns(readers[name], ids, removed)] = True
    return masks


def _refit_(work: Work, masks: Mapping[str, Bool[Tensor, " in"]]) -> None:
    """Refit the layers that read what goes, each on inputs from those already done."""
    patterns = dict[_layers.Selector, Pattern | str]()
    patterns |= {name: Columns(mask) for name, mask in masks.items()}
    plan = planned(work.model, patterns)
    the_pass = reconstruction(work.model, plan, refitting(magnitude), None)
    pass_over_(the_pass, work.batches, work.undo)


@torch.no_grad()
def _take_out_(model: nn.Module, followed: Followed, removed: Removed, what: str) -> None:
    """Zero what goes where it is made, in new memory, and remove it."""
    channels, tensors = followed.channels, dict(named_states(model))
    for name, dim in channels.made_with(np.flatnonzero(removed)):
        tensor = tensors[name]
        gone = np.flatnonzero(removed[channels.states[name, dim]])
        tensor.data = tensor.data.index_fill(dim, torch.from_numpy(gone).to(tensor.device), 0)
    if held := remove_(model, followed, removed):
        raise ValueError(f"{what} cannot go: {next(iter(held.values()))}: leave {what} at 0")


def _shapes_left(model: nn.Module, followed: Followed, removed: Removed) -> dict[str, torch.Size]:
    """The shapes that parameters and buffers will have, under all their names."""
    channels, names = followed.channels, first_names(model)
    return {
        name: torch.Size(
            len(channels.kept(names[name], dim, removed))
            if (names[name], dim) in channels.states
            else size
            for dim, size in enumerate(tensor.shape)
        )
        for name, tensor in named_states(model)
    }


def _sizes(dimensions: Sequence[Dimension], kept: Sequence[Tensor], together: bool) -> Sizes:
    changes = [
        change
        for dimension, keep in zip(dimensions, kept, strict=True)
        for change in dimension.sizes(int((~keep).sum()))
    ]
    head = next((dimension.head for dimension in dimensions if dimension.kind == HEADS), None)
    return Sizes(list(dict.fromkeys(changes)), head=head, uniform=not together)


# --- counts ---------------------------------------------------------------------------------------


def _kept(score: Tensor, share: float, name: str, kind: str) -> Bool[Tensor, " n"]:
    going = count_zeros(share, len(score))
    if going >= len(score):
        raise ValueError(
            f"{name} has {len(score)} {kind}, of which {share:g} would leave none: lower {kind}"
        )
    return keep_top(score, len(score) - going)


def _shrunk(kind: str, name: str, score: Tensor, keep: Tensor) -> Shrunk:
    total = float(score.sum())
    lost = float(score[~keep].sum()) / total if total else 0.0
    return Shrunk(kind, name, len(keep), int(keep.sum()), lost)


def _require_shares(shares: Mapping[str, float], scope: str) -> None:
    for kind, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(
                f"{kind} is the share that goes, in [0, 1), got {share:g}: 0.25 is a quarter"
            )
    if not any(shares.values()):
        raise ValueError("shrink_ needs a share of width, heads, experts or blocks, as width=0.25")
    if scope not in ("layer", "model"):
        raise ValueError(f"scope must be 'layer' or 'model', got {scope!r}")


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _flops(model: nn.Module, batch: Batch) -> int:
    """The FLOPs of the model's products for the batch, experts run one by one."""

    def run(module: nn.Module, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        return expert_by_expert(module, {}, x, chosen, shares)

    mixtures = [module for module in model.modules() if experts_of(module)]
    with eval_mode(model), FlopCounterMode(display=False) as counter:
        if mixtures:
            with experts_run_by(mixtures, run):
                answer(model, batch, "the first batch")
        else:
            answer(model, batch, "the first batch")
    return int(counter.get_total_flops())
