"""Batches without their padding: cut by their masks, and what layers then count."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.model.calibrate import observe
from secateur.model.layers import select
from secateur.model.padding import unpadded
from tests.models import Decoder

IDS = torch.arange(1, 13).view(3, 4)
RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])


class Anything(nn.Module):
    """Takes any arguments; its `forward` names none."""

    def forward(self, *args: Any, **kwargs: Any) -> None: ...


class EncoderDecoder(Anything):
    """Declares itself an encoder-decoder, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"is_encoder_decoder": True})()


def parts(model: nn.Module, batch: Any) -> list[dict[str, Any]]:
    """Each part with lists for tensors, the longest last."""
    return [
        {key: x.tolist() if isinstance(x, Tensor) else x for key, x in part.items()}
        for part in unpadded(model, batch)
    ]


# --- how batches are cut -------------------------------------------------------------------------


def test_rows_are_cut_to_their_tokens_and_those_of_one_length_run_together() -> None:
    batch = {
        "input_ids": IDS,
        "attention_mask": RIGHT,
        "position_ids": torch.arange(4)[None],  # one for all rows
        "inputs_embeds": IDS[..., None] * 10,
        "classes": torch.tensor([7, 8, 9]),
        "scale": torch.tensor(0.5),
        "return_dict": True,
    }
    assert parts(Anything(), batch) == [
        {
            "input_ids": [[1, 2], [9, 10]],
            "attention_mask": [[1, 1], [1, 1]],
            "position_ids": [[0, 1], [0, 1]],
            "inputs_embeds": [[[10], [20]], [[90], [100]]],
            "classes": [7, 9],
            "scale": 0.5,
            "return_dict": True,
        },
        {
            "input_ids": [[5, 6, 7, 8]],
            "attention_mask": [[1, 1, 1, 1]],
            "position_ids": [[0, 1, 2, 3]],
            "inputs_embeds": [[[50], [60], [70], [80]]],
            "classes": [8],
            "scale": 0.5,
            "return_dict": True,
        },
    ]


def test_padding_may_be_left_of_the_tokens_and_between_them() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0]])
    (part,) = parts(Anything(), {"input_ids": IDS, "attention_mask": mask})
    assert part["input_ids"] == [[3, 4], [5, 8], [9, 10]]


@given(st.data())
def test_parts_hold_every_token_once_and_no_padding(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    flags = st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)
    mask = torch.tensor(data.draw(flags)).view(rows, length)
    ids = torch.arange(rows * length).view(rows, length)
    found = unpadded(Anything(), {"input_ids": ids, "attention_mask": mask})
    assert all(bool(part["attention_mask"].all()) for part in found)
    tokens = [sorted(x for part in found for x in part["input_ids"].flatten().tolist())]
    assert tokens == [ids[mask].tolist()]
    of_rows = [row.tolist() for part in found for row in part["input_ids"]]
    assert sorted(of_rows) == [ids[i][mask[i]].tolist() for i in range(rows) if mask[i].any()]


def test_without_padding_or_a_mask_the_batch_is_itself() -> None:
    ones = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 0, 1]])}
    for batch in (IDS, (IDS, RIGHT), ones, packed, {"input_ids": IDS}):
        (same,) = unpadded(Anything(), batch)
        assert same is batch
    assert unpadded(Anything(), {"input_ids": IDS, "attention_mask": 0 * IDS}) == []


def test_positional_arguments_have_the_names_that_forward_gives_them() -> None:
    first, second = parts(Decoder(), (IDS, RIGHT))
    assert first == {"input_ids": [[1, 2], [9, 10]], "attention_mask": [[1, 1], [1, 1]]}
    assert second["input_ids"] == [[5, 6, 7, 8]]


