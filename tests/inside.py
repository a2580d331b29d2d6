"""Models whose blocks hold matrices inside other modules' parameters, with batches for them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.model.test_einsum import xlnet
from tests.model.test_experts import mixture, rows

WIDTH = 16


class Recurrent(nn.Module):
    """A block with a recurrent module and an MLP, each added to the residual stream."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.rnn = kind(WIDTH, WIDTH, batch_first=True)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.rnn(self.norm1(x))[0]
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))


def attentive() -> nn.Module:
    """Two of torch's encoder layers."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.1)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def recurrent(kind: type[nn.RNNBase]) -> nn.Module:
    return nn.Sequential(nn.Sequential(Recurrent(kind), Recurrent(kind)))


KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Qwen3Moe": (mixture, "model.layers.0.mlp.experts.down_proj.1"),
    "Mixtral": (partial(mixture, "Mixtral"), "model.layers.0.mlp.experts.gate_up_proj.2"),
    "GptOss": (partial(mixture, "GptOss"), "model.layers.0.mlp.experts.gate_up_proj.0"),
    "attention": (attentive, "layers.0.self_attn.in_proj_weight.k"),
    "LSTM": (partial(recurrent, nn.LSTM), "0.0.rnn.weight_hh_l0"),
    "GRU": (partial(recurrent, nn.GRU), "0.1.rnn.weight_ih_l0"),
    "XLNet": (xlnet, "layer.0.rel_attn.v"),
}  # by kind, and the name of a layer there


def problem(kind: str, count: int = 8) -> tuple[nn.Module, list[Tensor]]:
    """A model of this kind in eval mode, and so many batches."""
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    if hasattr(model, "config"):
        return model, rows(count)
    generator = torch.Generator().manual_seed(1)
    mix = torch.linspace(2, 0.1, WIDTH).diag() @ torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    return model, [torch.randn(8, 9, WIDTH, generator=generator) @ mix for _ in range(count)]


def output(model: nn.Module, batch: Tensor) -> Tensor:
    """What the last block gives."""
    with torch.no_grad():
        if hasattr(model, "config"):
            found: Tensor = getattr(model, "model", model)(batch)[0]
        else:
            found = model(batch)
    return found
