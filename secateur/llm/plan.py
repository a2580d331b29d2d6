"""One step of a decoder as a flat list of launches on fixed memory, captured as a CUDA graph.

A block is five launches where its layers can be fused: q, k, v of the normalised stream; attention;
out, added to the stream; gate and up of the normalised stream; down of act(gate) up, added to the
stream. What cannot be fused has launches of its own. The last of a step chooses the most likely
token and writes it where the next step reads its input, so that steps follow one another without
the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.formats.kernels.decode24 import Fusion
from secateur.formats.kernels.decode_step import (
    Bound,
    add_norm,
    attention,
    choose,
    embed,
    gated,
    norm,
)
from secateur.llm.decoder import Block, Decoder, Norm
from secateur.llm.linears import Joined, joined, linear_operations


@dataclass(frozen=True)
class Memory:
    """What a step reads and writes: the cache, the tokens and where they stand."""

    keys: list[Float[Tensor, "batch kv_heads slots head"]]
    values: list[Float[Tensor, "batch kv_heads slots head"]]
    tokens: Int[Tensor, " batch"]
    history: Int[Tensor, "slots batch"]
    position: Int[Tensor, "1"]
    padding: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch vocabulary"]

    @staticmethod
    def of(decoder: Decoder, batch: int, slots: int) -> "Memory":
        """Memory for sequences of up to `slots` tokens.

        Cost: 2 x blocks x batch x kv heads x slots x head numbers, and the logits.
        """

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)

        def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=decoder.device)

        shapes = [(b.attention.kv_heads, slots, b.attention.head) for b in decoder.blocks]
        return Memory(
            [numbers(batch, *shape) for shape in shapes],
            [numbers(batch, *shape) for shape in shapes],
            integers(batch, dtype=torch.int64),
            integers(slots, batch, dtype=torch.int64),
            *(integers(1), integers(batch), numbers(batch, decoder.vocabulary)),
        )

    @property
    def slots(self) -> int:
        return len(self.history)


@dataclass
class Plan:
    """The launches of a step, and the graph of them."""

    decoder: Decoder
    memory: Memory
    operations: list[tuple[str, Bound]] = field(default_factory=list)
    graph: torch.cuda.CUDAGraph | None = None
    _pending: Tensor | None = None  # what has still to be added to the stream

    @staticmethod
    def of(decoder: Decoder, memory: Memory) -> "Plan":
        """The step of this decoder on this memory, captured.

        Raises: RuntimeError if a kernel does not compile or the driver refuses it.
        """
        plan = Plan(decoder, memory)
        plan._lay_out()
        plan._capture()
        return plan

    def run(self) -> None:
        """One step: `tokens` stand at `position`; afterwards `logits` and the next `tokens` do."""
        assert self.graph is not None
        self.graph.replay()

    def _add(self, name: str, *operations: Bound) -> None:
        self.operations.extend((name, operation) for operation in operations)

    def _lay_out(self) -> None:
        decoder, memory = self.decoder, self.memory
        batch = len(memory.tokens)
        stream, normed = (memory.logits.new_zeros(batch, decoder.width) for _ in range(2))
        rotation = decoder.rotation(memory.slots)
        embedded = decoder.embedding.detach(), memory.tokens, *_told(decoder.norm), stream, normed
        self._add("embedding", embed(*embedded))
        for index, block in enumerate(decoder.blocks):
            cache = memory.keys[index], memory.values[index]
            self._add_attention(block, stream, normed, cache, rotation)
            self._add_mlp(block, stream, normed)
        self._add_normed([decoder.head], "head", decoder.norm, stream, normed, memory.logits)
        chosen = choose(memory.logits, memory.tokens, memory.history, memory.position)
        self._add("choice", chosen)
        torch.cuda.synchronize(decoder.device)  # weights are read before kernels wait for others

    def _add_attention(
        self,
        block: Block,
        stream: Tensor,
        normed: Tensor,
        cache: tuple[Tensor, Tensor],
        rotation: tuple[Tensor, Tensor],
    ) -> None:
        what, memory = block.attention, self.memory
        qkv = stream.new_zeros(len(stream), (what.query_heads + 2 * what.kv_heads) * what.head)
        mixed = stream.new_zeros(len(stream), what.query_heads * what.head)
        norms = block.head_weights()
        self._add_normed(block.qkv, "q, k, v", block.before_attention, stream, normed, qkv)
        attend = attention(
            what, qkv, *cache, rotation, norms, memory.position, memory.padding, mixed
        )
        self._add("attention", attend)
        self._add_to_stream(block.out, "out", mixed, "", stream)

    def _add_mlp(self, block: Block, stream: Tensor, normed: Tensor) -> None:
        both = stream.new_zeros(len(stream), 2 * block.inner)
        self._add_normed(block.gate_up, "gate, up", block.before_mlp, stream, normed, both)
        self._add_to_stream(block.down, "down", both, block.activation, stream)

    def _add_normed(
        self,
        layers: Sequence[nn.Module],
        name: str,
        before: Norm,
        stream: Tensor,
        normed: Tensor,
        y: Tensor,
    ) -> None:
        """The layers of the normalised stream: in one launch, or the norm and then the layers."""
        whole, fusion = joined(layers, len(stream)), Fusion(normed=True)
        pending, self._pending = self._pending, None
        if isinstance(whole, Joined) and whole.why_not_fused(len(stream), fusion) is None:
            if pending is not None:
                self._add("sum", _sum(stream, pending))
            self._add(name, whole.into(stream, y, fusion, _told(before)))
            return
        if pending is not None:
            self._add("norm", add_norm(stream, pending, *_told(before), normed))
        else:
            self._add("norm", norm(stream, *_told(before), normed))
        self._add(name, *linear_operations(layers, normed, y))

    def _add_to_stream(
        self, layer: nn.Module, name: str, x: Tensor, gate: str, stream: Tensor
    ) -> None:
        """Add the layer of x, of act(gate) up where there is a gate, to the stream."""
        whole, fusion = joined([layer], len(stream)), Fusion(gate=gate, adds=True)
        if isinstance(whole, Joined) and whole.why_not_fused(len(stream), fusion) is None:
            self._add(name, whole.into(x, stream, fusion))
            return
        if gate:
            gates, ups = x.chunk(2, 1)
            inner = x.new_zeros(gates.shape)
            self._add("gated", gated(gates, ups, gate, inner))
            x = inner
        added = torch.zeros_like(stream)
        self._add(name, *linear_operations([layer], x, added))
        self._pending = added  # the norm that follows adds it

    def _capture(self) -> None:
        device, position = self.decoder.device, self.memory.position
        before = position.clone()
        with torch.cuda.device(device), torch.inference_mode():
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # loads modules and workspaces, which a capture cannot
                self._launch()
                position.copy_(before)
            side.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self._launch()
        torch.cuda.synchronize(device)

    def _launch(self) -> None:
        stream = torch.cuda.current_stream(self.decoder.device).cuda_stream
        for _, operation in self.operations:
            operation(stream)


def _sum(stream: Tensor, added: Tensor) -> Bound:
    def add(handle: int) -> None:
        stream.add_(added)

    return add


def _told(norm: Norm) -> tuple[Tensor, float]:
    return norm.weight.detach(), norm.epsilon
