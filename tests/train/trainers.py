"""Training loops and optimizers as users write them, for laws that hold under all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc

# (the loss of a batch, the optimizer, the hold or None, a batch for each step)
Drive = Callable[[Callable[[Tensor], Tensor], Any, Any, list[Tensor]], None]
Loss = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """One weight of each kind: a convolution over one dimension, a recurrent cell, a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.cell = nn.RNNCell(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.conv(x.view(-1, 2, 8)).unbind(-1)
        state = torch.zeros_like(seen[0])
        for step in seen:
            state = self.cell(step, state)
        out: Tensor = self.head(state)
        return out


def sparse(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Set half of every weight with at least two dimensions to zero; return what is kept."""
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(p.shape, generator=generator) < 0.5
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return masks


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, generator=generator) for _ in range(count)]


def goal(out: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(out, x[:, :4].sin() + x[:, 4:8])


# --- optimizers ----------------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization in its usual form: the weights move twice in a step."""

    def __init__(self, params: Any, rho: float = 0.5) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = torch.optim.AdamW(self.param_groups, lr=0.01)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        each = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in each]).norm() + 1e-12
        for p in each:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        self.first_step()
        loss = closure()
        self.second_step()
        return loss


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon takes matrices alone, so a second optimizer trains the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01)]


def _plain(kind: Any, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: kind(model.parameters(), **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": _plain(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD fused": _plain(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "Adam": _plain(torch.optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": _plain(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "AdamW foreach": _plain(torch.optim.AdamW, lr=0.01, foreach=True),
    "AdamW fused": _plain(torch.optim.AdamW, lr=0.01, fused=True),
    "Adafactor": _plain(torch.optim.Adafactor, lr=0.05),
    "Adadelta": _plain(torch.optim.Adadelta),
    "Adagrad": _plain(torch.optim.Adagrad, lr=0.05),
    "Adamax": _plain(torch.optim.Adamax, lr=0.01),
    "ASGD": _plain(torch.optim.ASGD, lr=0.1),
    "NAdam": _plain(torch.optim.NAdam, lr=0.01),
    "RAdam": _plain(torch.optim.RAdam, lr=0.05),
    "RMSprop": _plain(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Rprop": _plain(torch.optim.Rprop, lr=0.01),
    "Muon": muon,
}


# --- loops ---------------------------------------------------------------------------------------


def all_of(optimizer: Any) -> list[Any]:
    return optimizer if isinstance(optimizer, list) else [optimizer]


def plainly(loss: Loss, optimizer: Any, held: Any, data: list[Tensor]) -> None:
    for x in data:
        for one in all_of(optimizer):
            one.zero_grad()
        loss(x).backward()
        for one in all_of(optimizer):
            one.step()


def accumulating(loss: Loss, optimizer: Any, held: Any, data: list[Tensor]) -> None:
    for x, y in zip(data, reversed(data), strict=True):
        loss(x).backward()
        loss(y).backward()
        for one in all_of(optimizer):
            one.step()
            one.zero_grad()


def in_closures(loss: Loss, optimizer: Any, held: Any, data: list[Tensor]) -> None:
    """As Lightning does: the backward runs inside the step."""
    for x in data:
        for one in all_of(optimizer):

            def closure(one: Any = one, x: Tensor = x) -> Tensor:
                one.zero_grad()
                value = loss(x)
                value.backward()
                return value

            one.step(closure)


def clipping(loss: Loss, optimizer: Any, held: Any, data: list[Tensor]) -> None:
    for x in data:
        for one in all_of(optimizer):
            one.zero_grad()
        (100 * loss(x)).backward()
        if held is not None:
            held.mask_gradients_()
        owned = [p for one in all_of(optimizer) for g in one.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(owned, 1.0)
        for one in all_of(optimizer):
            one.step()


def scaled(loss: Loss, optimizer: Any, held: Any, data: list[Tensor]) -> None:
    """With a GradScaler that skips the second step, whose gradients are infinite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for i, x in enumerate(data):
        for one in all_of(optimizer):
            one.zero_grad()
        scaler.scale(loss(x) * (float("inf") if i == 1 else 1.0)).backward()
        for one in all_of(optimizer):
            scaler.step(one)
        scaler.update()


LOOPS: dict[str, Drive] = {
    "plain": plainly,
    "accumulating": accumulating,
    "closure": in_closures,
    "clipping": clipping,
    "scaler": scaled,
}


def trained(
    make: Callable[[nn.Module], Any], drive: Drive, *, held: bool, steps: int = 4
) -> dict[str, Tensor]:
    """The parameters after some steps with zeros held, or of a model whose forward has W * M."""
    model = net()
    masks = sparse(model)
    parameters = dict(model.named_parameters())
    optimizer = make(model)

    def loss(x: Tensor) -> Tensor:
        if held:
            return goal(model(x), x)
        masked = {n: p * masks[n] if n in masks else p for n, p in parameters.items()}
        return goal(torch.func.functional_call(model, masked, (x,)), x)

    drive(loss, optimizer, sc.hold(model, optimizer) if held else None, inputs(steps))
    return {
        name: (p if held or name not in masks else p * masks[name]).detach()
        for name, p in parameters.items()
    }
