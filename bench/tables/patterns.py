"""Which pattern to take on an H200: what each loses on a language model, and the time it takes.

Losses are of a small Llama that was really trained, times of two layers of Llama-3-8B, which most
of a block's weights are in. A kind without rows of one of them says so and has no dot.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bench.lib.results import Row
from bench.tables import bytes as losses
from bench.tables.candidates import latest
from bench.tables.markdown import bold, page, runs, tokens
from bench.tables.scatter import BOTTOM, LEFT, RIGHT, TOP, dots, figure, front_of

LAYERS = ("Llama-3-8B gate_up", "Llama-3-8B down")
FEW, SOME, MANY = 1, 16, 4096
DENSE = "cublas bf16"
MISSING = "not measured"
DIVERGENCE = 0.4  # the most that the figure shows; what is above it stands at its top


@dataclass(frozen=True)
class Kind:
    """A way to store the weights: its recipe in rows of losses, and who runs it.

    `zeros` is the end of a layer's name in rows of blocks, where a candidate has several.
    """

    recipe: str
    few: str  # the candidate at 1 and 16 tokens
    many: str = ""  # and at 4,096
    zeros: str = ""


def _kind(pattern: str, format: str, numbers: str = "bfloat16", many: str = "") -> Kind:
    return Kind(f"{pattern} {numbers}, sparsegpt", format, many)


def _anywhere(share: str, format: str, numbers: str = "bfloat16") -> Kind:
    recipe = f"unstructured:{share}@layer {numbers}, sparsegpt"
    return Kind(recipe, f"{format} decode", f"{format} expand", f" {format}@{share}")


def _blocks(share: str) -> Kind:
    zeros = f"block:64x64@{share}"
    return Kind(f"{zeros} bfloat16, sparsegpt", "block decode", "block prefill", f" {zeros}")


KINDS = {
    "dense": Kind("dense bfloat16", DENSE, DENSE),
    "2:4": _kind("2:4", "semi24", many="semi24 prefill"),
    "4:8": _kind("4:8", "semi48"),
    "unstructured 50%": _anywhere("0.5", "bitmap"),
    "unstructured 70%": _anywhere("0.7", "bitmap"),
    "unstructured 80%": _anywhere("0.8", "bitmap"),
    "block 64x64, 50%": _blocks("0.5"),
    "block 64x64, 80%": _blocks("0.8"),
    "block 64x64, 90%": _blocks("0.9"),
    "dense int4": Kind("dense int4, gptq", "int4"),
    "dense int4, by torch": Kind("dense int4, gptq", "tinygemm int4"),
    "2:4, int4": _kind("2:4", "semi24_int4", "int4", "semi24_int4 prefill"),
    "4:8, int4": _kind("4:8", "semi48_int4", "int4"),
    "unstructured 50%, int4": _anywhere("0.5", "bitmap_int4", "int4"),
}


def patterns(results: Path) -> str:
    """For each kind its loss and the milliseconds of both layers, with ratios to dense."""
    lost, timed = _losses(results), _times(results)
    lines = []
    for name, kind in KINDS.items():
        found = lost.get(kind.recipe)
        cells = [f"{float(found[key]):.3f}" for key in ("dnll", "kl")] if found else [MISSING] * 2
        counts = ((FEW, kind.few), (SOME, kind.few), (MANY, kind.many))
        lines.append([name, *cells, *(_cell(timed, kind, *one) for one in counts)])
    heads = ["weights", "loss over dense, nats", "KL to dense"]
    heads += [f"ms at {tokens(n)} (to dense)" for n in (FEW, SOME, MANY)]
    used = [row for rows in timed.values() for row in rows.values()]
    first, case = used[0], next(iter(lost.values()))
    origin = (
        f"Losses: {case['model']}, SparseGPT on {case['calibration_rows']} calibration rows, "
        f"{case['validation_rows']} validation rows, {runs(list(lost.values()))}, "
        f"`python -m bench.run.bytes`. Times: {' and '.join(LAYERS)} together, random weights, "
        f"cold; {first['device']}, torch {first['torch']}, {runs(used)}, `python -m "
        "bench.run.decode`, `bench.run.prefill`, `bench.run.blocks`. Ratios are to dense cuBLAS "
        "bf16 of the same runs, bold where it is faster."
    )
    return page(heads, lines, origin)


def patterns_figure(results: Path) -> str:
    """An SVG: a dot a kind, time at one token against divergence, a line along the front."""
    lost, timed = _losses(results), _times(results)
    found: dict[str, tuple[float, float]] = {}
    for name, kind in KINDS.items():
        taken = _milliseconds(timed, kind, FEW, kind.few)
        if taken is not None and kind.recipe in lost:
            found[name] = taken[0], float(lost[kind.recipe]["kl"])
    front = front_of(found)
    most = max(ms for ms, _ in found.values()) * 1.05

    def label(name: str) -> str:
        value = found[name][1]
        return name if value <= DIVERGENCE else f"{name} ({value:.2f})"

    places = {name: (_x(ms, most), _y(value)) for name, (ms, value) in found.items()}
    title = (
        "KL to dense of a small Llama against the milliseconds of two layers of Llama-3-8B at one "
        f"token; on the front: {'; '.join(front)}"
    )
    device = next(iter(next(iter(timed.values())).values()))["device"]
    return figure(title, [*_axes(device, most), *dots(places, front, label)])


Times = Mapping[tuple[str, str], Mapping[str, Row]]


def _losses(results: Path) -> dict[str, Row]:
    """The rows of the case that most recipes have, by recipe."""
    return {row["recipe"]: row for row in max(losses.latest(results), key=len)}


def _times(results: Path) -> Times:
    """The rows of both layers, by candidate with its zeros and number of tokens, then by layer."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for bench in ("decode", "prefill", "blocks"):
        for row in (row for rows in latest(results, bench) for row in rows):
            layer = next((one for one in LAYERS if row["layer"].startswith(one)), None)
            if layer is not None and row["us"] and row["vs_cublas"]:
                name = row["candidate"] + row["layer"].removeprefix(layer)
                found.setdefault((name, row["tokens"]), {})[layer] = row
    return found


