"""What the configurations of `bench.run.vit` cost in accuracy: a vision transformer on digits.

    python -m bench.run.vision

The transformer is trained on the spot on scikit-learn's 8 x 8 digits, for each seed on another
split and from another start, in float32. A row is the top-1 on the digits left out, of one
configuration and seed: the weights made 2:4 by magnitude (`recovery` none), or refitted from the
dense ones by `reconstruct_` with `sparsegpt` (reconstruct), or these trained for some more epochs
with `hold` (train; dense weights as long, for comparison); then packed, and run on a CPU by the
formats' references. Nothing is chosen by the digits left out.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from time import perf_counter

import secateur as sc
from bench.lib.configurations import (
    CONFIGURATIONS,
    EVERYTHING,
    Configuration,
    Globs,
    named,
    prune,
)
from bench.lib.digits import (
    BATCH,
    Digits,
    Sizes,
    Transformer,
    digits,
    digits_parser,
    top1,
    train,
    trained,
    why_no_digits,
)
from bench.lib.rows import Row, append

RECOVERY_RATE = 5e-4
NONE, RECONSTRUCT, TRAIN = "none", "reconstruct", "train"

# What `accelerate_` chooses depends on the device; this is the most that it may round, so it stands
# in for the configurations of ours.
VISION: dict[str, Configuration] = {
    **{name: one for name, one in CONFIGURATIONS.items() if not one.tried},
    "int8 dynamic 2:4 everything": Configuration(EVERYTHING, {EVERYTHING: "semi24_int8_dynamic"}),
}
TINY = Sizes(hidden=16, layers=1, heads=2, epochs=1, recovery_epochs=1)


def recovered(
    dense: Transformer, pruned: Globs, data: Digits, sizes: Sizes, seed: int
) -> Iterator[tuple[str, Transformer]]:
    """The model with these layers 2:4, before recovery and after each kind of it."""
    model = copy.deepcopy(dense)
    prune(model, Configuration(pruned))
    yield NONE, model
    model = copy.deepcopy(dense)
    if pruned:
        plan = sc.plan(model, "2:4", layers=pruned)
        sc.reconstruct_(model, plan, sc.sparsegpt, list(data.pixels.split(BATCH)))
        yield RECONSTRUCT, copy.deepcopy(model)
    train(model, data, sizes.recovery_epochs, RECOVERY_RATE, seed, held=bool(pruned))
    if pruned:
        sc.check(model, plan)
    yield TRAIN, model


def case(sizes: Sizes, seed: int) -> Iterator[Row]:
    """A row for each configuration and each recovery that it has."""
    data = digits(seed)
    began = perf_counter()
    dense = trained(sizes, data, seed)
    seconds = perf_counter() - began
    different = dict.fromkeys(configuration.pruned for configuration in VISION.values())
    models = {pruned: list(recovered(dense, pruned, data, sizes, seed)) for pruned in different}
    for name, configuration in VISION.items():
        for recovery, model in models[configuration.pruned]:
            packed = copy.deepcopy(model)
            for globs, format in configuration.packed.items():
                sc.pack_(packed, format, named(packed, globs))
            yield {
                "configuration": name,
                "recovery": recovery,
                "seed": seed,
                "top1": f"{top1(packed, data):.4f}",
                "left_out": len(data.other_labels),
                "trained_s": f"{seconds:.1f}",
                "hidden": sizes.hidden,
                "layers": sizes.layers,
            }


def main(words: Sequence[str] | None = None) -> int:
    """Trains and measures, writes each seed's rows as they come; 2 without scikit-learn."""
    arguments = digits_parser("vision", __doc__).parse_args(words)
    if absent := why_no_digits("vision"):
        print(absent, file=sys.stderr)
        return 2
    path = None
    for seed in arguments.seeds:
        rows = list(case(TINY if arguments.tiny else Sizes(), seed))
        path = append(arguments.output, "vision", rows, "cpu")
        for row in rows:
            print(f"seed {seed}, {row['configuration']}, {row['recovery']}: top-1 {row['top1']}")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
