"""The kernels between the linear layers, on a GPU, held to float64."""

from itertools import product

import pytest
import torch
from torch import Tensor

from secateur.formats.kernels.decode_step import (
    Attention,
    add_norm,
    append,
    attention,
    choose,
    embed,
    gated,
    why_no_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SLOTS = 1280
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, SLOTS - 1)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def launched(bound) -> None:  # type: ignore[no-untyped-def]
    bound(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()


class Case:
    """Random arguments of `attention`, and what it has to give, in float64."""

    def __init__(
        self, what: Attention, batch: int, length: int, dtype: torch.dtype, padding: int
    ) -> None:
        head, total = what.head, what.query_heads + 2 * what.kv_heads
        self.what, self.length = what, length
        self.qkv = numbers(batch, total * head, dtype=dtype, seed=1)
        self.keys = numbers(batch, what.kv_heads, SLOTS, head, dtype=dtype, seed=2)
        self.values = numbers(batch, what.kv_heads, SLOTS, head, dtype=dtype, seed=3)
        self.keys[:, :, length:] = torch.nan  # what lies behind the position is never read
        self.values[:, :, length:] = torch.nan
        angles = torch.arange(SLOTS, device="cuda")[:, None] / 100.0 ** (
            torch.arange(head // 2, device="cuda") / (head // 2)
        )
        self.rotation = angles.cos().float(), angles.sin().float()
        weights = numbers(2, head, dtype=dtype, seed=4)
        self.norms = (weights[0].clone(), weights[1].clone(), 1e-6) if what.normed else None
        self.position = torch.tensor([length], dtype=torch.int32, device="cuda")
        skipped = [min(padding * i, length) for i in range(batch)]
        self.padding = torch.tensor(skipped, dtype=torch.int32, device="cuda")

    def run(self) -> Tensor:
        what = self.what
        y = self.qkv.new_full((len(self.qkv), what.query_heads * what.head), torch.nan)
        launched(
            attention(
                *(what, self.qkv, self.keys, self.values, self.rotation, self.norms),
                *(self.position, self.padding, y),
            )
        )
        return y

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the new keys and values."""
        what, head, batch = self.what, self.what.head, len(self.qkv)
        q, k, v = (
            self.qkv.double()
            .view(batch, -1, head)
            .split([what.query_heads, what.kv_heads, what.kv_heads], 1)
        )
        if self.norms is not None:
            of_queries, of_keys, epsilon = self.norms
            q, k = normed(q, of_queries, epsilon), normed(k, of_keys, epsilon)
        at = (self.length - self.padding).long()
        turn = [table[at].double()[:, None] for table in self.rotation]
        q, k = rotated(q, *turn), rotated(k, *turn)
        stored = k.to(self.qkv.dtype)
        results = []
        for i in range(batch):
            first = max(int(self.padding[i]), self.length - what.window + 1)
            keys = torch.cat([self.keys[i, :, first : self.length].double(), stored[i, :, None]], 1)
            values = torch.cat([self.values[i, :, first : self.length].double(), v[i, :, None]], 1)
            groups = what.query_heads // what.kv_heads
            keys, values = (t.repeat_interleave(groups, 0) for t in (keys, values))
            scores = torch.einsum("hd,hkd->hk", q[i], keys) * what.scale
            if what.cap:
                scores = what.cap * (scores / what.cap).tanh()
            results.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), values).flatten())
        return torch.stack(results), stored, v


KINDS = {
    "llama": Attention(32, 8, 128, 128**-0.5),
    "one head a group": Attention(4, 4, 64, 0.125),
    "two": Attention(4, 2, 128, 0.1),
    "seven": Attention(28, 4, 128, 128**-0.5),
    "eight": Attention(16, 2, 64, 0.125),
    "normed": Attention(16, 8, 128, 128**-0.5, normed=True),
    "gemma": Attention(8, 4, 256, 256**-0.5, window=200, cap=30.0),
    "window": Attention(8, 2, 128, 128**-0.5, window=129),
}


@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.bfloat16), (5, torch.float16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_right(kind: str, batch: int, dtype: torch.dtype) -> None:
    what = KINDS[kind]
    if (problem := why_no_attention(what, torch.device("cuda"))) is not None:
        pytest.skip(problem)
    for length, padding in product(LENGTHS, (0, 37)):
        case = Case(what, batch, length, dtype, padding)
        exact, key, value = case.exact()
        y = case.run().double()
        eps = torch.finfo(dtype).eps
        # one rounding of the result; a stored key's last bit moves a score by its share of it
        error, most = (y - exact).abs().max(), 2 * eps * exact.abs().max()
        assert error <= most, (kind, length, padding, float(error), float(most))
        told = case.keys[:, :, length].double()
        # the last bit of a key that lies between two numbers of 16 bits may be either's
        assert (told - key.double()).abs().max() <= eps * key.double().abs().max()
        assert torch.equal(case.values[:, :, length].double(), value.double())
        assert torch.equal(case.run().double(), y)


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_a_chain_of_attention_keeps_its_order(batch: int) -> None:
    """Replayed with dependent launches: each reads what the one before wrote."""
    what = KINDS["two"]
    if (problem := why_no_attention(what, torch.device("cuda"))) is not None:
        pytest.skip(problem)
    case = Case(what, batch, 700, torch.bfloat16, 3)
    alone = case.run()
    y = torch.zeros_like(alone)
    told = what, case.qkv, case.keys, case.values, case.rotation, case.norms
    bound = attention(*told, case.position, case.padding, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            y.zero_()
            bound(torch.cuda.current_stream().cuda_stream)
            bound(torch.cuda.current_stream().cuda_stream)
    graph.replay()
    assert torch.equal(y, alone)


@pytest.mark.parametrize("apart", [False, True], ids=["one tensor", "three tensors"])
@pytest.mark.parametrize("tokens", [1, 3, 130])
@pytest.mark.parametrize("kind", ["llama", "one head a group", "normed", "gemma"])
def test_prompts_are_appended(kind: str, tokens: int, apart: bool) -> None:
    what, batch = KINDS[kind], 3
    case = Case(what, batch * tokens, 0, torch.bfloat16, 0)
    heads, eps = (what.query_heads, what.kv_heads, what.kv_heads), torch.finfo(torch.bfloat16).eps
    given = case.qkv.split([n * what.head for n in heads], 1)
    exact = [t.double().view(batch, tokens, n, -1) for t, n in zip(given, heads, strict=True)]
    if case.norms is not None:
        exact[:2] = [normed(x, w, 1e-6) for x, w in zip(exact[:2], case.norms[:2], strict=True)]
    turn = [table[:tokens].double()[:, None] for table in case.rotation]
    exact[:2] = [rotated(x, *turn) for x in exact[:2]]
    q, k, v = (t.clone() for t in given) if apart else given
    shape = batch, what.kv_heads, tokens + 5, what.head
    keys, values = (q.new_full(shape, torch.nan) for _ in range(2))
    launched(append(what, q, k, v, keys, values, case.rotation, case.norms))
    found = [q.reshape(batch, tokens, -1, what.head)]
    found += [cache[:, :, :tokens].transpose(1, 2) for cache in (keys, values)]
    for mine, wanted in zip(found, exact, strict=True):
        # one rounding, of a difference of two products whose size is that of a pair
        size = wanted.abs() + wanted.roll(what.head // 2, -1).abs()
        assert ((mine.double() - wanted).abs() <= eps / 2 * size + 1e-6).all()
    assert torch.equal(found[2].double(), exact[2])
    assert bool(keys[:, :, tokens:].isnan().all() and values[:, :, tokens:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 4096), (2, 5120), (1, 16384)])
def test_norms_are_right(rows: int, width: int, dtype: torch.dtype) -> None:
    stream, added, weight = (
        numbers(rows, width, dtype=dtype),
        numbers(rows, width, dtype=dtype, seed=1),
        numbers(width, dtype=dtype, seed=2),
    )
    y, eps = torch.empty_like(stream), torch.finfo(dtype).eps
    kept = (stream.double() + added.double()).to(dtype)
    launched(add_norm(stream, added, weight, 1e-5, y))
    exact = normed(kept.double(), weight, 1e-5)
    assert torch.equal(stream, kept)
    assert ((y.double() - exact).abs() <= eps / 2 * exact.abs() + 1e-6).all()
    tokens = torch.tensor([7, 0, 5][:rows], device="cuda")
    table = numbers(8, width, dtype=dtype, seed=3)
    launched(embed(table, tokens, weight, 1e-5, stream, y))
    exact = normed(table[tokens].double(), weight, 1e-5)
    assert torch.equal(stream, table[tokens])
    assert ((y.double() - exact).abs() <= eps / 2 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 14336), (64, 1000)])
def test_gated_activations_are_right(activation: str, rows: int, width: int) -> None:
    both = numbers(rows, 2 * width) * 3
    y = both.new_empty(rows, width)
    gate, up = both.chunk(2, 1)
    launched(gated(gate, up, activation, y))
    gate, up = gate.double(), up.double()
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    exact = functions[activation](gate) * up
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 128256), (5, 1001), (64, 32000), (1, 7)])
def test_the_most_likely_token_is_chosen(rows: int, vocabulary: int) -> None:
    logits = numbers(rows, vocabulary)
    logits[0, vocabulary // 2] = logits[0, 3] = logits.max() + 1  # ties go to the first
    tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")
    history = torch.zeros(9, rows, dtype=torch.int64, device="cuda")
    position = torch.tensor([4], dtype=torch.int32, device="cuda")
    bound = choose(logits, tokens, history, position)
    for step in range(3):
        launched(bound)
        assert torch.equal(tokens, logits.float().argmax(-1)) and int(tokens[0]) == 3
        assert torch.equal(history[4 + step], tokens) and int(position) == 5 + step
        logits[1:] = logits[1:].roll(1, -1)
