"""Which of transformers' families go the whole way, and which share of each is pruned.

    python -m bench.run.families

A row is a tiny model with random weights: planned by 2:4, reconstructed by SparseGPT on random
inputs, checked, saved, and loaded by `sc.load` and by transformers with outputs that are equal to
the bit. `planned` and `left` are its plan's account of all parameters.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers

from bench.lib.command import parser_of
from bench.lib.families import FAMILIES, whole_way
from bench.lib.rows import Row, append


def rows() -> Iterator[Row]:
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            plan = whole_way(family, Path(folder) / "out")
        yield {
            "transformers": transformers.__version__,
            "kind": family.kind,
            "family": family.stem,
            "layers": len(plan.layers),
            "planned": plan.weights,
            "left": json.dumps(dict(plan.left)),
        }


def main(words: Sequence[str] | None = None) -> None:
    arguments = parser_of("families", __doc__).parse_args(words)
    print(append(arguments.output, "families", list(rows()), "cpu"))


if __name__ == "__main__":
    main()
