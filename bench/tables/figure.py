"""The figure of the front page: the README's two tables as a picture, losses kept."""

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean

from bench.lib.paper import PAPER
from bench.tables.readme import FEW, KINDS, LAYER, MANY, accuracy_rows, speeds

WIDTH, ROW, TOP = 720, 26, 62
LABELS = {
    "dense": "dense",
    "magnitude": "magnitude",
    PAPER: "SparseGPT",
    "blockwise(alps)": "sc.best",
    "thorough": "sc.thorough",
}
PATTERN = "2:4"
BARS = 84, 240  # from here to there: perplexity 0 to the largest
DOTS = 540, 700  # from here to there: as fast as nothing to `MOST` times dense
MOST = 5.0
STYLE = """
    text { font: 12px system-ui, sans-serif; fill: #6b7280 }
    .h { font-weight: 600; fill: #64748b }
    .end { text-anchor: end }
    .middle { text-anchor: middle }
    .ours { fill: #2563eb }
    .other { fill: #94a3b8 }
    .line { stroke: #94a3b8; stroke-dasharray: 4 3 }
"""


def front_page(results: Path) -> str:
    """An SVG: perplexity of a few methods on the left, speed against dense on the right."""
    rows = max(len(LABELS), len(KINDS))
    height = TOP + ROW * rows + 34
    title = (
        f"Left: perplexity of a small Llama at {PATTERN}, by method; less is better. Right: how "
        "many times as fast as dense bf16 one layer runs, by format and number of tokens."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-labelledby="title">',
        f'<title id="title">{title}</title>',
        f"<style>{STYLE}  </style>",
        *_perplexities(results),
        *_speeds(results, height),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _perplexities(results: Path) -> Iterator[str]:
    found: dict[str, list[float]] = {}
    for row in accuracy_rows(results):
        if row["pattern"] == PATTERN and row["nll"]:
            found.setdefault(row["method"], []).append(float(row["nll"]))
    values = {LABELS[name]: math.exp(fmean(nll)) for name, nll in found.items()}
    yield _text(0, 18, f"How accurate at {PATTERN}", "h")
    yield _text(0, 36, "perplexity of a Llama of 28M: less is better")
    begin, end = BARS
    for i, label in enumerate(LABELS.values()):
        y = TOP + ROW * i
        width = (end - begin) * values[label] / max(values.values())
        kind = "ours" if label.startswith("sc.") else "other"
        yield _text(begin - 8, y + 13, label, "end")
        yield f'<rect class="{kind}" x="{begin}" y="{y}" width="{width:.1f}" height="18" rx="2"/>'
        yield _text(begin + width + 6, y + 13, f"{values[label]:.2f}")


def _speeds(results: Path, height: int) -> Iterator[str]:
    begin, end = DOTS
    by_kind = speeds(results)
    device = next(row["device"] for found in by_kind.values() for row in found.values())
    counts = ", ".join(f"{n:,}" for n in FEW)
    yield _text(310, 18, f"How fast: {LAYER}, {device}", "h")
    yield _text(310, 36, f"times dense bf16, a dot each for {counts} and {MANY:,} tokens")

    def x(ratio: float) -> float:
        return begin + (end - begin) * ratio / MOST

    below = height - 16
    yield f'<line class="line" x1="{x(1):.1f}" y1="{TOP - 10}" x2="{x(1):.1f}" y2="{below - 14}"/>'
    for ratio in range(int(MOST) + 1):
        yield _text(x(ratio), below, f"{ratio}", "middle")
    for i, (name, *_) in enumerate(KINDS):
        y = TOP + ROW * i + 9
        ours = "by torch" not in name and "torch calls" not in name
        yield _text(begin - 8, y + 4, name, "end")
        for count, row in by_kind[name].items():
            if row["vs_cublas"]:
                at, kind = x(float(row["vs_cublas"])), "ours" if ours else "other"
                told = f"{count:,} token{'s' * (count != 1)}: {float(row['vs_cublas']):.2f}"
                yield (
                    f'<circle class="{kind}" cx="{at:.1f}" cy="{y}" r="5" fill-opacity="0.7">'
                    f"<title>{told}</title></circle>"
                )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text{chosen} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
