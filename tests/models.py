"""Small models of the kinds that calibration has to walk through."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (p(x)[:, None] for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0])


class Block(nn.Module):
    """A transformer block that takes its mask as a keyword and returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.5)
        self.forwards = 0

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, None]:
        self.forwards += 1
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x)))), None


class Decoder(nn.Module):
    """Embeddings, blocks, head: the shape of a causal language model."""

    def __init__(self, width: int = 16, blocks: int = 3, vocabulary: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            itself = torch.eye(length, dtype=torch.bool, device=input_ids.device)
            mask = mask & attention_mask[:, None, None, :].bool() | itself
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, mask=mask)[0]
        logits: Tensor = self.lm_head(x)
        return logits


class Unchained(nn.Module):
    """Modules of one type whose outputs are changed on the way to the next, so no chain."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x))
        return x


class Caching(nn.Module):
    """Blocks that fill a shared list, as a key-value cache is filled: a replay differs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CachingBlock(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        cache = Cache()
        for block in self.blocks:
            x = block(x, cache)
        return x


class Cache:
    def __init__(self) -> None:
        self.kept: list[Any] = []


class CachingBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.kept.append(x)
        return self.linear(torch.stack(cache.kept).sum(0))


class ConvNet(nn.Module):
    """A stem, two stages of residual blocks, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.stage1 = nn.Sequential(Residual(8), Residual(8))
        self.down = nn.Conv2d(8, 16, 3, stride=2)
        self.stage2 = nn.Sequential(Residual(16), Residual(16))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn(self.conv1(x))))


class Experts(nn.Module):
    """A router that sends each row to one of four experts."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        to = x[:, 0].abs().mul(10).long() % 4
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (to == i).any():
                out[to == i] = expert(x[to == i])
        return out
