"""Zeros under Lightning's Trainer, through its checkpoints; where Lightning is installed."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.train.schedules import cubic

WHY = "needs lightning, which make test does not install"
pytestmark = pytest.mark.filterwarnings("ignore")  # of lightning, which has many

PATTERN = "unstructured:0.5@layer"


def lightning() -> Any:
    return importlib.import_module("lightning.pytorch")


def net() -> Any:
    pl = lightning()

    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 2)
            self.norms: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, labels = batch
            return nn.functional.cross_entropy(self.head(self.body(x).relu()), labels)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    torch.manual_seed(0)
    return Net()


def rows() -> torch.utils.data.DataLoader[Any]:
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    pairs = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    return torch.utils.data.DataLoader(pairs, batch_size=4)


def trainer(folder: Path, epochs: int, *callbacks: Any) -> Any:
    pl = lightning()
    saving = pl.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_epochs=1)
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saving, *callbacks], gradient_clip_val=0.5,
    )  # fmt: skip


def callback(model: Any, rule: bool) -> Any:
    from secateur.integrations.lightning import SecateurCallback

    if not rule:
        return SecateurCallback()
    return SecateurCallback(sc.gradual(sc.plan(model, PATTERN), cubic(0.5, 0, 12), every=2))


@pytest.mark.parametrize("rule", [False, True])
def test_a_training_that_resumes_equals_one_that_did_not_stop(rule: bool, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason=WHY)
    whole, parts = net(), net()
    for model in (whole, parts):
        if not rule:
            sc.prune_(model, PATTERN)
    trainer(tmp_path / "whole", 2, callback(whole, rule)).fit(whole, rows())
    trainer(tmp_path / "parts", 1, callback(parts, rule)).fit(parts, rows())
    (checkpoint,) = (tmp_path / "parts").glob("*.ckpt")
    resumed, again = net(), trainer(tmp_path / "resumed", 2)
    again.callbacks.append(last := callback(resumed, rule))
    if not rule:
        sc.prune_(resumed, PATTERN)
    again.fit(resumed, rows(), ckpt_path=checkpoint)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for layer in (resumed.body, resumed.head):
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
    assert last.held is not None and len(again.optimizers[0].param_groups[0]["params"]) == 4
    with torch.no_grad():  # nothing holds afterwards
        resumed.body.weight.fill_(1)
    again.optimizers[0].step()
    assert bool((resumed.body.weight != 0).all())


def test_clipping_sees_the_kept_weights_alone(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason=WHY)
    model = net()
    sc.prune_(model, PATTERN)
    kept = {name: p != 0 for name, p in model.named_parameters() if p.dim() == 2}
    x, labels = next(iter(rows()))
    nn.functional.cross_entropy(model.head(model.body(x).relu()), labels).backward()
    norms = [
        (p.grad * kept[name] if name in kept else p.grad).norm()
        for name, p in model.named_parameters()
        if p.grad is not None
    ]
    model.zero_grad()
    trainer(tmp_path, 1, callback(model, False)).fit(model, rows())
    assert model.norms[0] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-5)


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason=WHY)
    model = net()
    sc.prune_(model, PATTERN)
    trainer(tmp_path / "plain", 1).fit(model, rows())
    (checkpoint,) = (tmp_path / "plain").glob("*.ckpt")
    other = trainer(tmp_path / "held", 2, callback(model, False))
    with pytest.raises(ValueError, match="without the masks of its hold: begin a new training"):
        other.fit(model, rows(), ckpt_path=checkpoint)
