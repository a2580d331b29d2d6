"""LSTM, GRU and RNN: the matrices of each layer and direction as layers, and what they see.

`weight_ih_l0` multiplies the inputs, `weight_hh_l0` the hidden states of the step before, each for
all gates at once. A kernel runs all steps. What it multiplies follows from what it returns: the
hidden states of a layer are its outputs, and so are the inputs of the next layer.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from secateur.core.interrupts import putting_back
from secateur.model.blocks import forward_as
from secateur.model.piece import Piece

LAYERED = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def gates_of(module: nn.Module) -> dict[str, Piece]:
    """The matrices of a recurrent module by the names of their parameters; none of another.

    The projection of an LSTM's states (`proj_size`) is left out: no output shows what it reads.
    """
    kind = next((kind for kind in (*LAYERED, *CELLS) if isinstance(module, kind)), None)
    if kind is None or type(module).forward is not kind.forward:
        return {}
    return {
        key: Piece(module, key, key)
        for key, parameter in module._parameters.items()
        if key.startswith(("weight_ih", "weight_hh")) and parameter is not None
    }


@contextlib.contextmanager
def seen_in_recurrent(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have recurrent modules show their matrices among the layers what they multiply."""
    planned: dict[nn.Module, dict[str, Piece]] = {}
    for layer in layers.values():
        if isinstance(layer, Piece) and isinstance(layer.owner, (*LAYERED, *CELLS)):
            planned.setdefault(layer.owner, {})[layer.key] = layer
    with putting_back() as stack:
        for module, own in planned.items():
            shown = _shown_steps if isinstance(module, CELLS) else _shown_layers
            stack.enter_context(forward_as(module, partial(_shown, module, own, shown)))
        yield


def _shown(
    module: nn.Module,
    own: Mapping[str, Piece],
    shown: Callable[..., None],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The module's result, once those of its matrices that hooks look at have seen their inputs."""
    seen = {key: piece for key, piece in own.items() if piece._forward_pre_hooks}
    if seen:
        given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
        shown(module, seen, given["input"], given.get("hx"))
    return forward(*args, **kwargs)


def _shown_steps(
    cell: nn.RNNCellBase, own: Mapping[str, Piece], x: Float[Tensor, "*rows in"], hx: Any
) -> None:
    """Show a cell's matrices the input and the hidden state of one step."""
    state = hx[0] if isinstance(hx, tuple) else hx
    if state is None:
        state = x.new_zeros(*x.shape[:-1], cell.hidden_size)
    for key, rows in (("weight_ih", x), ("weight_hh", state)):
        if key in own:
            own[key](rows)


def _shown_layers(
    module: nn.RNNBase, own: Mapping[str, Piece], x: Tensor | PackedSequence, hx: Any
) -> None:
    """Show the matrices of each layer its inputs and hidden states, by running it alone."""
    directions = 2 if module.bidirectional else 1
    if isinstance(x, Tensor) and x.dim() == 2:  # one sequence without a batch
        x = x.unsqueeze(0 if module.batch_first else 1)
        hx = _each(lambda state: state.unsqueeze(1), hx)
    for layer in range(module.num_layers):
        planes = slice(layer * directions, (layer + 1) * directions)
        start = _each(itemgetter(planes), hx)
        outputs = _alone(module, layer)(x, start)[0]
        rows = x.data if isinstance(x, PackedSequence) else x
        first = start[0] if isinstance(start, tuple) else start
        for direction in range(directions):
            suffix = f"_l{layer}{'_reverse' if direction else ''}"
            if f"weight_ih{suffix}" in own:
                own[f"weight_ih{suffix}"](rows)
            if f"weight_hh{suffix}" in own:
                states = _states_before(outputs, first, direction, directions, module.batch_first)
                own[f"weight_hh{suffix}"](states)
        x = outputs


def _alone(module: nn.RNNBase, layer: int) -> Callable[..., Any]:
    """One layer of the module, with the very parameters, as a module that is run once."""
    kind = next(kind for kind in LAYERED if isinstance(module, kind))
    names = [name for name in module._parameters if name.split("_l")[1].split("_")[0] == str(layer)]
    options: dict[str, Any] = {"nonlinearity": module.nonlinearity} if kind is nn.RNN else {}
    if kind is nn.LSTM:
        options["proj_size"] = module.proj_size
    taken = module._parameters[f"weight_ih_l{layer}"]
    assert taken is not None
    single = kind(
        taken.shape[1],
        module.hidden_size,
        bias=module.bias,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
        device="meta",
        **options,
    )
    for name in names:  # parameters, or what `functional_call` has put in their place
        single._parameters[name.replace(f"_l{layer}", "_l0")] = module._parameters[name]

    def run(*args: Any) -> Any:
        with warnings.catch_warnings():  # that its weights are no single piece of memory
            warnings.simplefilter("ignore")
            return single(*args)

    return run


def _states_before(
    outputs: Tensor | PackedSequence,
    first: Float[Tensor, "directions batch hidden"] | None,
    direction: int,
    directions: int,
    batch_first: bool,
) -> Float[Tensor, "steps hidden"]:
    """The hidden state that each step of a direction starts from, over all sequences."""
    if isinstance(outputs, PackedSequence):
        outputs, lengths = pad_packed_sequence(outputs)
        lengths = lengths.to(outputs.device)
    else:
        outputs = outputs.transpose(0, 1) if batch_first else outputs
        sizes = outputs.shape[1:2]
        lengths = torch.full(sizes, len(outputs), dtype=torch.int64, device=outputs.device)
    own = outputs.chunk(directions, -1)[direction]
    start = torch.zeros_like(own[:1]) if first is None else first[direction][None].to(own)
    step = torch.arange(len(own), device=own.device)[:, None]
    if direction:
        before = torch.where((step == lengths - 1)[..., None], start, own.roll(-1, 0))
    else:
        before = torch.cat([start, own[:-1]])
    return before[step < lengths]


def _each(take: Callable[[Tensor], Tensor], states: Any) -> Any:
    """The states, or both of an LSTM, each as `take` gives it; None if there are none."""
    if states is None:
        return None
    return tuple(map(take, states)) if isinstance(states, tuple) else take(states)
