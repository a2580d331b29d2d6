"""Zeros under transformers' Trainer, through its checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur as sc
from secateur.train.schedules import cubic

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from secateur.integrations.trainer import FILE, SecateurCallback, read_state  # noqa: E402

PATTERN = "unstructured:0.5@layer"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=generator)
    return [{"x": row, "labels": (row.sum() > 0).long()} for row in x]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def trainer(model: Net, folder: Path, *callbacks: Any, steps: int = 6, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=3,
        **options,
    )
    made = transformers.Trainer(model, args, train_dataset=rows(), callbacks=list(callbacks))
    made.remove_callback(transformers.PrinterCallback)
    return made


def callback(model: Net, rule: bool) -> SecateurCallback:
    if not rule:
        return SecateurCallback()
    return SecateurCallback(sc.gradual(sc.plan(model, PATTERN), cubic(0.5, 0, 6), every=2))


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("rule", [False, True])
def test_a_training_that_resumes_equals_one_that_did_not_stop(rule: bool, tmp_path: Path) -> None:
    whole = net()
    if not rule:
        sc.prune_(whole, PATTERN)
    first = callback(whole, rule)
    trainer(whole, tmp_path, first, gradient_accumulation_steps=2).train()
    assert first.held is not None and first.held.steps == 6
    assert sc.check(whole, PATTERN) == {"body": 0.5, "head": 0.5}
    assert not torch.equal(whole.body.weight, net().body.weight)

    resumed, second = net(), callback(whole, rule)
    again = trainer(resumed, tmp_path, second, gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.held is not None and second.held.steps == 6
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    for name, mask in first.held.masks.items():
        assert torch.equal(mask, second.held.masks[name])


class Masked(Net):
    """What `Net` is to become, by its definition."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        body = nn.functional.linear(x, self.body.weight * self.masks[0], self.body.bias)
        logits = nn.functional.linear(body.relu(), self.head.weight * self.masks[1], self.head.bias)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_gradients_are_clipped_by_the_norm_of_those_that_count(tmp_path: Path) -> None:
    held, masked = net(), Masked()
    sc.prune_(held, PATTERN)
    masked.load_state_dict(held.state_dict())
    masked.masks = [(masked.body.weight != 0).float(), (masked.head.weight != 0).float()]
    given = SecateurCallback()
    for model, callbacks in ((held, [given]), (masked, [])):
        made = trainer(model, tmp_path, *callbacks, max_grad_norm=0.01, optim="sgd")
        made.train()
    for one, two in zip(held.parameters(), masked.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(held.body.bias, net().body.bias)
    held.body.weight.sum().backward()
    assert (held.body.weight.grad == 1).all(), "the hooks end with the training"


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_a_checkpoint_without_masks_is_named(tmp_path: Path) -> None:
    model = net()
    sc.prune_(model, PATTERN)
    trainer(model, tmp_path, SecateurCallback(), steps=3).train()
    folder = tmp_path / "checkpoint-3"
    (folder / FILE).rename(tmp_path / FILE)
    again = SecateurCallback()
    resuming = trainer(model, tmp_path, again)
    with pytest.raises(ValueError, match=r"without the masks of its hold, .*resume_from=folder"):
        resuming.train(resume_from_checkpoint=str(folder))
    again.resume_from = tmp_path
    trainer(model, tmp_path, again).train(resume_from_checkpoint=str(folder))
    assert again.held is not None and again.held.steps == 6
    sc.check(model, PATTERN)


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"mask/0": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="has no state of a hold: use the file that the callback"):
        read_state(tmp_path / FILE)
    save_file({"mask/0": torch.ones(2)}, tmp_path / FILE, {"secateur": json.dumps({"steps": [3]})})
    assert read_state(tmp_path / FILE)["steps"] == [3]
