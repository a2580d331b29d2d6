"""What `prune` prints: what was done, what it cost, and what was not measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from secateur.cli.console import console, left_alone, plain, say
from secateur.cli.quality import tokens_in
from secateur.cli.source import Opened, bytes_of, model_files, parameters_in
from secateur.core.tables import as_bytes
from secateur.model.blocks import Batch
from secateur.model.layers import by_default
from secateur.model.plan import Plan
from secateur.prune.verbs import PruneReport
from secateur.report.content import metric


@dataclass(frozen=True)
class Summary:
    """Everything that the summary shows."""

    source: Opened
    out: Path
    plan: Plan
    report: PruneReport
    batches: Sequence[Batch]
    before: Mapping[str, float]
    after: Mapping[str, float]
    test_name: str
    test: Sequence[Batch]

    @property
    def zeros(self) -> tuple[float, float]:
        """The share of zeros in the planned layers, before and after."""
        before, after, weights = zeros_in(self.plan, self.report)
        return before / weights, after / weights

    @property
    def zeros_of_all(self) -> tuple[float, float]:
        """The same zeros as a share of all parameters of the model, before and after."""
        before, _, _ = zeros_in(self.plan, self.report)
        return before / self.parameters, self.report.zeros / self.parameters

    @property
    def parameters(self) -> int:
        """All parameters; a state dict's are counted in its files, which hold more than layers."""
        return parameters_in(self.files) if self.source.state_dict else self.report.parameters

    @property
    def files(self) -> list[Path]:
        """The weight files that were written."""
        if self.source.state_dict is None:
            return model_files(self.out)
        return sorted(self.out.glob("*.safetensors"))

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the weight files, before and after."""
        return self.source.size, bytes_of(self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "output": str(self.out),
            "plan": self.plan.to_dict(),
            "report": self.report.to_dict(),
            "zeros": self.zeros,
            "zeros_of_all": self.zeros_of_all,
            "before": dict(self.before),
            "after": dict(self.after),
            "bytes": self.sizes,
            "speed": None,
        }


def zeros_in(plan: Plan, report: PruneReport) -> tuple[float, float, int]:
    """Zeros in the planned layers before and after, and the number of their weights."""
    sizes = [plan.shapes[r.layer][0] * plan.shapes[r.layer][1] for r in report.layers]
    before = sum(r.sparsity_before * n for r, n in zip(report.layers, sizes, strict=True))
    after = sum(r.sparsity * n for r, n in zip(report.layers, sizes, strict=True))
    return before, after, sum(sizes)


def summarize(summary: Summary) -> None:
    """Print the summary."""
    plan, report = summary.plan, summary.report
    patterns = ", ".join(dict.fromkeys(str(pattern) for pattern in plan.layers.values()))
    left = {**plan.skipped, **summary.source.left_alone}
    if plan.left and summary.source.state_dict is None:
        say(plan.coverage)
    say(
        f"pattern {patterns} / method {report.method} / {len(plan.layers)} of "
        f"{len(_layers_of(summary.source.model) | left.keys() | plan.layers.keys())} layers",
        *left_alone(left),
        _calibration(summary),
        "",
    )
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (("", False), ("before", True), ("after", True), ("", False)):
        drawn.add_column(name, justify="right" if right else "left")
    for row in _lines(summary):
        drawn.add_row(*map(plain, row))
    console().print(drawn)
    say("", *_next(summary))


def _lines(summary: Summary) -> list[tuple[str, str, str, str]]:
    sizes, (was, now) = summary.sizes, summary.zeros
    lines = [("zeros in plan", f"{was:.1%}", f"{now:.1%}", "every layer checked")]
    was, now = summary.zeros_of_all
    everything = f"{summary.parameters:,} parameters, embeddings and all"
    lines.append(("zeros of all", f"{was:.1%}", f"{now:.1%}", everything))
    where = f"({summary.test_name}, {tokens_in(summary.test):,} tokens)"
    for name, value in summary.after.items():
        text, before = metric(name).text, summary.before.get(name)
        change = "" if before is None else f"{value - before:+.3f}   "
        shown = "-" if before is None else text.format(before)
        lines.append((name, shown, text.format(value), change + where))
        where = ""
    room, speed = "zeros take the room of other weights", "not measured: zeros alone are not faster"
    if summary.source.state_dict is None:
        room = "dense form; `secateur export --to packed` saves room"
        speed = "not measured: run `secateur bench` (zeros alone are not faster)"
    lines.append(("file size", as_bytes(sizes[0]), as_bytes(sizes[1]), room))
    return [*lines, ("speed", "-", "-", speed)]


def _layers_of(model: nn.Module) -> set[str]:
    """The names of all layers of the kinds that are pruned by default."""
    return {name for name, module in model.named_modules() if by_default(name, module)}


def _calibration(summary: Summary) -> str:
    took = f"{_duration(summary.report.seconds)}"
    if not summary.batches:
        return f"no calibration data: {summary.report.method} reads none; {took}"
    rows = sum(
        len(next(iter(b.values())) if isinstance(b, Mapping) else b) for b in summary.batches
    )
    return f"calibration {rows} rows, {tokens_in(summary.batches):,} tokens, {took}"


def _next(summary: Summary) -> list[str]:
    lines = [f"written to {summary.out}"]
    if summary.source.state_dict is None:
        lines.append(
            f"next: `secateur recover {summary.out} --teacher {summary.source.path}` trains the "
            "kept weights while the zeros hold"
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
