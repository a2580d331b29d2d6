"""Tasks of lm-eval: run where it is installed, and a stand-in for it everywhere."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import secateur as sc
from secateur.integrations.lm_eval import task_scores
from secateur.integrations.transformers import load_folder
from secateur.model.evaluate import perplexity
from tests.cli.shell import run, said
from tests.integrations.folders import make_folder, tiny

ENDS = 2  # [END] in the tiny folders' tokenizers
TEXTS = ("a b c d a a c", "d d c a", "b a b c d b a c c d a b")
ROLLING = """task: own_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: word_perplexity
"""
CHOICE = """task: own_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["b", "c", "d"]
doc_to_target: 1
metric_list:
  - metric: acc
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", "llama", dtype="float32", eos_token_id=ENDS)


class StandIn:
    """lm_eval as far as it is called: a task is known, its results are these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
        made = {name: ModuleType(name) for name in names}
        made["lm_eval"].simple_evaluate = self.evaluate  # type: ignore[attr-defined]
        made["lm_eval.models.huggingface"].HFLM = self.lm  # type: ignore[attr-defined]
        made["lm_eval.tasks"].TaskManager = self.manager  # type: ignore[attr-defined]
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)

    def lm(self, **options: Any) -> str:
        self.asked |= options
        return "the model"

    def manager(self, include_path: str | None) -> "StandIn":
        self.asked["own"] = include_path
        return self

    all_tasks = ("arc_easy", "gsm8k")

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.all_tasks]

    def evaluate(self, **options: Any) -> dict[str, Any]:
        self.asked |= options
        gsm = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "alias": "gsm8k"}
        arc = {"acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 9, "note,none": "text"}
        return {"results": {"arc_easy": arc, "gsm8k": gsm}}


def test_scores_are_named_by_task_metric_and_filter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, model = StandIn(monkeypatch), load_folder(folder)
    found = task_scores(model, folder, ["arc_easy", "gsm8k"], own="mine", batch=3, limit=7)
    assert found == {"arc_easy acc": 0.5, "gsm8k exact_match (strict)": 0.25}
    asked = library.asked
    assert asked["pretrained"] is model and asked["softmax_dtype"] == "float32"
    assert (asked["batch_size"], asked["limit"], asked["own"]) == (3, 7, "mine")
    assert asked["tokenizer"].eos_token_id == ENDS, "the model's, where the tokenizer names none"


def test_an_unknown_task_is_answered_with_the_closest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = StandIn(monkeypatch)
    with pytest.raises(ValueError, match="no task 'arc_esy': did you mean 'arc_easy'"):
        task_scores(load_folder(folder), folder, ["arc_esy"])
    with pytest.raises(ValueError, match="no task 'zzz': `lm_eval ls tasks` lists them"):
        task_scores(load_folder(folder), folder, ["zzz"])
    assert "tasks" not in library.asked


def test_without_lm_eval_it_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"tasks need lm-eval, .*: pip install 'secateur\[eval\]'"):
        task_scores(load_folder(folder), folder, ["arc_easy"])


def test_an_encoder_and_a_folder_without_a_tokenizer_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    StandIn(monkeypatch)
    with pytest.raises(ValueError, match="causal language model, got BertModel: compare"):
        task_scores(tiny("bert"), folder, ["arc_easy"])
    with pytest.raises(ValueError, match="has no tokenizer that transformers reads"):
        task_scores(load_folder(folder), tmp_path, ["arc_easy"])


@pytest.mark.filterwarnings("ignore")  # of lm_eval and what it imports
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_its_perplexity_is_ours(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """In bfloat16, where lm-eval's own log-softmax would be off by a thousandth; by the command."""
    pytest.importorskip("lm_eval", reason="needs secateur[eval], which make test does not install")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = load_folder(folder).to(torch.bfloat16)
    if packed:
        sc.prune_(model, "2:4")
        sc.pack_(model, "semi24")
    sc.save(model, tmp_path / "saved")
    for name in ("tokenizer.json",):
        (tmp_path / "saved" / name).write_bytes((folder / name).read_bytes())
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rolling.yaml").write_text(ROLLING.format(data=data))
    (tasks / "choice.yaml").write_text(CHOICE.format(data=data))
    command = ("eval", tmp_path / "saved", "--task-folder", tasks, "--dtype", "bfloat16")
    printed = said(run(*command, "--tasks", "own_text", "--tasks", "own_choice", "--json"))
    found = json.loads(printed[printed.index("{") :])["saved"]
    ids = {"a": 3, "b": 4, "c": 5, "d": 6}
    rows = [torch.tensor([[ENDS, *(ids[word] for word in text.split())]]) for text in TEXTS]
    ours = perplexity(model, rows)
    nats, written = ours.nll * ours.tokens, sum(map(len, TEXTS))
    assert found["own_text bits_per_byte"] == pytest.approx(nats / math.log(2) / written, rel=1e-5)
    words = sum(len(text.split()) for text in TEXTS)
    assert found["own_text word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert found["own_choice acc"] == pytest.approx(accuracy(model, ids), abs=1e-6)


def accuracy(model: Any, ids: dict[str, int]) -> float:
    """How often c is the likeliest of b, c and d after the text."""
    right = 0
    for text in TEXTS:
        with torch.no_grad():
            logits = model(torch.tensor([[ids[word] for word in text.split()]])).logits[0, -1]
        right += int(logits[[4, 5, 6]].argmax() == 1)
    return right / len(TEXTS)
