"""A prompt read in a few launches a block: the linear layers, torch's attention, kernels between.

The model's own forward launches some 90 kernels a block for it, most of which read and write the
residual stream once more; at Llama-3-8B's sizes they take as long as its linear layers do in 2:4.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from secateur.formats.kernels.decode_step import Bound, add_norm, append, gated, norm
from secateur.llm.decoder import Block, Decoder, Norm
from secateur.llm.linears import Siblings
from secateur.llm.plan import Memory

MOST_ROWS = 8192  # tokens of several sequences that go through a layer together: they take memory


@dataclass(frozen=True)
class Layers:
    """The linear layers of a block, by what they read."""

    qkv: Siblings
    out: Siblings
    gate_up: Siblings
    down: Siblings

    @staticmethod
    def of(block: Block) -> "Layers":
        groups = block.qkv, (block.out,), block.gate_up, (block.down,)
        return Layers(*map(Siblings.of, groups))


@dataclass(frozen=True)
class Prompts:
    """Reads prompts without padding into the memory of a decoder's steps."""

    decoder: Decoder
    layers: tuple[Layers, ...]

    @staticmethod
    def of(decoder: Decoder) -> "Prompts":
        return Prompts(decoder, tuple(map(Layers.of, decoder.blocks)))

    def takes(self, length: int) -> bool:
        """Whether prompts so long can be read: their queries see all keys, and plain scores."""
        kinds = (block.attention for block in self.decoder.blocks)
        return all(kind.window >= length and not kind.cap for kind in kinds)

    @torch.no_grad()
    def read(
        self, ids: Int[Tensor, "batch prompt"], memory: Memory
    ) -> Float[Tensor, "batch vocabulary"]:
        """The logits after the prompts, whose keys and values stand in the memory from slot 0 on.

        Memory: of `MOST_ROWS` tokens, or of one sequence, what the widest layer takes and gives.
        """
        batch, length = ids.shape
        rotation = self.decoder.rotation(length)
        at_once = max(1, MOST_ROWS // length)
        logits = [
            self._logits(ids[first : first + at_once], memory, first, rotation)
            for first in range(0, batch, at_once)
        ]
        memory.position.fill_(length)
        memory.padding.zero_()
        return torch.cat(logits)

    def _logits(
        self, ids: Tensor, memory: Memory, first: int, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        stream = functional.embedding(ids.flatten(), self.decoder.embedding)
        added: Tensor | None = None
        sequences = slice(first, first + len(ids))
        for index, (block, layers) in enumerate(zip(self.decoder.blocks, self.layers, strict=True)):
            cache = memory.keys[index][sequences], memory.values[index][sequences]
            x = _normed(stream, added, block.before_attention)
            added = _attended(block, layers, x, cache, rotation)
            x = _normed(stream, added, block.before_mlp)
            added = _mlp(block, layers, x)
        assert added is not None, "a decoder has blocks"
        last = stream.view(*ids.shape, -1)[:, -1].contiguous()
        of_last = added.view(*ids.shape, -1)[:, -1].contiguous()
        result: Tensor = self.decoder.head(_normed(last, of_last, self.decoder.norm))
        return result


def _normed(stream: Tensor, added: Tensor | None, of: Norm) -> Tensor:
    """The norm of the stream, once what is given has been added to it."""
    y, told = torch.empty_like(stream), (of.weight.detach(), of.epsilon)
    if added is None:
        _launch(norm(stream, *told, y))
    else:
        _launch(add_norm(stream, added, *told, y))
    return y


def _attended(
    block: Block,
    layers: Layers,
    x: Tensor,
    cache: tuple[Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
) -> Tensor:
    what, (keys, values) = block.attention, cache
    widths = [heads * what.head for heads in (what.query_heads, what.kv_heads, what.kv_heads)]
    q, k, v = layers.qkv(x, widths)
    _launch(append(what, q, k, v, keys, values, rotation, block.head_weights()))
    length = len(x) // len(keys)
    of_heads = q.unflatten(1, (what.query_heads, what.head)).unflatten(0, (-1, length))
    mixed = functional.scaled_dot_product_attention(
        of_heads.transpose(1, 2),
        keys[:, :, :length],
        values[:, :, :length],
        is_causal=True,
        scale=what.scale,
        enable_gqa=what.group > 1,
    )
    (result,) = layers.out(mixed.transpose(1, 2).reshape(len(x), -1), [block.width])
    return result


def _mlp(block: Block, layers: Layers, x: Tensor) -> Tensor:
    gate, up = layers.gate_up(x, [block.inner, block.inner])
    y = x.new_empty(len(x), block.inner)
    _launch(gated(gate, up, block.activation, y))
    (result,) = layers.down(y, [block.width])
    return result


def _launch(operation: Bound) -> None:
    operation(torch.cuda.current_stream().cuda_stream)
