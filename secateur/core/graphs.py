"""CUDA graphs of work that is done again and again on tensors of the same shapes.

Where layers are small, starting a kernel takes longer than what it does. A graph starts all of them
at once, on the memory that it was captured with: what changes from time to time is copied there.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.core.autocast import autocast_dtype
from secateur.core.interrupts import putting_back

# Threads share the graphs, and torch allows one capture at a time.
ONE_AT_A_TIME = threading.Lock()

ERROR = 2  # of `torch.cuda.set_sync_debug_mode`


def captured(run: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    """The call as a CUDA graph. Hold `ONE_AT_A_TIME` meanwhile.

    Raises: RuntimeError if the call waits for the GPU, which no graph can.
    """
    side = _side_stream(stream.device)
    side.wait_stream(stream)
    with torch.cuda.stream(side), _as_if_captured():
        run()  # libraries initialise at their first call, which cannot be captured
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
    ):
        run()
    return graph.replay


class Replayed:
    """A function of a tree of tensors, replayed as a CUDA graph from its second call on.

    The function reads nothing else but what stays in its place, such as weights that an optimizer
    changes, and what it returns is overwritten by the next call. It is called as it is on other
    devices, under autocast, for tensors of other shapes than those of the first two calls that were
    alike, and for ever where it cannot be captured, as when it waits for the GPU.

    Cost: the memory of one call, kept as long as this is.
    """

    def __init__(self, run: Callable[[Any], Sequence[Tensor | None]], device: torch.device) -> None:
        self._run, self._device = run, device
        self._captures = can_capture(device)
        self._last: list[Any] = []
        self._memory: list[Any] | None = None
        self._replay: Callable[[], None] | None = None
        self._returned: Sequence[Tensor | None] = ()

    def __call__(self, tree: Any) -> Sequence[Tensor | None]:
        """What the function returns for the tree."""
        if not self._captures:
            return self._run(tree)
        leaves, spec = pytree.tree_flatten(tree)
        like = [spec, *map(_kind, leaves)]
        if self._replay is None and like == self._last and autocast_dtype(self._device) is None:
            self._capture(leaves, spec)
        if self._replay is None or like != self._last:
            self._last = self._last if self._replay else like
            return self._run(tree)
        assert self._memory is not None
        for own, leaf in zip(self._memory, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(leaf, non_blocking=True)
        self._replay()
        return self._returned

    def _capture(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        with torch.inference_mode(False):
            memory = [_copied(leaf, self._device) for leaf in leaves]

            def run() -> None:
                self._returned = self._run(pytree.tree_unflatten(memory, spec))

            try:
                with ONE_AT_A_TIME:
                    self._replay = captured(run, torch.cuda.current_stream(self._device))
                self._memory = memory
            except Exception:  # whatever the model raises: a call that fails by itself does so next
                self._captures = False


def can_capture(device: torch.device) -> bool:
    """Whether work on the device can be captured: on a GPU, by a process that is alone."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return device.type == "cuda" and alone


def _kind(leaf: Any) -> Any:
    """What of a leaf a graph cannot have otherwise."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return leaf if isinstance(leaf, (bool, int, float, str)) else id(leaf)


def _copied(leaf: Any, device: torch.device) -> Any:
    return leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf


@contextlib.contextmanager
def _as_if_captured() -> Iterator[None]:
    """Raise RuntimeError where the host would wait for the GPU, and tell code that asks so.

    A capture that is broken off leaves torch's allocator in a state of its own. Models avoid to
    wait while they are captured, so they are told that they are.
    """
    with putting_back() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch warns that it does not see every wait
        stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
        stack.callback(setattr, torch.cuda, _ASKED, getattr(torch.cuda, _ASKED))
        torch.cuda.set_sync_debug_mode(ERROR)
        setattr(torch.cuda, _ASKED, lambda: True)
        yield


_ASKED = "is_current_stream_capturing"


def is_captured(device: torch.device) -> bool:
    """Whether this call is being captured, and so must not wait for the GPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps memory for every stream it is called on."""
    return torch.cuda.Stream(device)
