"""The report: what it contains, that it needs nothing else, and that names stay text."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.accelerate.layer_report import LayerReport, LayerTimes
from secateur.accelerate.report import AccelerateReport
from secateur.allocation import Allocation, Point, Sensitivity
from secateur.core.tables import as_bytes
from secateur.model.plan import Plan, plan
from secateur.patterns import NM, Block
from secateur.prune.verbs import LayerResult, PruneReport, prune_
from secateur.report import plots, write_html
from secateur.report.content import by_kind, layer_tables
from secateur.report.pictures import picture
from secateur.report.rows import fold, numeric_columns, without_empty

HOSTILE = "<script>alert('1')</script>&\"$x^$"
VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass
class Page(HTMLParser):
    """A parsed page: its text, its tags and attributes, and its tables as rows of cells."""

    source: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    classes: list[list[list[str]]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == [], f"tags left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.classes.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.classes[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.classes[-1][-1].append(dict(attrs).get("class") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def headings(self) -> list[str]:
        return [attrs["id"] or "" for tag, attrs in self.tags if tag == "section"]


def written(path: Path, **given: object) -> Page:
    write_html(path, title="A model", **given)  # type: ignore[arg-type]
    return Page(path.read_text(encoding="utf-8"))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 32), "down": nn.Linear(32, 64)}) for _ in range(3)
        )


def layer_result(layer: str, error: float | None = 0.25) -> LayerResult:
    return LayerResult(layer, "2:4", 0.0, 0.5, error, 1024, "")


def speed() -> AccelerateReport:
    times = (("dense", 50.0), ("dense prepacked", 40.0), ("block:64x64 cpu", 20.0))
    slow = (("dense", 50.0), ("csr torch_csr", 100.0))
    return AccelerateReport(
        "cpu (AVX2)", 2, (1, 16),
        (
            LayerReport(
                "fast", (64, 64), "block:64x64",
                (LayerTimes(1, times, "block:64x64 cpu"), LayerTimes(16, times, "block:64x64 cpu")),
                "fast", 16384, 4096, "faster than dense at every number of tokens",
            ),
            LayerReport(
                "slow", (32, 32), "dense", (LayerTimes(1, slow, "csr torch_csr"),), "slow", 4096,
                4096, "csr is 0.50x of dense",
            ),
        ),
    )  # fmt: skip


def sensitivity(names: Mapping[str, float]) -> Sensitivity:
    return Sensitivity(
        "magnitude", 1.5, ("2:4", "unstructured:0.3"), dict.fromkeys(names, (8, 16)),
        {name: {"2:4": top, "unstructured:0.3": top / 2} for name, top in names.items()}, {}, {},
    )  # fmt: skip


def allocated(names: tuple[str, str], unit: str) -> Allocation:
    """Three points, of which the second is chosen."""
    points = [
        Point(dict(zip(names, choices, strict=True)), cost, increase)
        for choices, cost, increase in (
            (("2:4", "2:4"), 4.0, 0.75),
            (("2:4", "dense"), 7.0, 0.5),
            (("dense", "dense"), 10.0, 0.0),
        )
    ]
    return Allocation(points[1], 8.0, 10.0, unit, tuple(points))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Page:
    model = Blocks()
    decided = plan(model, "2:4")
    report = prune_(model, decided)
    reports = [
        report,
        PruneReport("sparsegpt", tuple(map(layer_result, decided.layers)), 2.0, 1, 4),
    ]
    return written(
        tmp_path_factory.mktemp("report") / "report.html",
        plan=decided,
        prune=reports,
        evaluations={
            "dense": {"perplexity": 5.0664},
            "2:4 wanda": {"perplexity": 9.3002, "KL to dense": 0.6104, "same top-1": 0.6833},
        },
        accelerate=speed(),
        sensitivity=sensitivity({"layers.0.up": 0.5, "layers.1.up": 0.25}),
        allocation=allocated(("layers.0.up", "layers.1.up"), "ms"),
        model=model,
        sizes={"dense": 55_600_000, "packed": 36_200_000},
        notes=["Only the first 64 rows were measured."],
    )


def test_every_result_has_its_section(everything: Page) -> None:
    assert everything.headings == [
        "accuracy", "sparsity", "masks", "errors", "dispatch", "sizes", "sensitivity", "allocation",
        "plan", "provenance",
    ]  # fmt: skip
    assert "A model" in everything.text
    assert "Only the first 64 rows were measured." in everything.text
    for fact in (f"torch{torch.__version__}", "Python3.", "GPU"):
        assert fact in re.sub(r"\s+", "", everything.text)


def test_results_that_are_not_given_have_no_section(tmp_path: Path) -> None:
    page = written(tmp_path / "a.html", sizes={"dense": 10})
    assert page.headings == ["sizes", "provenance"]
    assert written(tmp_path / "b.html").headings == ["provenance"]


def test_the_accuracy_table_has_the_numbers_set_right(everything: Page) -> None:
    rows = everything.tables[0]
    assert rows == [
        ["weights", "perplexity", "KL to dense", "same top-1"],
        ["dense", "5.066", "-", "-"],
        ["2:4 wanda", "9.300", "0.6104", "68.33%"],
    ]
    assert everything.classes[0][1] == ["s", "n", "n", "n"]


def test_headline_figures(everything: Page) -> None:
    text = re.sub(r"\s+", " ", everything.text)
    for told in ("Zeros50.0%", "Perplexity9.300", "2:4 wanda; dense 5.066", "1 of 2", "36.2 MB"):
        assert told.replace(" ", "") in text.replace(" ", "")


def test_zeros_are_counted_in_the_plan_where_there_is_one(tmp_path: Path) -> None:
    model = Blocks()
    decided = plan(model, "2:4", layers=["*.up"])
    prune_(model, decided)
    text = written(tmp_path / "a.html", model=model, plan=decided).text
    assert "50.0%of the weights of 3 planned layers" in text.replace("\n", "")
    text = written(tmp_path / "b.html", model=model).text
    assert "25.0%of the weights of 6 layers" in text.replace("\n", "")


def test_the_layers_that_are_alike_share_a_line(everything: Page) -> None:
    table = next(t for t in everything.tables if t[0][:2] == ["layer", "out"] and "pattern" in t[0])
    assert table[1:] == [
        ["layers.0-2.up", "32", "64", "2:4", "50.0%"],
        ["layers.0-2.down", "64", "32", "2:4", "50.0%"],
    ]


def test_zeros_that_are_equal_are_a_sentence_and_not_bars(everything: Page) -> None:
    section = everything.source.split('<section id="sparsity">')[1].split("</section>")[0]
    assert "Each of the 6 layers has 50.0% zeros." in section and "<svg" not in section


def test_kinds_of_equal_zeros_share_a_strip(tmp_path: Path) -> None:
    model = Blocks()
    prune_(model, plan(model, {"*.up": "unstructured:0.5", "*.down": "2:4"}))
    prune_(model, plan(model, {"layers.1.*": "unstructured:0.75"}))
    page = written(tmp_path / "report.html", model=model)
    section = page.source.split('<section id="sparsity">')[1].split("</section>")[0]
    assert "Each of" not in section and ">up, down<" in section
    prune_(model, plan(model, {"layers.2.up": "unstructured:0.9"}))
    page = written(tmp_path / "report.html", model=model)
    section = page.source.split('<section id="sparsity">')[1].split("</section>")[0]
    assert ">up<" in section and ">down<" in section


def test_the_front_has_its_points_and_the_choice(everything: Page) -> None:
    table = next(t for t in everything.tables if "of dense" in t[0])
    assert [row[:3] for row in table[1:]] == [
        ["4", "40.0%", "0.7500"],
        ["7", "70.0%", "0.5000"],
        ["10", "100.0%", "0.0000"],
    ]
    assert ["chosen" in row[-1] for row in table[1:]] == [False, True, False]
    section = everything.source.split('<section id="allocation">')[1].split("</section>")[0]
    assert "Within 8 ms, of 10 dense." in section and ">increase of the loss<" in section
    assert ["layers.1.up", "dense"] in [row for t in everything.tables for row in t]


def test_why_a_layer_stays_dense_is_told(everything: Page) -> None:
    table = next(t for t in everything.tables if t[0] == ["runs", "layers", "why"])
    assert table[2] == ["dense", "1", "csr is 0.50x of dense"]
    measured = next(t for t in everything.tables if "vs eager" in t[0])
    assert measured[1][measured[0].index("vs eager")] == "2.50x"


def test_layers_timed_once_share_a_line(tmp_path: Path) -> None:
    report = speed()
    alike = replace(report.layers[1], layer="slow too")
    page = written(tmp_path / "r.html", accelerate=replace(report, layers=(*report.layers, alike)))
    measured = next(t for t in page.tables if "vs eager" in t[0])
    assert [row[0] for row in measured[1:]] == ["fast", "fast", "slow and 1 more"]
    assert "no layer would" not in page.text
    advised = replace(report, advice="what would be faster here: tiles")
    assert (
        "What would be faster here: tiles." in written(tmp_path / "a.html", accelerate=advised).text
    )


def test_speed_is_drawn_against_the_faster_dense(everything: Page) -> None:
    section = everything.source.split('<section id="dispatch">')[1].split("</section>")[0]
    one, sixteen = section.split("<figure>")[1:3]
    assert ">2.00x<" in one and ">0.50x<" in one and ">fast (64x64)<" in one
    assert ">2.00x<" in sixteen and "0.50x" not in sixteen.split("</figure>")[0]


def test_the_page_needs_nothing_else(everything: Page) -> None:
    source = everything.source
    assert "http:" not in source and "https:" not in source and "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in everything.tags}
    assert not any("src" in attrs for _, attrs in everything.tags)
    assert not any(name.startswith("on") for _, attrs in everything.tags for name in attrs)


def test_ids_are_unique_and_every_reference_has_its_target(everything: Page) -> None:
    ids = [attrs["id"] for _, attrs in everything.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = [attrs["href"] or "" for _, attrs in everything.tags if "href" in attrs]
    assert references and all(reference[1:] in ids for reference in references)
    clips = re.findall(r"url\(#([^)]*)\)", everything.source)
    assert all(clip in ids for clip in clips)


def test_colours_are_the_page_s_in_light_and_dark(everything: Page) -> None:
    used = set(re.findall(r"var\((--[\w-]+)\)", everything.source))
    light, dark = everything.source.split("prefers-color-scheme: dark")
    colours = used - {"--width"} | {ink[4:-1] for ink in plots.INKS.values() if "var" in ink}
    assert {"--series-1", "--series-6", "--mask-kept"} <= colours
    assert all(f"{name}:" in light and f"{name}:" in dark for name in colours)
    assert not any(marker in everything.source for marker in plots.INKS)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(8, 8))
    decided = plan(model, "2:4")
    results = PruneReport(HOSTILE, (layer_result(HOSTILE),), 1.0, 1, 4)
    page = written(
        tmp_path / "report.html",
        plan=Plan(decided.layers, decided.shapes, {HOSTILE: HOSTILE}),
        prune=results,
        evaluations={HOSTILE: {HOSTILE: 1.0}, "dense": {HOSTILE: 2.0}},
        sensitivity=sensitivity({HOSTILE: 0.5}),
        allocation=allocated((HOSTILE, "other"), HOSTILE),
        model=model,
        sizes={HOSTILE: 10, "dense": 20},
        notes=[HOSTILE],
    )
    assert not any(tag == "script" for tag, _ in page.tags)
    assert HOSTILE in page.text
    drawn = [t for t in re.findall(r"<text[^>]*>(.*?)</text>", page.source) if "alert" in t]
    assert drawn and all("&lt;script&gt;" in text for text in drawn)


def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("jinja2", "matplotlib"):
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, package, None)
            told = rf"the report needs {package}.*: pip install 'secateur\[report\]'"
            with pytest.raises(ValueError, match=told):
                write_html(tmp_path / "report.html", title="x")
    assert not (tmp_path / "report.html").exists()


# --- plots ---------------------------------------------------------------------------------------


def sizes(svg: str, ink: str) -> list[tuple[float, float]]:
    """The widths and heights of the filled shapes of one colour, in drawing order."""
    found = []
    for path in re.findall(r"<path ([^>]*)/>", svg):
        if f"fill: {ink}" in path:
            points = re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)
            xs, ys = ([float(number) for number in axis] for axis in zip(*points, strict=True))
            found.append((max(xs) - min(xs), max(ys) - min(ys)))
    return found


def widths(svg: str, ink: str) -> list[float]:
    return [width for width, _ in sizes(svg, ink)]


def test_bars_are_as_long_as_their_values() -> None:
    svg = plots.bars({"dense": 2.0, "a": 4.0, "b": 1.0}, "loss", key="k", baseline="dense")
    a, b = widths(svg, "var(--series-1)")
    (dense,) = widths(svg, "var(--baseline)")
    assert a / dense == pytest.approx(2, rel=1e-3) and b / dense == pytest.approx(0.5, rel=1e-3)
    assert all(f">{text}<" in svg for text in ("dense", "a", "b", "loss", "4"))


def test_values_of_many_magnitudes_are_dots_on_a_logarithmic_axis() -> None:
    svg = plots.bars({"dense": 5.0, "a": 8000.0}, "perplexity", key="k", baseline="dense")
    assert "perplexity (logarithmic)" in svg
    places = {
        ink: [float(x) for x in re.findall(rf'<use [^>]*x="([^"]*)"[^>]*fill: {ink}', svg)]
        for ink in (r"var\(--series-1\)", r"var\(--baseline\)")
    }
    assert [len(xs) for xs in places.values()] == [1, 1]
    ticks = {
        text: float(x) for x, text in re.findall(r'<text [^>]* x="([^"]*)"[^>]*>(\d+)</text>', svg)
    }
    decade = ticks["1000"] - ticks["100"]
    (a,), (dense,) = places.values()
    assert (a - dense) / decade == pytest.approx(math.log10(8000 / 5), rel=1e-3)


def test_strips_are_as_high_as_their_values() -> None:
    kinds = {"up": [{0: 0.5, 1: 0.25}], "down": [{0: 1.0, 1: 0.0}]}
    svg = plots.strips(kinds, "zeros", key="k", top=1.0)
    found = [height for _, height in sizes(svg, "var(--series-1)")]
    assert [h / found[2] for h in found[:3]] == pytest.approx([0.5, 0.25, 1.0], rel=1e-3)


def test_the_steepest_curves_are_in_colour_in_order() -> None:
    lines = {f"layer{i}": {"a": 0.0, "b": float(i)} for i in range(9)}
    assert plots.highest(lines) == [f"layer{i}" for i in (8, 7, 6, 5, 4, 3)]
    svg = plots.curves(lines, ["a", "b"], "loss", key="k")
    for ink, count in (("var(--series-1)", 1), ("var(--series-6)", 1), ("var(--muted)", 3)):
        style = rf'style="fill: none;(?: [^"]*;)? stroke: {re.escape(ink)}'
        assert len(re.findall(style, svg)) == count


@pytest.mark.parametrize("pattern", [NM(2, 4), None])
def test_a_picture_draws_the_mask_cell_by_cell(pattern: NM | None) -> None:
    torch.manual_seed(0)
    mask = torch.rand(40, 100) < 0.5
    found = picture("x", pattern, mask)
    assert (found.rows, found.columns, found.shape) == (32, 64, (40, 100))
    assert found.zeros == pytest.approx(float((~mask).float().mean()))
    path = re.search(r'class="kept" d="([^"]*)"', found.svg)
    assert path is not None
    drawn = torch.zeros(32, 64, dtype=torch.bool)
    for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path[1]):
        drawn[int(y), int(x) : int(x) + int(run)] = True
    assert torch.equal(drawn, mask[:32, :64])
    assert ("M4 0V32" in found.svg) == (pattern is not None)


def test_a_picture_of_tiles_shows_several() -> None:
    mask = torch.ones(512, 1024, dtype=torch.bool)
    found = picture("x", Block(64, 64, 0.5), mask)
    assert (found.rows, found.columns) == (256, 512)
    assert "M0 64H512" in found.svg and "M64 0V256" in found.svg


# --- rows ----------------------------------------------------------------------------------------


def test_rows_fold_over_one_number_at_a_time() -> None:
    rows = [
        *((f"layers.{i}.up", "1") for i in (0, 1, 2, 4)),
        ("layers.3.up", "2"),
        *((f"layers.{i}.experts.{j}.w", "1") for i in range(2) for j in range(3)),
        ("head", "1"),
    ]
    assert fold(rows) == [
        ("layers.0-2,4.up", "1"),
        ("layers.3.up", "2"),
        ("layers.0-1.experts.0-2.w", "1"),
        ("head", "1"),
    ]


def test_rows_that_differ_are_not_folded() -> None:
    rows = [("layers.0.up", "1"), ("layers.1.up", "2"), ("blocks.1.up", "1"), ("layers.1", "1")]
    assert fold(rows) == rows


def test_columns_of_numbers_are_known() -> None:
    rows = [("a", "1,024", "-", "50.0%", "1.5x", "+0.1", "3e-05", "2:4", "12.5 MB")]
    assert numeric_columns("abcdefghi", rows) == [
        False, True, False, True, True, True, True, False, True,
    ]  # fmt: skip
    assert numeric_columns(("a", "b"), [("1", "2"), ("x", "-")]) == [False, True]


def test_columns_that_say_nothing_are_left_out() -> None:
    rows = [("a", "-", "", "1"), ("b", "-", "-", "-")]
    assert without_empty(("w", "x", "y", "z"), rows) == (("w", "z"), [("a", "1"), ("b", "-")])


def test_tables_are_closed_where_they_are_long() -> None:
    alike = [(f"l.{i}", "1") for i in range(20)]
    folded, every = layer_tables(("layer", "x"), alike, "Layers")
    assert folded.rows == [("l.0-19", "1")] and folded.summary == ""
    assert len(every.rows) == 20 and every.summary == "Layers: all 20 lines"
    different = [(f"l.{i}", str(i)) for i in range(20)]
    (only,) = layer_tables(("layer", "x"), different, "Layers")
    assert len(only.rows) == 20 and only.summary
    (closed,) = layer_tables(("layer", "x"), alike, "wanda", closed=True)
    assert closed.summary == "wanda: 1 lines for 20"


def test_kinds_of_layers_by_block() -> None:
    values = {"m.layers.0.up": 1.0, "m.layers.1.up": 2.0, "m.layers.1.down": 3.0, "head": 4.0}
    assert by_kind(values) == ({"up": {0: 1.0, 1: 2.0}}, "m.layers.*")
    two = {"enc.0.a": 1.0, "enc.1.a": 2.0, "dec.0.a": 3.0, "dec.1.a": 4.0}
    assert by_kind(two) == ({"enc.*.a": {0: 1.0, 1: 2.0}, "dec.*.a": {0: 3.0, 1: 4.0}}, "")


def test_bytes_in_words() -> None:
    assert [as_bytes(n) for n in (0, 999, 1500, 55_600_072, 15 * 10**9)] == [
        "0 B", "999 B", "1.5 kB", "55.6 MB", "15.0 GB",
    ]  # fmt: skip
