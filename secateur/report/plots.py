"""The report's plots as inline SVG, drawn by matplotlib in colours that the page decides.

matplotlib draws with the marker colours of `INKS`; `_inline` turns each into a CSS variable of the
page, so that one drawing serves light and dark mode. Text stays text, in the page's font.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

# Marker colour -> the CSS value that replaces it. No drawing uses these for anything else.
INKS: Mapping[str, str] = {
    "#010101": "currentColor",
    "#020202": "var(--muted)",
    "#030303": "var(--grid)",
    "#040404": "var(--baseline)",
    "#050505": "var(--card)",
    "#110101": "var(--series-1)",
    "#110202": "var(--series-2)",
    "#110303": "var(--series-3)",
    "#110404": "var(--series-4)",
    "#110505": "var(--series-5)",
    "#110606": "var(--series-6)",
}
TEXT, MUTED, GRID, BASELINE, CARD, *SERIES = INKS

# One CSS pixel of the drawing is one of the page at this width, which a phone shows unscaled.
NARROW, WIDE = 340, 560
DPI = 100
# Heights in pixels: a bar with its name above it, a strip of bars, and an axis with its label.
BAR_ROW, STRIP_ROW, AXIS = 40, 58, 36
# Beyond this ratio an axis from zero hides small bars: dots on a logarithmic axis instead.
LINEAR_RATIO = 30
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Set matplotlib up for one drawing, without warnings of glyphs, which a browser draws."""
    import matplotlib

    settings = {
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,  # a name with dollar signs is a name
        "font.size": 9,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@_style()
def bars(
    values: Mapping[str, float],
    label: str,
    *,
    key: str,
    baseline: str | None = None,
    line: float | None = None,
    unit: str = "{:.4g}",
) -> str:
    """A horizontal bar for each value, its name above and its number behind it; 0 is the left edge.

    The bar named `baseline` has the neutral colour; a dashed line runs through all at `line`, or at
    the baseline. Values that differ by more than `LINEAR_RATIO` become dots on a logarithmic axis.
    """
    height = BAR_ROW * len(values) + AXIS
    figure, axes = _figure(NARROW, height)
    axes.set_position((0.025, AXIS / height, 0.775, 1 - AXIS / height))
    positive = [v for v in values.values() if v > 0]
    logarithmic = len(positive) == len(values) and max(positive) > LINEAR_RATIO * min(positive)
    for i, (name, value) in enumerate(values.items()):
        colour = BASELINE if name == baseline else SERIES[0]
        if logarithmic:
            axes.plot([value], [i], "o", color=colour, markersize=7)
        else:
            axes.barh(i, value, height=0.36, color=colour, linewidth=0)
        axes.annotate(
            unit.format(value), (value, i), (5, 0), textcoords="offset points", va="center",
            color=TEXT, fontweight="bold", annotation_clip=False, zorder=4,
            bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        axes.annotate(
            name, (0, i - 0.22), (0, 1), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="bottom", color=TEXT, annotation_clip=False,
        )  # fmt: skip
    if (at := values.get(baseline or "", line) if line is None else line) is not None:
        axes.axvline(at, color=BASELINE, linewidth=1, linestyle="--", zorder=3)
    if logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
    else:
        axes.set_xlim(0, max([*positive, line or 0, 1e-12]) * 1.02)
        axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(len(values) - 0.6, -0.75)
    axes.set_yticks([])
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    _axis_label(axes, label + (" (logarithmic)" if logarithmic else ""))
    return _inline(figure, key, f"{label}: bar plot")


@_style()
def strips(
    kinds: Mapping[str, Sequence[Mapping[int, float]]],
    label: str,
    *,
    key: str,
    top: float | None = None,
    series: Sequence[str] = (),
) -> str:
    """For each kind of layer a strip of bars over its blocks, all strips on one scale.

    `kinds` maps a name to one {block: value} for each series; several series stand side by side.
    """
    height = STRIP_ROW * len(kinds) + AXIS
    figure, stacked = _figure(WIDE, height, rows=len(kinds))
    peak = max((v for many in kinds.values() for one in many for v in one.values()), default=0)
    limit = top if top is not None else (peak * 1.05 or 1)
    blocks = [b for many in kinds.values() for one in many for b in one]
    for row, (axes, (name, many)) in enumerate(zip(stacked, kinds.items(), strict=True)):
        bottom = AXIS + STRIP_ROW * (len(kinds) - 1 - row)
        axes.set_position((0.085, bottom / height, 0.905, (STRIP_ROW - 22) / height))
        width = 0.8 / max(len(many), 1)
        for i, one in enumerate(many):
            places = [block - 0.4 + width * (i + 0.5) for block in one]
            axes.bar(places, list(one.values()), width, color=SERIES[i % len(SERIES)], linewidth=0)
        axes.set_title(name, loc="left", fontsize=8.5, color=TEXT, pad=3)
        axes.set_ylim(0, limit)
        axes.set_yticks([0, limit], ["0", _short(limit)])
        axes.set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=axes is stacked[-1])
    _axis_label(stacked[-1], label)
    return _inline(figure, key, f"{label}: bars for each layer")


@_style()
def curves(
    lines: Mapping[str, Mapping[str, float]], ticks: Sequence[str], label: str, *, key: str
) -> str:
    """A line for each name over the named ticks.

    The lines that reach highest have a series colour, a marker and a dash of their own, in the
    order of `highest`; the rest are muted.
    """
    figure, axes = _figure(WIDE, 330)
    axes.set_position((0.105, 0.085, 0.865, 0.885))
    coloured = highest(lines)
    for name in [*(n for n in lines if n not in coloured), *reversed(coloured)]:
        places = [i for i, tick in enumerate(ticks) if tick in lines[name]]
        heights = [lines[name][ticks[i]] for i in places]
        if name in coloured:
            rank = coloured.index(name)
            axes.plot(
                places, heights, color=SERIES[rank], marker=MARKERS[rank], linestyle=STYLES[rank],
                markersize=5, linewidth=1.6, zorder=3,
            )  # fmt: skip
        else:
            axes.plot(places, heights, color=MUTED, linewidth=0.8, alpha=0.45, zorder=1)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.3, len(ticks) - 0.7)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_ylabel(label, color=MUTED)
    return _inline(figure, key, f"{label}: a curve for each layer")


