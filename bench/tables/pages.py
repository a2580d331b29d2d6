"""Which tables there are, and pages brought up to date.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; nothing there is typed by hand.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.tables.accuracy import accuracy_all
from bench.tables.allocation import allocation, budget
from bench.tables.blocks import bitmap, blocks
from bench.tables.bytes import bytes_
from bench.tables.costs import announced, cost, seconds
from bench.tables.cuts import cuts, cuts_short
from bench.tables.decode import decode, decode_short
from bench.tables.families import families
from bench.tables.figure import front_page
from bench.tables.from_scratch import from_scratch
from bench.tables.grids import grids
from bench.tables.linear import linear_cpu_all
from bench.tables.llm import llm, llm_cpu, llm_short
from bench.tables.memory import memory
from bench.tables.pareto import pareto
from bench.tables.patterns import patterns, patterns_figure
from bench.tables.prefill import prefill, prefill_short
from bench.tables.readme import accuracy_short, speed_short
from bench.tables.small_models import encoder_accuracy, vision_accuracy
from bench.tables.support import support
from bench.tables.train import train, train_packs
from bench.tables.vit import vision, vit

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy-all": accuracy_all,
    "accuracy-short": accuracy_short,
    "allocation": allocation,
    "announced": announced,
    "bitmap": bitmap,
    "blocks": blocks,
    "budget": budget,
    "bytes": bytes_,
    "cost": cost,
    "cuts": cuts,
    "cuts-short": cuts_short,
    "decode": decode,
    "decode-short": decode_short,
    "encoder-accuracy": encoder_accuracy,
    "families": families,
    "from-scratch": from_scratch,
    "grids": grids,
    "linear-cpu-all": linear_cpu_all,
    "llm": llm,
    "llm-cpu": llm_cpu,
    "llm-short": llm_short,
    "memory": memory,
    "patterns": patterns,
    "prefill": prefill,
    "prefill-short": prefill_short,
    "seconds": seconds,
    "speed-short": speed_short,
    "support": support,
    "train": train,
    "train-packs": train_packs,
    "vision": vision,
    "vision-accuracy": vision_accuracy,
    "vit": vit,
}
FIGURES: dict[Path, Callable[[Path], str]] = {
    ROOT / "docs" / "measured.svg": front_page,
    ROOT / "docs" / "pareto.svg": pareto,
    ROOT / "docs" / "patterns.svg": patterns_figure,
}


def render(text: str, results: Path) -> str:
    """The text with every table in it made anew.

    Raises: ValueError for a name that is no table.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table is named {name!r}: tables are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[name](results)}\n{match[3]}"

    return BLOCK.sub(table, text)


def stale(files: Sequence[Path], results: Path, write: bool) -> list[Path]:
    """The files that differ from the rows, figures too; with `write` brought up to date."""
    found = []
    for path in files:
        text = path.read_text() if path.exists() else ""
        fresh = FIGURES[path](results) if path in FIGURES else render(text, results)
        if fresh != text:
            found.append(path)
            if write:
                path.write_text(fresh)
    return found
