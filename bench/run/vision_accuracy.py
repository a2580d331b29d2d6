"""What pruning costs a small vision transformer: the methods of `bench.run.accuracy` on digits.

    python -m bench.run.vision_accuracy

The transformer is that of `bench.run.vision`, trained in the same way, for each seed on another
split and from another start. Every linear layer of the blocks is pruned, with the digits that it
was trained on as calibration and nothing trained after it, but for `blockwise`. Columns: top-1 of
the labels on the digits left out, beside dense; KL(dense || pruned) and the share of digits of
which dense says the same. Nothing is chosen by the digits left out.
"""

import sys
from collections.abc import Sequence

from torch import nn

import secateur as sc
from bench.lib.configurations import EVERYTHING
from bench.lib.digits import BATCH, Sizes, digits, digits_parser, top1, trained, why_no_digits
from bench.lib.methods import ANY_MODEL, row_of
from bench.lib.rows import Row, append
from secateur.model import evaluate

PATTERNS = ("2:4", "4:8", "unstructured:0.5@layer", "unstructured:0.7@layer")
TINY = Sizes(hidden=32, layers=1, heads=2, epochs=1)  # 5 % of a narrower one is no adapter at all


def case(sizes: Sizes, seed: int, patterns: Sequence[str], methods: Sequence[str]) -> list[Row]:
    """For each pattern a row for dense and one for each method."""
    data = digits(seed)
    dense = trained(sizes, data, seed)
    calibration, left_out = data.pixels.split(BATCH), data.other_pixels.split(BATCH)

    def figures(model: nn.Module) -> dict[str, float]:
        agreement = evaluate.compare(model, dense, left_out)
        return {"top1": top1(model, data), "kl": agreement.kl, "as_dense": agreement.top1}

    shared = {"seed": seed, "left_out": len(data.other_labels)}
    shared |= {"hidden": sizes.hidden, "layers": sizes.layers}
    rows: list[Row] = []
    for pattern in patterns:
        print(f"seed {seed}, {pattern}")
        plan = sc.plan(dense, pattern, layers=EVERYTHING)
        found: list[Row] = [{"method": "dense", **figures(dense)}]
        found += [row_of(name, dense, plan, calibration, figures) for name in methods]
        rows += [{"pattern": pattern, **shared, **row} for row in found]
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Trains, prunes and writes each seed's rows as they come; 2 without scikit-learn."""
    parser = digits_parser("vision_accuracy", __doc__)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--methods", nargs="+", choices=ANY_MODEL, default=list(ANY_MODEL))
    arguments = parser.parse_args(words)
    if absent := why_no_digits("vision_accuracy"):
        print(absent, file=sys.stderr)
        return 2
    sizes = TINY if arguments.tiny else Sizes()
    for seed in arguments.seeds:
        rows = case(sizes, seed, arguments.patterns, arguments.methods)
        print(append(arguments.output, "vision-accuracy", rows, "cpu"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
