"""Tasks of EleutherAI's lm-evaluation-harness, for a model that is loaded already, packed or dense.

Imports lm_eval and transformers inside functions only. lm_eval reads data sets through the datasets
library, which downloads what is not on the disk unless HF_DATASETS_OFFLINE=1.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from secateur.integrations.transformers import CAUSAL_ENDINGS


def task_scores(
    model: nn.Module,
    folder: str | Path,
    tasks: Sequence[str],
    *,
    own: str | Path | None = None,
    batch: int = 8,
    limit: int | None = None,
) -> dict[str, float]:
    """What lm_eval measures of the model, by task and metric: `{"arc_easy acc": 0.71, ...}`.

    `folder` has the tokenizer, `own` task files of yours. `limit` takes only so many documents of
    each task. Log-probabilities are in float32 whatever the model's dtype, so that a perplexity is
    that of `secateur.model.evaluate`. Random number generators are seeded, as lm_eval does it.

    Raises:
        ValueError: if a task is unknown, the model is no causal language model of transformers, the
            folder has no tokenizer that transformers reads, or lm_eval is not installed.
    """
    if not type(model).__name__.endswith(CAUSAL_ENDINGS):
        raise ValueError(
            f"tasks need a causal language model, got {type(model).__name__}: compare an encoder "
            "with its dense model"
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"tasks need lm-eval, not installed ({error}): pip install 'secateur[eval]'"
        ) from error
    known = TaskManager(include_path=None if own is None else str(own))
    for name in tasks:
        if not known.match_tasks([name]):
            close = get_close_matches(name, known.all_tasks, n=1)
            hint = f"did you mean {close[0]!r}" if close else "`lm_eval ls tasks` lists them"
            raise ValueError(f"lm-eval has no task {name!r}: {hint}")
    tokenizer = _tokenizer(model, Path(folder))
    run = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=batch)
    found = lm_eval.simple_evaluate(
        model=run,
        tasks=list(tasks),
        task_manager=known,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        _named(task, metric): float(value)
        for task, measured in found["results"].items()
        for metric, value in measured.items()
        if "," in metric and "_stderr," not in metric and isinstance(value, (int, float))
    }


def _named(task: str, metric: str) -> str:
    """`arc_easy acc`; a metric is `acc,none`, or has a filter of the answers behind the comma."""
    name, _, by = metric.partition(",")
    return f"{task} {name}" if by == "none" else f"{task} {name} ({by})"


def _tokenizer(model: nn.Module, folder: Path) -> Any:
    """The folder's tokenizer, with the model's end of text where its own files name none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} has no tokenizer that transformers reads ({reason}): put the files of the "
            "model's tokenizer there"
        ) from error
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        config: Any = model.config
        ends = config.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        if end is not None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer
