"""Perplexity, agreement, cosine and accuracy against figures computed by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.model import evaluate
from secateur.model.evaluate import accuracy, compare, embedding_cosine, perplexity


class Bigram(nn.Module):
    """Logits of the next token are a row of a table, chosen by the token alone."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(probabilities).log())

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class ByContext(nn.Module):
    """A token that has k tokens before it in its window costs exactly k / 8 nats."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.seen.append((int(ids[0, 0]), int(ids[0, -1])))
        cost = torch.arange(1, ids.shape[1] + 1).float() / 8
        wrong = (cost.exp() - 1).log()  # -log softmax([0, wrong])[0] = log(1 + e^wrong) = cost
        logits = torch.full((*ids.shape, 64), -torch.inf)
        logits[..., :32] = -math.log(32)  # ids 0..31 share the probability of being right
        logits[..., 63] = wrong
        return logits


def counting(tokens: int) -> Tensor:
    return torch.arange(tokens)[None]


def same_cost(k: float) -> float:
    """The cost of one token under `ByContext`: log 32 more for its share among 32 right answers."""
    return k / 8 + math.log(32)


def test_perplexity_of_a_bigram_model_is_the_mean_of_its_log_probabilities() -> None:
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    rows = [torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([[0, 0]], dtype=torch.int16)]
    found = perplexity(model, rows)
    expected = -sum(map(math.log, [0.5, 0.75, 0.25, 0.5, 0.5])) / 5
    assert found.tokens == 5
    assert found.nll == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


def test_perplexity_beyond_floats_is_infinite() -> None:
    assert evaluate.Perplexity(800.0, 1).perplexity == math.inf


@pytest.mark.parametrize(
    ("window", "stride", "windows", "contexts"),
    [
        (None, None, [(0, 6)], [1, 2, 3, 4, 5, 6, 7]),
        (7, 3, [(0, 6)], [1, 2, 3, 4, 5, 6, 7]),
        (50, None, [(0, 6)], [1, 2, 3, 4, 5, 6, 7]),
        # windows that advance by their width; the last is moved back to have full context
        (3, None, [(0, 2), (3, 5), (4, 6)], [1, 2, 3, 1, 2, 3, 3]),
        (4, 2, [(0, 3), (2, 5), (3, 6)], [1, 2, 3, 4, 3, 4, 4]),
        (4, 1, [(0, 3), (1, 4), (2, 5), (3, 6)], [1, 2, 3, 4, 4, 4, 4]),
        (1, 1, [(i, i) for i in range(7)], [1] * 7),
    ],
)
def test_every_token_but_the_first_counts_once_with_the_context_of_its_window(
    window: int | None,
    stride: int | None,
    windows: list[tuple[int, int]],
    contexts: list[int],
) -> None:
    model = ByContext()
    found = perplexity(model, [counting(8)], window=window, stride=stride)
    assert model.seen == windows
    assert found.tokens == 7
    assert found.nll == pytest.approx(sum(map(same_cost, contexts)) / 7, rel=1e-6)


def test_perplexity_equals_the_loss_that_transformers_computes() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    generator = torch.Generator().manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(50, (3, 17), generator=generator)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    found = perplexity(model, ids.split(2))
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.tokens == 3 * 16
    assert model.training and model.config.use_cache


def test_long_rows_are_summed_in_chunks_without_a_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    ids = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0, 1, 0]])
    whole = perplexity(model, [ids])
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 3 * 2)
    assert perplexity(model, [ids]).nll == pytest.approx(whole.nll, rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "perplexity needs at least one batch, got none"),
        (counting(4), {}, r"needs an iterable of batches, got one Tensor: wrap it in a list"),
        (
            [torch.arange(4)],
            {},
            r"torch.int64 \[4\] for batch 0: give a single document as ids",
        ),
        ([torch.ones(1, 3)], {}, r"got torch.float32 \[1, 3\] for batch 0"),
        ([counting(1)], {}, "needs rows of at least 2 tokens, got only shorter ones"),
        ([counting(4)], {"stride": 2}, "needs a window for stride 2: pass window= too"),
        ([counting(4)], {"window": 2, "stride": 3}, "got stride 3 and window 2"),
        ([counting(4)], {"window": 0}, "needs 1 <= stride <= window, got stride None and window 0"),
        ([counting(4), counting(4) + 70], {}, r"needs ids in \[0, 64\), got 71 to 73 in batch 1"),
    ],
)
def test_perplexity_errors(rows: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(ByContext(), rows, **options)


@pytest.mark.parametrize(("given", "kind"), [(3.0, "float"), (None, "none")])
def test_what_cannot_be_iterated_over_is_named(given: Any, kind: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=f"perplexity needs an iterable of batches, got {kind}: "):
        perplexity(ByContext(), given)


def test_perplexity_names_the_batch_with_nan_or_impossible_tokens() -> None:
    model = Bigram([[0.5, 0.5], [0.0, 1.0]])
    fine, impossible = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    with pytest.raises(ValueError, match="finite logits, batch 1 gives a token the probability 0"):
        perplexity(model, [fine, impossible])
    model.table.weight[1] = math.nan
    with pytest.raises(ValueError, match="batch 2 gave 2 NaN of 4"):
        perplexity(model, [fine, fine, torch.tensor([[0, 1, 1]])])
    pooling = nn.Sequential(nn.Embedding(2, 3), nn.Flatten(1))
    with pytest.raises(ValueError, match=r"\] for \(1, 1\) ids, got \(1, 3\) for batch 0"):
        perplexity(pooling, [fine])


# --- compare -------------------------------------------------------------------------------------

UNSURE, SURE, OTHER = [0.5, 0.5], [0.75, 0.25], [0.25, 0.75]


def test_compare_is_the_mean_divergence_and_agreement_of_unpadded_tokens() -> None:
    dense, model = Bigram([SURE, SURE]), Bigram([SURE, OTHER])
    ids = torch.tensor([[0, 1], [0, 1]])
    one = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    found = compare(model, dense, [ids])
    assert (found.tokens, found.top1) == (4, 0.5)
    assert found.kl == pytest.approx(one / 2, rel=1e-6)
    mask = torch.tensor([[1, 0], [1, 1]])
    batch = {"ids": ids, "attention_mask": mask}

    class Masked(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(ids))

    found = compare(Masked(model), Masked(dense), [batch])
    assert found.tokens == 3
    assert found.top1 == pytest.approx(2 / 3)
    assert found.kl == pytest.approx(one / 3, rel=1e-6)


def test_compare_is_of_dense_to_model_not_the_reverse() -> None:
    one, other = Bigram([UNSURE, UNSURE]), Bigram([[0.9, 0.1], [0.9, 0.1]])
    ids = torch.tensor([[0]])
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert compare(other, one, [ids]).kl == pytest.approx(forward, rel=1e-5)


def test_compare_of_a_model_with_itself_is_exact_for_a_classifier_too() -> None:
    model = nn.Linear(4, 3)
    found = compare(model, model, torch.ones(6, 4).split(2))
    assert (found.kl, found.top1, found.tokens) == (0.0, 1.0, 6)


def test_compare_errors() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="compare needs at least one batch, got none"):
        compare(model, model, [])
    with pytest.raises(ValueError, match=r"got \(2, 3\) and for the dense model \(2, 5\) in"):
        compare(model, nn.Linear(4, 5), [torch.ones(2, 4)])
    broken = nn.Linear(4, 3)
    nn.init.constant_(broken.weight, math.nan)
    with pytest.raises(ValueError, match="batch 0 of the dense model gave 6 NaN of 6"):
        compare(model, broken, [torch.ones(2, 4)])


# --- embeddings and labels -----------------------------------------------------------------------


class Encoder(nn.Module):
    """Returns rows of a table as hidden states, as sentence encoders do."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(table))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(ids))


