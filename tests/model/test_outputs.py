"""A model's output: logits, hidden states, padding, and the modes that are restored."""

import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.model.outputs import (
    answer,
    counted,
    divergence,
    eval_mode,
    hidden_of,
    logits_of,
    pooled,
)


def test_eval_mode_puts_every_mode_and_cache_flag_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model.config = SimpleNamespace(use_cache=True)
    model[1].eval()
    torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        assert not any(module.training for module in model.modules())
        assert model.config.use_cache is False
        assert torch.backends.mha.get_fastpath_enabled() is False
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, False]
    assert model.config.use_cache is True
    assert torch.backends.mha.get_fastpath_enabled() is True


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_compute_as_in_eval_mode_where_cudnn_has_gradients(
    kind: type[nn.RNNBase],
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(4, 3, 2, dropout=0.5)), torch.randn(5, 2, 4)
    expected = model.eval()(x)[0]
    with eval_mode(model):
        assert model[0].training and not model.training
        assert torch.equal(model(x)[0], expected)
    assert model[0].dropout == 0.5 and not model[0].training


def test_answer_says_which_batch_the_model_could_not_run() -> None:
    with pytest.raises(ValueError, match=r"run batch 3, Tensor \[1, 3\]: mat1 and mat2"):
        answer(nn.Linear(4, 2), torch.ones(1, 3), "batch 3")


@pytest.mark.parametrize(
    "batch", [torch.ones(1, 4), (torch.ones(1, 4),), {"input": torch.ones(1, 4)}]
)
def test_answer_takes_a_tensor_arguments_or_keywords(batch: object) -> None:
    linear = nn.Linear(4, 1, bias=False)
    nn.init.constant_(linear.weight, 0.5)
    assert answer(linear, batch, "batch 0").tolist() == [[2.0]]


def test_logits_and_hidden_states_come_from_their_attribute_or_the_tensor_itself() -> None:
    one, two = torch.ones(1, 2), torch.zeros(1, 3, 4)
    output = SimpleNamespace(logits=one, last_hidden_state=two)
    assert logits_of(output, "batch 0") is one
    assert hidden_of(output, "batch 0") is two
    assert logits_of(one, "batch 0") is one
    with pytest.raises(ValueError, match=r"to have \.logits, got OrderedDict for batch 0"):
        logits_of(OrderedDict(x=one), "batch 0")
    with pytest.raises(ValueError, match=r"got torch.int64 numbers for batch 1"):
        hidden_of(torch.tensor([1]), "batch 1")


def test_nan_is_counted_and_the_batch_named() -> None:
    bad = torch.tensor([[1.0, math.nan, math.nan]])
    with pytest.raises(ValueError, match=r"logits need to be numbers, batch 2 gave 2 NaN of 3"):
        logits_of(bad, "batch 2")


CPU = torch.device("cpu")
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_counted_is_the_attention_mask_where_the_output_has_its_tokens() -> None:
    batch = {"attention_mask": MASK}
    assert counted(batch, None, torch.Size([2, 3]), CPU).tolist() == MASK.bool().tolist()
    assert counted(batch, None, torch.Size([2]), CPU).tolist() == [True, True]
    assert counted(MASK, None, torch.Size([2, 3]), CPU).all()


def test_what_a_decoder_gives_counts_by_its_own_mask_or_the_labels() -> None:
    """Even if the encoder's mask has the same shape; names in the batch or the output tell."""
    behind_an_encoder = SimpleNamespace(encoder_last_hidden_state=torch.zeros(1))
    ids, positions = torch.ones_like(MASK), torch.Size([2, 3])
    by_mask = {"attention_mask": ids, "decoder_input_ids": ids, "decoder_attention_mask": MASK}
    assert counted(by_mask, None, positions, CPU).tolist() == MASK.bool().tolist()
    unsaid = {"attention_mask": MASK, "decoder_input_ids": ids}
    assert counted(unsaid, None, positions, CPU).all()
    assert counted({"attention_mask": MASK}, behind_an_encoder, positions, CPU).all()
    labels = torch.tensor([[-100, 4, -100], [4, 5, 6]])
    found = counted({"attention_mask": MASK, "labels": labels}, behind_an_encoder, positions, CPU)
    assert found.tolist() == [[True, True, False], [True, True, True]]
    # A language model's labels leave out prompts too, and say nothing about padding.
    assert counted({"labels": labels}, None, positions, CPU).all()


def test_where_the_mask_is_of_other_positions_all_count_and_padding_is_warned_of() -> None:
    positions = torch.Size([2, 2])
    assert counted({"attention_mask": torch.ones_like(MASK)}, None, positions, CPU).all()
    with pytest.warns(UserWarning, match=r"positions \(2, 2\) and attention_mask \(2, 3\): which"):
        assert counted({"attention_mask": MASK}, None, positions, CPU).all()


def test_divergence_is_that_of_a_hand_worked_pair() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    found = divergence(p.log()[None], q.log()[None])
    assert found.tolist() == pytest.approx([0.5 * math.log(2)], rel=1e-6)
    assert float(divergence(q.log()[None], p.log()[None])) == math.inf
    # A class that underflows to probability 0 adds nothing, whatever the other model gives it.
    tiny = torch.tensor([[0.0, -300.0]])
    assert float(divergence(tiny, torch.tensor([[0.0, -math.inf]]))) == 0.0


def test_divergence_keeps_double_precision() -> None:
    logits = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    moved = logits + torch.tensor([[0.0, 1e-6]], dtype=torch.float64)
    p = torch.softmax(logits, -1)[0, 0].item()
    # To second order KL is half the variance of the logits' difference.
    assert float(divergence(logits, moved)) == pytest.approx(0.5 * p * (1 - p) * 1e-12, rel=1e-3)


def test_pooled_is_the_mean_of_counted_tokens_at_length_one() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [99.0, 99.0]]])
    mask = torch.tensor([[True, True, False]])
    assert pooled(hidden, mask).tolist() == [pytest.approx([0.6, 0.8])]
    assert pooled(torch.tensor([[0.0, 2.0]]), torch.tensor([True])).tolist() == [[0.0, 1.0]]