@pytest.mark.parametrize("added", [False, True])
def test_of_a_mask_with_queries_what_no_query_sees_is_padding(added: bool) -> None:
    seen = RIGHT.bool()[:, None, None, :] & torch.ones(4, 4, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if added else seen
    first, second = unpadded(Anything(), {"input_ids": IDS, "attention_mask": mask})
    assert first["input_ids"].tolist() == [[1, 2], [9, 10]]
    assert torch.equal(first["attention_mask"], mask[[0, 2], :, :2, :2])
    assert torch.equal(second["attention_mask"], mask[[1]])


def test_packed_documents_in_a_mask_with_queries_are_no_padding() -> None:
    document = torch.tensor([0, 0, 1, 1])
    mask = (document[:, None] == document).tril().expand(3, 1, 4, 4)
    batch = {"input_ids": IDS, "attention_mask": mask}
    assert unpadded(Anything(), batch)[0] is batch


def test_frames_may_lie_behind_the_channels() -> None:
    features = torch.arange(24).view(3, 2, 4)
    first, _ = parts(Anything(), {"input_features": features, "attention_mask": RIGHT})
    assert first["input_features"] == features[[0, 2], :, :2].tolist()


def test_the_encoders_mask_is_not_the_decoders() -> None:
    """Even if all tensors have one shape."""
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": IDS + 20}
    first, second = parts(Anything(), batch)
    assert (first["input_ids"], second["input_ids"]) == ([[1, 2], [9, 10]], [[5, 6, 7, 8]])
    assert first["decoder_input_ids"] == [[21, 22, 23, 24], [29, 30, 31, 32]]
    of_decoder = batch | {
        "attention_mask": torch.ones_like(IDS),
        "decoder_attention_mask": RIGHT,
        "labels": IDS + 40,
    }
    first, second = parts(Anything(), of_decoder)
    assert first["input_ids"] == [[1, 2, 3, 4], [9, 10, 11, 12]]
    assert first["decoder_input_ids"] == [[21, 22], [29, 30]]
    assert first["labels"] == [[41, 42], [49, 50]]


def test_behind_the_last_label_a_decoder_has_no_token() -> None:
    labels = torch.tensor([[5, -100, 7, -100], [5, 6, 7, 8], [5, -100, -100, -100]])
    batch = {"input_ids": IDS, "labels": labels}
    (same,) = unpadded(Anything(), batch)  # a language model's: a prompt has no labels either
    assert same is batch
    assert [part["labels"] for part in parts(EncoderDecoder(), batch)] == [
        [[5]],
        [[5, -100, 7]],
        [[5, 6, 7, 8]],
    ]


def test_encoder_states_that_a_decoder_is_given_have_a_mask_of_their_own() -> None:
    states = torch.arange(12.0).view(3, 4, 1)
    batch = {"input_ids": IDS, "encoder_hidden_states": states, "encoder_attention_mask": RIGHT}
    first, _ = parts(Anything(), batch)
    assert first["input_ids"] == IDS[[0, 2]].tolist()
    assert first["encoder_hidden_states"] == [[[0.0], [1.0]], [[8.0], [9.0]]]


# --- what layers see -----------------------------------------------------------------------------


class Routed(nn.Module):
    """Flattens tokens and sends each to one of two experts, and all through one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.shared = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        y, expert = self.shared(x), x[:, 0] > 0
        for i, module in enumerate(self.experts):
            (chosen,) = (expert == bool(i)).nonzero(as_tuple=True)
            y = y.index_add(0, chosen, module(x[chosen]))
        return y.view(*input_ids.shape, 8)


def grams(model: nn.Module, batches: list[Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
    seen: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for observed in observe(model, select(model).layers, batches, ["gram"], sequential=True):
        seen |= {name: values["gram"] for name, values in observed.statistics.items()}
        tokens |= observed.tokens
    return seen, tokens


@pytest.mark.parametrize("make", [Routed, Decoder], ids=["routed", "decoder"])
def test_a_padded_batch_gives_what_its_rows_without_padding_give(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    rows = [IDS[0:1, :2], IDS[1:2], IDS[2:3, :2]]
    expected, tokens = grams(model, rows)
    left = torch.stack([IDS[0].roll(2), IDS[1], IDS[2].roll(2)])
    for ids, mask in ((IDS, RIGHT), (left, RIGHT.flip(1))):
        found, counted = grams(model, [{"input_ids": ids, "attention_mask": mask}])
        assert counted == tokens
        for name, gram in expected.items():
            torch.testing.assert_close(found[name], gram)


def test_experts_count_the_tokens_that_are_routed_to_them_and_no_padding() -> None:
    torch.manual_seed(0)
    model = Routed()
    _, tokens = grams(model, [{"input_ids": IDS, "attention_mask": RIGHT}])
    to_second = int((model.embed(IDS[RIGHT.bool()])[:, 0] > 0).sum())
    assert 0 < to_second < 8
    assert tokens == {"shared": 8, "experts.0": 8 - to_second, "experts.1": to_second}


def test_held_out_batches_are_counted_as_they_were_given() -> None:
    """Not by the parts in which they run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 4), nn.Linear(4, 4, bias=False))
    model.forward = lambda input_ids, attention_mask: model[1](model[0](input_ids))  # type: ignore[method-assign]
    padded = {"input_ids": IDS, "attention_mask": RIGHT}
    source = observe(model, {"1": model[1]}, [padded] * 3, ["gram", "held_gram"], sequential=True)
    (observed,) = source
    statistics = observed.statistics["1"]
    torch.testing.assert_close(statistics["held_gram"], statistics["gram"] / 3)


