"""Models that channels are removed from, with sizes that can be chosen, and batches for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two convolutions with BatchNorm, added to their input or to a projection of it."""

    def __init__(self, ins: int, hidden: int, outs: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, outs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.short = nn.Conv2d(ins, outs, 1) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, int] = (8, 12), hidden: tuple[int, int] = (10, 6)):
        super().__init__()
        first, second = widths
        self.stem, self.bn = nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first)
        self.a = Residual(first, hidden[0], first, project=False)
        self.b = Residual(first, hidden[1], second, project=True)
        self.head = nn.Linear(second, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x)), inplace=True), 2)
        return self.head(self.b(self.a(x)).mean((2, 3)))


class ViTBlock(nn.Module):
    """Pre-norm attention with one projection for queries, keys and values, then an MLP."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width: int = 8, heads: int = 4, head_dim: int = 3, hidden: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.block = ViTBlock(width, heads, head_dim, hidden)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.norm(self.block(x))[:, 0])


class Grouped(nn.Module):
    """Attention with grouped queries, product by product, and RMSNorm by hand."""

    def __init__(self, width: int = 8, heads: int = 6, groups: int = 3, head_dim: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, groups, head_dim
        self.weight = nn.Parameter(torch.randn(width))
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, groups * head_dim)
        self.v_proj = nn.Linear(width, groups * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        q = self.q_proj(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (
            p(x).view(batch, tokens, self.num_key_value_heads, self.head_dim).transpose(1, 2)
            for p in (self.k_proj, self.v_proj)
        )
        times = self.num_heads // self.num_key_value_heads
        k = k[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
        v = v.repeat_interleave(times, dim=1)
        scores = (q @ k.transpose(-1, -2)) * self.head_dim**-0.5
        mask = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype).triu(1)
        mixed = (scores + mask).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class Recurrent(nn.Module):
    def __init__(self, hidden: int = 6, norm: int | None = None) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0])


class Branches(nn.Module):
    """Two convolutions side by side, then a depthwise one and GroupNorm over both."""

    def __init__(self, left: int = 6, right: int = 8, groups: int = 7) -> None:
        super().__init__()
        both = left + right
        self.left, self.right = nn.Conv2d(3, left, 3), nn.Conv2d(3, right, 3)
        self.depthwise = nn.Conv2d(both, 2 * both, 3, padding=1, groups=both)
        self.norm = nn.GroupNorm(groups, 2 * both)
        self.mix, self.head = nn.Conv2d(2 * both, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.mix(F.silu(self.norm(self.depthwise(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Words(nn.Module):
    """A language model with a gated MLP whose output embedding is the input embedding."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, width), nn.Embedding(7, width)
        self.norm, self.last = nn.LayerNorm(width), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return self.head(self.last(x + self.down(F.silu(gate) * up)))


def lively(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, with every parameter and statistic at random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.double().eval()


class Odd(nn.Module):
    """A model whose middle is given."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.middle, self.width = middle, width
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


def llama(heads: int = 4, groups: int = 2, hidden: int = 24) -> nn.Module:
    """A language model of transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=4,
        )
    )


def inner_weights(model: nn.Module) -> list[str]:
    """The weights of a llama whose channels are heads or hidden units."""
    inner = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return weights(*(n for n, _ in model.named_modules() if n.split(".")[-1] in inner))


def weights(*layers: str) -> list[str]:
    return [f"{layer}.weight" for layer in layers]


def all_but(model: nn.Module, output: str) -> list[str]:
    """The weights of all linear layers and convolutions but one, whose channels are the output."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return weights(*(name for name in layers if name != output))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def sequences(width: int) -> Tensor:
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1)).double()


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
