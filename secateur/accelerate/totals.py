"""What the layers' times and bytes add up to: what a model gains, and what its policy gives up."""

from collections.abc import Callable, Iterable, Sequence

from secateur.accelerate.layer_report import LayerReport, token_count
from secateur.accelerate.tokens import Day
from secateur.core.tables import as_bytes


def in_all(layers: Sequence[LayerReport], day: Day, model_bytes: int) -> str:
    """Milliseconds a call and the model's bytes, before and after: one sentence."""
    measured = [layer for layer in layers if layer.measured]
    now = _sums(layer.us for layer in measured)
    before = _sums(layer.dense_us for layer in measured)
    told = [
        f"{_ms(us)} ms instead of {_ms(dense)} at {token_count(count)} ({dense / us:.2f}x)"
        for count, us, dense in zip(day.tokens, now, before, strict=True)
    ]
    often, earlier = day.average(now), day.average(before)
    if often is not None and earlier is not None and len(day.tokens) > 1:
        ratio = f"{earlier / often:.2f}x"
        told.append(f"{_ms(often)} ms instead of {_ms(earlier)} on average ({ratio})")
    after = model_bytes + sum(layer.bytes_after - layer.bytes_before for layer in layers)
    over = f"{len(measured)} measured layer{'s' * (len(measured) != 1)}"
    return (
        f"in all, summed over {over}, a call takes "
        f"{', '.join(told)}; the model holds {as_bytes(after)} instead of {as_bytes(model_bytes)}"
    )


def given_up(layers: Sequence[LayerReport], day: Day, model_bytes: int) -> str:
    """What the other policy would gain or save in the whole model; empty if it chose the same."""
    measured = [layer for layer in layers if layer.measured]
    others = {layer.other.policy for layer in measured if layer.other is not None}
    if not others:
        return ""
    now = _sums(layer.us for layer in measured)
    then = _sums(
        layer.us if layer.other is None else layer.a_call(layer.other.microseconds)
        for layer in measured
    )
    held = model_bytes + sum(layer.bytes_after - layer.bytes_before for layer in layers)
    other = held + sum(
        layer.other.nbytes - layer.bytes_after for layer in measured if layer.other is not None
    )
    changes = _changes(day.tokens, now, then, "ms", _ms)
    return (
        f"with policy='{others.pop()}' a call would take {changes}, and the model would hold "
        f"{as_bytes(other)} instead of {as_bytes(held)}"
    )


def layer_given_up(layer: LayerReport) -> str:
    """What the other policy would run in this layer; empty if it chose the same."""
    if layer.other is None:
        return ""
    other, tokens = layer.other, [one.tokens for one in layer.measured]
    changes = _changes(tokens, layer.us, layer.a_call(other.microseconds), "us", _figure)
    runs = ", ".join(dict.fromkeys(other.runs))
    return (
        f"policy='{other.policy}' would run {runs}, take {changes}, "
        f"and hold {as_bytes(other.nbytes)} instead of {as_bytes(layer.bytes_after)}"
    )


def _sums(times: Iterable[Sequence[float]]) -> list[float]:
    """The sum over layers at each number of tokens."""
    return [sum(column) for column in zip(*times, strict=True)]


def _changes(
    tokens: Sequence[int],
    now: Sequence[float],
    then: Sequence[float],
    unit: str,
    show: Callable[[float], str],
) -> str:
    """The times that would differ as they are shown, `then` instead of `now`."""
    told = [
        f"{show(after)} {unit} instead of {show(before)} at {token_count(count)}"
        for count, before, after in zip(tokens, now, then, strict=True)
        if show(after) != show(before)
    ]
    return ", ".join(told) or "as long"


def _ms(microseconds: float) -> str:
    return _figure(microseconds / 1000)


def _figure(value: float) -> str:
    """Three digits, and all of a whole number's."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"