def test_a_batch_of_padding_alone_is_left_out_and_only_such_are_an_error() -> None:
    model, padding = Decoder(), {"input_ids": IDS, "attention_mask": 0 * RIGHT}
    _, tokens = grams(model, [padding, {"input_ids": IDS, "attention_mask": RIGHT}])
    assert set(tokens.values()) == {8}
    with pytest.raises(ValueError, match="the 1 batches hold none: check their attention_mask"):
        grams(model, [padding])


class OneLength(nn.Module):
    """Takes only inputs of four frames, as Whisper takes only 3,000."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 8), nn.Embedding(13, 8)
        self.out = nn.Linear(8, 8)

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
    ) -> Tensor:
        if input_features.shape[1] != 4:
            raise ValueError("4 frames are needed.")
        context = F.relu(self.encoder(input_features)).mean(1, keepdim=True)
        out: Tensor = self.out(self.decoder(decoder_input_ids) + context)
        return out


def test_where_padding_has_to_be_run_a_warning_names_layers_and_a_decoders_is_cut_still() -> None:
    batch = {
        "input_features": torch.ones(3, 4, 2),
        "attention_mask": RIGHT,
        "decoder_input_ids": IDS,
        "decoder_attention_mask": RIGHT,
    }
    with pytest.warns(UserWarning, match="4 frames are needed: .* 2 planned layers, encoder first"):
        _, tokens = grams(OneLength(), [batch])
    assert tokens == {"encoder": 12, "out": 8}


def test_what_the_model_cannot_run_at_all_is_an_error_and_no_warning() -> None:
    batch = {"input_ids": torch.full((3, 4), 99), "attention_mask": RIGHT}
    with pytest.raises(ValueError, match="Decoder cannot run calibration batch 0, .*out of range"):
        grams(Decoder(), [batch])


# --- models of transformers ----------------------------------------------------------------------

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SPEECH = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def counts(model: nn.Module, batch: Any) -> dict[int, set[str]]:
    """The number of tokens that each layer saw."""
    torch.manual_seed(0)
    found: dict[int, set[str]] = {}
    for name, count in grams(model.eval(), [batch])[1].items():
        found.setdefault(count, set()).add(name)
    return found


def test_layers_that_read_encoder_states_have_the_encoders_padding() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config)
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": IDS}
    found = counts(model, batch)
    assert found.keys() == {8, 12}
    decoder = "decoder.block.0.layer"
    across = {f"{decoder}.1.EncDecAttention.{x}" for x in "kv"}
    assert across < found[8] and all(x.startswith("encoder.") for x in found[8] - across)
    assert all(name.startswith(decoder) for name in found[12])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]])
    both = counts(model, batch | {"decoder_attention_mask": mask})
    assert both == {8: found[8], 6: found[12]}


@pytest.mark.parametrize("left", [False, True])
def test_blocks_of_experts_count_tokens(left: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2MoeConfig(
        **SMALL,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    mask = RIGHT.flip(1) if left else RIGHT
    model = transformers.Qwen2MoeForCausalLM(config)
    assert counts(model, {"input_ids": IDS, "attention_mask": mask}).keys() == {8}


def test_frames_of_speech_are_counted_behind_the_convolutions() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, 60:] = 0
    batch = {"input_values": torch.randn(2, 100), "attention_mask": mask}
    frames = [((n - 8) // 4 + 1 - 4) // 2 + 1 for n in (60, 100)]
    model = transformers.Wav2Vec2ForCTC(config)
    assert counts(model, batch).keys() == {sum(frames)}


def test_whisper_takes_inputs_of_one_length_and_its_labels_say_where_text_ends() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        **SPEECH, num_mel_bins=8, max_source_positions=6, max_target_positions=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 6:] = 0
    batch = {
        "input_features": torch.randn(3, 8, 12),
        "attention_mask": mask,
        "labels": IDS.where(RIGHT.bool(), -100),
    }
    with pytest.warns(UserWarning, match="Whisper expects .*: give rows without padding where"):
        found = counts(transformers.WhisperForConditionalGeneration(config), batch)
    assert found.keys() == {3 * 6, 8}
    assert all("decoder" in name for name in found[8])
