"""A layer's call without its operator, for when nothing could tell the difference but a clock.

The operator is there for compilers, autograd, transforms and observers. Where none of them looks,
it is Python between a small input and a kernel of some ten microseconds, and it and what it touches
have left the caches by the next call, since a model's weights have passed through them.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey as Key
from torch._C import DispatchKeySet as Keys
from torch.autograd import forward_ad, profiler

from secateur.formats.contract import Packed, Run
from secateur.formats.op import table

# Of a tensor about which nothing is special; one of inference mode has no more than the first two.
PLAIN_KEYS = Keys(Key.CPU) | Keys(Key.AutocastCPU)
PLAIN = frozenset(
    keys.raw_repr()
    for keys in (PLAIN_KEYS, PLAIN_KEYS | Keys(Key.AutogradCPU) | Keys(Key.ADInplaceOrView))
)


def is_plain(x: Any) -> bool:
    """Whether x is an ordinary tensor on the CPU: no subclass, nothing that a transform wraps."""
    return type(x) is Tensor and torch._C._dispatch_keys(x).raw_repr() in PLAIN


def is_watched() -> bool:
    """Whether something in this thread follows, changes or counts operators on plain tensors.

    Function transforms are not asked for: they wrap what they change. Compilers are asked for
    before this, which they would have to compile.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._is_tracing()
        or torch._C._is_any_autocast_enabled()
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
    )


@dataclass(frozen=True)
class Direct:
    """A layer's calls without the operator: laid out for the very tensors that it holds."""

    rows: tuple[tuple[int, Run | None], ...]
    weight: tuple[tuple[str, weakref.ref[Tensor], int], ...]
    bias: tuple[weakref.ref[Tensor], int] | None

    @staticmethod
    def of(packed: Packed, bias: Tensor | None, dispatch: str) -> "Direct | None":
        """The calls of a weight, or None where its tensors are not such as kernels read."""
        tensors = [*packed.tensors.values(), *(() if bias is None else (bias,))]
        if not all(is_plain(tensor.detach()) and tensor.is_contiguous() for tensor in tensors):
            return None
        if bias is not None and bias.dtype != packed.dtype:
            return None
        rows = list[tuple[int, Run | None]]()
        for most, entry in table(dispatch, packed.format.implementations):
            if entry.bind is not None and packed.tensors.keys() >= {*entry.reads(packed.format)}:
                bound = entry.bind(packed, bias)
                rows.append((min(most, bound.most), bound.run))
            if not rows or rows[-1][0] < most:
                rows.append((most, None))
        return Direct(
            tuple(rows),
            tuple((name, weakref.ref(t), t.data_ptr()) for name, t in packed.tensors.items()),
            None if bias is None else (weakref.ref(bias), bias.data_ptr()),
        )

    def is_of(self, buffers: Mapping[str, Tensor | None], bias: Tensor | None) -> bool:
        """Whether these tensors are still those, where they were."""
        for name, known, address in self.weight:
            tensor = buffers.get(name)
            if tensor is None or tensor is not known() or tensor.data_ptr() != address:
                return False
        if self.bias is None or bias is None:
            return self.bias is None and bias is None
        known, address = self.bias
        return bias is known() and bias.data_ptr() == address

    def run(self, tokens: int) -> Run | None:
        """The call for so many tokens, or None: the operator's."""
        for most, run in self.rows:
            if tokens <= most:
                return run
        return None
