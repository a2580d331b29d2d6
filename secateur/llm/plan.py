"""One step of a decoder as a flat list of launches on fixed memory, captured as a CUDA graph.

A block is eight launches: norm, q k v, attention, out, norm, gate and up, act(gate) up, down. The
last of a step chooses the most likely token and writes it where the next step reads its input, so
that steps can follow one another without the host.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.formats.kernels.decode_step import (
    Bound,
    add_norm,
    attention,
    choose,
    embed,
    gated,
)
from secateur.llm.decoder import Block, Decoder, Norm
from secateur.llm.linears import linear_operations


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
        """Memory for sequences of so many tokens.

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
        batch, width = len(memory.tokens), decoder.width
        stream, normed, added = (memory.logits.new_zeros(batch, width) for _ in range(3))
        rotation = decoder.rotation(memory.slots)
        first = decoder.blocks[0].before_attention
        self._add(
            "embedding",
            embed(decoder.embedding.detach(), memory.tokens, *_told(first), stream, normed),
        )
        after = [*(block.before_attention for block in decoder.blocks[1:]), decoder.norm]
        for index, (block, norm) in enumerate(zip(decoder.blocks, after, strict=True)):
            cache = memory.keys[index], memory.values[index]
            self._add_attention(block, normed, cache, rotation, added)
            self._add("norm", add_norm(stream, added, *_told(block.before_mlp), normed))
            self._add_mlp(block, normed, added)
            self._add("norm", add_norm(stream, added, *_told(norm), normed))
        self._add("head", *linear_operations([decoder.head], normed, memory.logits))
        chosen = choose(memory.logits, memory.tokens, memory.history, memory.position)
        self._add("choice", chosen)
        torch.cuda.synchronize(decoder.device)  # weights are read before kernels wait for others

    def _add_attention(
        self,
        block: Block,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        rotation: tuple[Tensor, Tensor],
        y: Tensor,
    ) -> None:
        what, memory = block.attention, self.memory
        qkv = x.new_zeros(len(x), (what.query_heads + 2 * what.kv_heads) * what.head)
        mixed = x.new_zeros(len(x), what.query_heads * what.head)
        norms = None
        if block.head_norms is not None:
            of_queries, of_keys = block.head_norms
            norms = of_queries.weight.detach(), of_keys.weight.detach(), of_queries.epsilon
        self._add("q, k, v", *linear_operations(block.qkv, x, qkv))
        attend = attention(
            what, qkv, *cache, rotation, norms, memory.position, memory.padding, mixed
        )
        self._add("attention", attend)
        self._add("out", *linear_operations([block.out], mixed, y))

    def _add_mlp(self, block: Block, x: Tensor, y: Tensor) -> None:
        inner = int(block.down.in_features)  # type: ignore[arg-type]
        both, joined = x.new_zeros(len(x), 2 * inner), x.new_zeros(len(x), inner)
        self._add("gate, up", *linear_operations(block.gate_up, x, both))
        self._add("gated", gated(both, block.activation, joined))
        self._add("down", *linear_operations([block.down], joined, y))

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


def _told(norm: Norm) -> tuple[Tensor, float]:
    return norm.weight.detach(), norm.epsilon
