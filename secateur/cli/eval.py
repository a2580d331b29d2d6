"""`secateur eval`: what pruning cost, measured on text."""

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say, table
from secateur.cli.groups import Data, Harness, Loading
from secateur.cli.quality import (
    gives_hidden_states,
    is_causal,
    names_of,
    quality,
    require_one_tokenizer,
    tokens_in,
)
from secateur.report.content import metric

HELD_OUT = Data(rows=64)


@command()
def evaluate(
    *,
    folders: o.Folders,
    data: Data = HELD_OUT,
    baseline: o.Baseline = None,
    harness: Harness,
    loading: Loading,
    json: o.Json = False,
) -> None:
    """What pruning cost: perplexity, and beside a baseline KL and the same top-1.

    With --tasks, also what lm-eval measures; then data may be left out. Several folders are
    compared on the same data. An encoder is compared with its baseline by the cosine of their
    embeddings.
    """
    names = names_of(folders)
    require_one_tokenizer([*folders, *([] if baseline is None else [baseline])], data)
    batches = [] if harness.tasks and not data.given else data.read(folders[0])
    dense = None if baseline is None else loading.model(baseline)
    measured: dict[str, dict[str, float]] = {}
    for folder, name in names.items():
        model = loading.model(folder)
        if dense is None and not is_causal(model):
            raise ValueError(
                f"{type(model).__name__} has no perplexity: compare it by --baseline DENSE"
            )
        if dense is not None and not measured and not gives_hidden_states(model):
            scores = harness.scores(dense, baseline, data.batch)
            measured["dense"] = quality(dense, None, batches) | scores
        scores = harness.scores(model, folder, data.batch)
        measured[name] = quality(model, dense, batches) | scores
    if json:
        emit({"tokens": tokens_in(batches), "data": data.name, **measured})
        return
    columns = list(dict.fromkeys(what for found in measured.values() for what in found))
    shown = [
        (who, *(metric(n).text.format(found[n]) if n in found else "-" for n in columns))
        for who, found in measured.items()
    ]
    table(("weights", *columns), shown)
    if batches:
        say(f"on {tokens_in(batches):,} tokens of {data.name}")