def test_embedding_cosine_pools_only_what_is_no_padding() -> None:
    dense, model = Encoder([[1.0, 0.0], [0.0, 1.0]]), Encoder([[1.0, 0.0], [1.0, 0.0]])
    ids = torch.tensor([[0, 0], [0, 1]])
    batch = {"ids": ids, "attention_mask": torch.ones_like(ids)}
    found = embedding_cosine(model, dense, [batch])
    assert found.count == 2
    low = math.sqrt(0.5)  # between (1, 0) and (1, 1)
    assert found.mean == pytest.approx((1 + low) / 2, rel=1e-6)
    assert found.p10 == pytest.approx(low + 0.1 * (1 - low), rel=1e-6)
    batch["attention_mask"] = torch.tensor([[1, 1], [1, 0]])
    assert embedding_cosine(model, dense, [batch]).mean == pytest.approx(1, rel=1e-6)
    batch["attention_mask"] = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="batch 0 has a row that is all padding"):
        embedding_cosine(model, dense, [batch])


def test_embedding_cosine_takes_one_vector_a_row_and_ignores_its_length() -> None:
    model, dense = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    nn.init.eye_(dense.weight)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, -5.0], [5.0, 0.0]]))  # a quarter turn
    found = embedding_cosine(model, dense, [torch.tensor([[1.0, 2.0]])])
    assert found.mean == pytest.approx(0, abs=1e-7)
    assert embedding_cosine(dense, dense, [torch.ones(3, 2)]).mean == pytest.approx(1)


def test_accuracy_counts_rows_whose_largest_logit_is_their_label() -> None:
    model = nn.Identity()
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy(model, [(logits, torch.tensor([1, 0, 0]))]) == pytest.approx(2 / 3)
    batches = [(logits, torch.tensor([1, 0, 1])), (logits[:1], torch.tensor([0]))]
    assert accuracy(model, batches) == pytest.approx(3 / 4)  # over rows, not over batches


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2, 2), r"needs batches of \(inputs, labels\).* got Tensor for batch 0"),
        ((torch.ones(2, 2), torch.ones(2)), r"the labels an integer tensor"),
        ((torch.ones(2, 2), torch.ones(3).long()), r"got logits \(2, 2\) and labels \(3,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_accuracy_errors(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(nn.Identity(), [batch])


def test_measures_run_in_eval_mode_without_gradients_and_put_the_mode_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    modes: list[tuple[bool, bool]] = []
    model.register_forward_hook(
        lambda *_: modes.append((model[1].training, torch.is_grad_enabled()))
    )
    ones = [torch.ones(2, 4)]
    compare(model, model, ones)
    embedding_cosine(model, model, ones)
    accuracy(model, [(ones[0], torch.zeros(2).long())])
    assert set(modes) == {(False, False)} and len(modes) == 5
    assert model.training and torch.is_grad_enabled()