def _milliseconds(
    timed: Times, kind: Kind, count: int, candidate: str
) -> tuple[float, float] | None:
    """Of both layers, and how many times dense's own of the same runs; None where one lacks."""
    rows = timed.get((candidate + kind.zeros, str(count)), {})
    if set(rows) != set(LAYERS):
        return None
    own = sum(float(row["us"]) for row in rows.values())
    dense = sum(float(row["us"]) * float(row["vs_cublas"]) for row in rows.values())
    return own / 1e3, dense / own


def _cell(timed: Times, kind: Kind, count: int, candidate: str) -> str:
    taken = _milliseconds(timed, kind, count, candidate)
    return MISSING if taken is None else f"{taken[0]:.3f} ({bold(round(taken[1], 2))})"


def _axes(device: str, most: float) -> Iterator[str]:
    yield (
        f'<text x="{LEFT}" y="18">KL to dense of a Llama of 28M, against ms of '
        f"Llama-3-8B's gate_up and down, one token, {escape(device)}</text>"
    )
    for hundredths in range(0, int(100 * most) + 1, 2):
        x = _x(hundredths / 100, most)
        yield f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{BOTTOM}"/>'
        yield f'<text class="middle" x="{x}" y="{BOTTOM + 18}">{hundredths / 100:g} ms</text>'
    for tenths in range(5):
        y = _y(tenths / 10)
        yield f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{RIGHT}" y2="{y}"/>'
        yield f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{tenths / 10:g}</text>'


def _x(ms: float, most: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * ms / most, 1)


def _y(divergence: float) -> float:
    """The height of this divergence; what is above the axis stands at its top."""
    return round(BOTTOM - (BOTTOM - TOP) * min(divergence, DIVERGENCE) / DIVERGENCE, 1)
