"""A decoder as the step of our own kernels needs it, read from a model's modules.

Read by the names that transformers' families share (`self_attn.q_proj`, `mlp.gate_proj`, ...), and
believed only as far as it goes: every parameter of the model has to be among those that were read,
and the first step's logits are compared with the model's own (`kernel_steps`). A factor that no
module shows, or a norm of another kind, is found there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.formats.kernels.decode_step import ACTIVATIONS, Attention
from secateur.formats.kernels.decode_step.attention import WITHOUT_WINDOW

GATES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class NotRead(ValueError):
    """The model is no decoder of the kind that is known here; the message says what differs."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: its weight, and what is added to the mean square."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Block:
    """A block: what reads one input stands together, in the order of its results."""

    before_attention: Norm
    qkv: tuple[nn.Module, ...]
    head_norms: tuple[Norm, Norm] | None
    attention: Attention
    out: nn.Module
    before_mlp: Norm
    gate_up: tuple[nn.Module, ...]
    activation: str
    down: nn.Module

    @property
    def width(self) -> int:
        return int(self.out.out_features)  # type: ignore[arg-type]

    @property
    def inner(self) -> int:
        """The width between gate, up and down."""
        return int(self.down.in_features)  # type: ignore[arg-type]

    def head_weights(self) -> tuple[Tensor, Tensor, float] | None:
        """The weights of the norms of queries and keys, and their epsilon, where there are any."""
        if self.head_norms is None:
            return None
        of_queries, of_keys = self.head_norms
        return of_queries.weight.detach(), of_keys.weight.detach(), of_queries.epsilon

    def modules(self) -> Iterator[nn.Module]:
        yield from (*self.qkv, self.out, *self.gate_up, self.down)

    def norms(self) -> Iterator[Norm]:
        yield from (self.before_attention, self.before_mlp, *(self.head_norms or ()))


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model with rotary positions, RMS norms and gated MLPs."""

    embedding: Tensor
    blocks: tuple[Block, ...]
    norm: Norm
    head: nn.Module
    rotary: nn.Module
    vocabulary: int

    @property
    def width(self) -> int:
        return int(self.embedding.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer that a step reads."""
        modules = [*(m for block in self.blocks for m in block.modules()), self.head]
        norms = [*(n for block in self.blocks for n in block.norms()), self.norm]
        of_modules = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        return [self.embedding, *of_modules, *(norm.weight for norm in norms)]

    def rotation(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions from 0 on, [positions, head / 2], in float32.

        In the model's own precision: they are rounded to its dtype, as its forward does.

        Raises: NotRead if the positions are asked for in another way, or for parts of a head.
        """
        counted = torch.arange(positions, device=self.device)[None]
        like = torch.zeros(1, dtype=self.dtype, device=self.device)
        try:
            cosines, sines = self.rotary(like, counted)
        except TypeError as problem:
            raise NotRead(f"its rotary positions are asked for otherwise: {problem}") from None
        half = self.blocks[0].attention.head // 2
        if cosines.shape[-1] != 2 * half:
            raise NotRead(f"it rotates {cosines.shape[-1]} of a head's {2 * half} numbers")
        return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()


def read_decoder(model: nn.Module) -> Decoder:
    """The decoder that this model is.

    Raises: NotRead where it has other parts, or parameters that none of them is.
    """
    inner = _part(model, "model")
    config = _part(model, "config")
    rotary = _part(inner, "rotary_emb")
    kind = getattr(rotary, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise NotRead(f"its rotary positions are {kind}: they change with the number of tokens")
    embedding = _part(inner, "embed_tokens")
    layers = _part(inner, "layers")
    blocks = tuple(_block(layer, config) for layer in layers)
    head = _part(model, "lm_head")
    decoder = Decoder(
        *(_part(embedding, "weight"), blocks, _norm(_part(inner, "norm")), head, rotary),
        vocabulary=int(_part(head, "out_features")),
    )
    known = {id(tensor) for tensor in decoder.tensors()}
    unknown = [name for name, tensor in model.named_parameters() if id(tensor) not in known]
    if unknown:
        raise NotRead(f"{len(unknown)} of its parameters are unknown here, {unknown[0]} among them")
    return decoder


def _block(layer: nn.Module, config: object) -> Block:
    attention, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
    query_heads = int(_part(config, "num_attention_heads"))
    kv_heads = int(getattr(config, "num_key_value_heads", None) or query_heads)
    head = int(_part(attention, "head_dim"))
    norms = None
    if hasattr(attention, "q_norm"):
        norms = _norm(attention.q_norm), _norm(_part(attention, "k_norm"))
        if len(norms[0].weight) != head:
            raise NotRead("queries and keys are normalised over all heads, not over each")
    return Block(
        _norm(_part(layer, "input_layernorm")),
        _together(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        norms,
        Attention(
            *(query_heads, kv_heads, head, float(_part(attention, "scaling"))),
            window=int(getattr(attention, "sliding_window", None) or WITHOUT_WINDOW),
            cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
            normed=norms is not None,
        ),
        _part(attention, "o_proj"),
        _norm(_part(layer, "post_attention_layernorm")),
        _together(mlp, "gate_up_proj", ("gate_proj", "up_proj")),
        _activation(config),
        _part(mlp, "down_proj"),
    )


def _together(module: nn.Module, whole: str, parts: tuple[str, ...]) -> tuple[nn.Module, ...]:
    """The layer that gives all results, or those that give one each."""
    if isinstance(one := getattr(module, whole, None), nn.Module):
        return (one,)
    return tuple(_part(module, part) for part in parts)


def _activation(config: object) -> str:
    name = getattr(config, "hidden_activation", None) or _part(config, "hidden_act")
    if name not in GATES:
        raise NotRead(f"its MLPs have {name}, known are {', '.join(ACTIVATIONS)}")
    return GATES[name]


def _norm(module: nn.Module) -> Norm:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight: Float[Tensor, " width"] | None = getattr(module, "weight", None)
    if epsilon is None or weight is None or getattr(module, "bias", None) is not None:
        raise NotRead(f"{type(module).__name__} is no RMS norm with a weight")
    return Norm(weight, float(epsilon))


def _part(of: object, name: str) -> Any:
    if (found := getattr(of, name, None)) is None:
        raise NotRead(f"{type(of).__name__} has no {name}")
    return found
