"""cuSPARSELt as torch shows it, on a CPU: as strict about its arguments, and as unreliable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from secateur.formats.kernels import (
    cubins,
    cusparselt_child,
    cusparselt_search,
    cusparselt_settings,
)
from secateur.formats.kernels.cusparselt import STEPS, Setting
from secateur.formats.kernels.cusparselt_search import Past, SearchResult

REFUSED = "CUDA error: operation not supported when calling `cusparseLtMatmulAlgSetAttribute`"


@dataclass
class Fake:
    """`us` says what a setting takes, and which settings there are; the rest what they get wrong.

    `in_turns` is what it takes when the fastest are timed again, if that is something else.

    A blob is the dense weight. `seen` are the settings that were called, in order, `tokens` and
    `biases` what they were called with, and `input` is the last of the inputs.
    """

    us: dict[Setting, float]
    in_turns: dict[Setting, float] = field(default_factory=dict)
    wrong: set[Setting] = field(default_factory=set)
    unwritten: set[Setting] = field(default_factory=set)
    few_wrong: set[Setting] = field(default_factory=set)
    now_and_then: set[Setting] = field(default_factory=set)
    wrong_at: dict[Setting, int] = field(default_factory=dict)
    seen: list[Setting] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)
    input: Tensor | None = None

    def compress(self, weight: Tensor) -> Tensor:
        assert weight.is_contiguous() and weight.data_ptr() % 16 == 0
        step = STEPS[weight.dtype]
        assert weight.shape[0] % step == 0 and weight.shape[1] % step == 0
        return weight.clone()

    def sparse_mm(
        self,
        compressed_A: Tensor,
        dense_B: Tensor,
        bias: Tensor | None = None,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        alg_id: int = 0,
        split_k: int = 1,
        split_k_mode: int = -1,
    ) -> Tensor:
        setting = Setting(alg_id, split_k, split_k_mode)
        self.seen.append(setting)
        self.tokens.append(dense_B.shape[1])
        self.biases.append(bias)
        self.input = dense_B.t()
        assert transpose_result and compressed_A.dtype == dense_B.dtype
        assert dense_B.shape[1] % STEPS[dense_B.dtype] == 0
        assert dense_B.t().is_contiguous() and dense_B.data_ptr() % 16 == 0
        assert out_dtype is None or dense_B.dtype == torch.int8
        assert bias is None or bias.data_ptr() % 16 == 0
        assert alpha is None or (alpha.dtype == torch.float32 and alpha.numel() > 1)
        if setting not in self.us:
            raise RuntimeError(f"{REFUSED}\nException raised from a file")
        result = dense_B.t().double() @ compressed_A.double().t()
        result = result if alpha is None else result * alpha
        result = result if bias is None else result + bias
        result = result.to(out_dtype or dense_B.dtype)
        if setting in self.wrong:
            result[-3:, -5:] *= 1.05
        if self.wrong_at.get(setting) == dense_B.shape[1]:
            result[0] += 1
        if setting in self.unwritten:
            result[2, 3] = torch.nan
        if setting in self.few_wrong and len(result) % 64:
            result[0, 0] += 1 + result[:, 0].abs().max()
        if setting in self.now_and_then and self.seen.count(setting) % 5 == 0:
            result[1] = 0
        return result

    def time(
        self, chains: Sequence[Sequence[Callable[[], object]]], device: torch.device, rounds: int
    ) -> list[float]:
        """A setting alone takes `us`; with others in turns `in_turns` where that is known."""
        times = []
        for calls in chains:
            calls[-1]()
            known = self.in_turns if rounds == cusparselt_search.FINAL_ROUNDS else {}
            times.append(known.get(self.seen[-1], self.us[self.seen[-1]]))
        return times


def here(wanted: cusparselt_child.Search, past: Past, crashed: object) -> SearchResult:
    """What a child does, in this process, on weights like a child's."""
    weight = cusparselt_child.random_weight(wanted.case, wanted.device)
    exact = partial(cusparselt_child._exact, weight=weight, wide=torch.float64)
    return cusparselt_search.search(wanted.case, torch._cslt_compress(weight), exact, past)


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, fake: Fake, isolated: bool = False
) -> Fake:
    """The fake in the library's place, an empty cache, and a GPU of 132 SMs to name it by.

    Searches run in this process, which a child would not know of, unless `isolated`.
    """
    if not isolated:
        monkeypatch.setattr(cusparselt_settings, "searched", here)
    monkeypatch.setattr(torch, "_cslt_compress", fake.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", fake.sparse_mm)
    monkeypatch.setattr(cusparselt_search, "_us", fake.time)
    monkeypatch.setattr(cusparselt_search, "copies_on", lambda *arguments: 2)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 702)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found = SimpleNamespace(name="A GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setenv("SECATEUR_CACHE", str(folder))
    forget()
    return fake


def forget() -> None:
    """Clear all that the library remembers in memory, as a new process would begin."""
    for remembered in (
        *(cusparselt_settings._known, cusparselt_settings._crashed),
        *(cusparselt_settings._unsearched, cusparselt_settings._place, cusparselt_settings._kind),
        *(cubins.warn_unkept, cusparselt_settings._warn_unsearched),
    ):
        remembered.cache_clear()