@_style()
def front(
    points: Sequence[tuple[float, float]],
    chosen: tuple[float, float],
    budget: float,
    labels: tuple[str, str],
    *,
    key: str,
) -> str:
    """Points (cost, loss) joined by a line, the chosen one large; a dashed line at the budget."""
    figure, axes = _figure(WIDE, 300)
    axes.set_position((0.105, 0.15, 0.865, 0.82))
    costs, losses = zip(*points, strict=True)
    axes.plot(costs, losses, "-o", color=MUTED, markersize=4, linewidth=1.2, zorder=2)
    axes.plot(*([value] for value in chosen), "o", color=SERIES[0], markersize=9, zorder=3)
    axes.axvline(budget, color=BASELINE, linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_ylabel(labels[1], color=MUTED)
    _axis_label(axes, labels[0])
    return _inline(figure, key, f"{labels[1]} against {labels[0]}")


def highest(lines: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The names that `curves` draws in colour, in the order of the series colours."""
    ranked = sorted(lines, key=lambda name: -max(lines[name].values()))
    return ranked[: len(SERIES)]


def _figure(width: int, height: int, rows: int | None = None) -> tuple[Any, Any]:
    """A figure of that many CSS pixels, and its axes: one, or a list of `rows` stacked ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.patch.set_visible(False)
    stacked = [figure.add_axes((0, 0, 1, 1), label=str(i)) for i in range(rows or 1)]
    for axes in stacked:
        axes.patch.set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=MUTED, labelsize=8, pad=3)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GRID)
    return figure, (stacked if rows is not None else stacked[0])


def _axis_label(axes: Any, label: str) -> None:
    axes.set_xlabel(label, color=MUTED, loc="left", labelpad=2)


def _short(number: float) -> str:
    return f"{number:.0%}" if number == 1 else f"{number:.2g}"


def _inline(figure: Any, key: str, title: str) -> str:
    """The figure as an `<svg>` element whose ids begin with `key` and that names no address."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    whole = out.getvalue()
    head = re.search(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', whole)
    assert head is not None, "matplotlib writes an svg element with a viewBox"
    # What the page decides: fonts, joins of lines, and to name nobody's address.
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", whole[head.end() :], flags=re.DOTALL)
    body = re.sub(r"font-family: [^;]*; ", "", body)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', body).replace("url(#", f"url(#{key}-")
    for marker, ink in INKS.items():
        body = body.replace(marker, ink)
    width = round(figure.get_figwidth() * DPI)
    return (
        f'<svg viewBox="{head[1]}" style="--width:{width}px" role="img" '
        f'aria-label="{escape(title)}">{body}'
    )
