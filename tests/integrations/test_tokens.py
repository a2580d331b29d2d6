"""Text and stored ids as rows, of many documents and of all that there is; and rows written."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.integrations.tokens import (
    end_of_text,
    sampled_rows,
    stored_rows,
    text_batches,
    text_rows,
    token_rows,
)
from secateur.integrations.transformers import load_folder
from secateur.model.statistics import is_held_out
from tests.integrations.folders import change_config, make_folder, tiny

transformers = pytest.importorskip("transformers")

A, B, C, D, END, UNKNOWN = 3, 4, 5, 6, 2, 1
FEW = "may not hold for other text: give 8 documents or more, as a folder of files or as lines"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer of one word a token, `[END]` its end-of-text token."""
    return make_folder(tmp_path / "model", "llama", eos_token_id=END)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "bert", "bert", pad_token_id=0)


def ids_of(batches: Any) -> list[list[int]]:
    return [row for batch in batches for row in batch.tolist()]


def held_and_trained(documents: tuple[int, ...], batch: int) -> tuple[set[int], set[int]]:
    """The documents of batches that are held out, and of the others."""
    held = {d for i, d in enumerate(documents) if is_held_out(i // batch)}
    return held, {d for i, d in enumerate(documents) if not is_held_out(i // batch)}


# --- text for causal models ----------------------------------------------------------------------


def test_rows_are_whole_pieces_of_documents_and_what_is_left_is_laid_end_to_end(
    folder: Path,
) -> None:
    """a b c d | a END, b b END and c d UNK END: nothing is padded, and END is not doubled."""
    batches = text_batches(folder, ["a b c d a", " ", "b b [END]", "c d x"], 3, 4, 2)
    assert [len(batch) for batch in batches] == [2, 1] and batches[0].dtype == torch.int64
    rows = ids_of(batches)
    assert [A, B, C, D] in rows and [C, D, UNKNOWN, END] in rows
    (laid,) = [row for row in rows if row not in ([A, B, C, D], [C, D, UNKNOWN, END])]
    assert laid in ([B, B, END, A], [A, END, B, B])
    change_config(folder, eos_token_id=None)
    assert sorted(ids_of(text_batches(folder, ["a b", "c d"], 1, 4, 1))[0]) == [A, B, C, D]


def test_every_token_is_used_before_rows_run_out(folder: Path) -> None:
    """Whatever the lengths: as many rows as the tokens fill, and no token twice."""
    texts = ["a " * n for n in (1, 2, 3, 5, 7, 8, 9, 11, 30)]
    tokens = sum(n + 1 for n in (1, 2, 3, 5, 7, 8, 9, 11, 30))
    for length in (2, 3, 8, 16):
        with pytest.warns(UserWarning, match="rows 99: there are only"):
            rows = ids_of(text_batches(folder, texts, 99, length, 4))
        assert len(rows) == tokens // length
        assert Counter(token for row in rows for token in row)[END] <= len(texts)


def test_rows_are_dealt_over_documents_and_over_the_places_of_each(folder: Path) -> None:
    """Ten documents of eight rows: 20 rows are two of each, and more are of all places."""
    names = [str(number) for number in range(10)]
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[END]": END}
    vocabulary |= {f"{name}.{place}": 3 + 8 * i + place
                   for i, name in enumerate(names) for place in range(8)}  # fmt: skip
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    texts = [" ".join(f"{name}.{place} " * 4 for place in range(8)) for name in names]
    for count, each in ((10, 1), (20, 2), (80, 8)):
        dealt = text_rows(folder, texts, count, 4, 1)
        rows = ids_of(dealt.batches)
        assert all(len(set(row)) == 1 for row in rows)  # each from one place
        assert len({row[0] for row in rows}) == count
        assert set(Counter((row[0] - 3) // 8 for row in rows).values()) == {each}
        assert dealt.remarks() == []
    places = [(row[0] - 3) % 8 for row in ids_of(text_batches(folder, texts, 10, 4, 1))]
    assert len(set(places)) > 3  # not the beginning of each
    again = ids_of(text_batches(folder, texts, 20, 4, 1))
    assert again == ids_of(text_batches(folder, texts, 20, 4, 1))
    assert again != ids_of(text_batches(folder, texts, 20, 4, 1, seed=1))


def test_held_out_batches_have_documents_of_their_own(folder: Path) -> None:
    texts = [f"{word} " * 40 for word in "abcdabcdabcd"]
    for rows, batch in ((16, 1), (32, 2), (96, 4), (64, 4)):
        dealt = text_rows(folder, texts, rows, 4, batch)
        held, trained = held_and_trained(dealt.documents, batch)
        assert held and len(dealt.documents) == rows and len(held & trained) <= 1
    dealt = text_rows(folder, texts, 24, 4, 2)  # two of each: three rows are held out
    assert not set.intersection(*held_and_trained(dealt.documents[:16], 2)) or rows


def test_a_text_with_ends_in_it_is_several_documents(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("[END] ".join(f"{word} " * 5 for word in "abcdabcd"))
    dealt = text_rows(folder, text, 8, 5, 1)
    assert dealt.remarks() == [] and len(set(dealt.documents)) == 8
    assert all(len(set(row)) == 1 for row in ids_of(dealt.batches))
    change_config(folder, eos_token_id=[END, 0])
    assert len(set(text_rows(folder, text, 8, 5, 1).documents)) == 8
    change_config(folder, eos_token_id=None)
    assert text_rows(folder, text, 8, 5, 1).documents == (0,) * 8


# --- too little text -----------------------------------------------------------------------------


def test_a_short_text_gives_the_rows_that_are_there(folder: Path) -> None:
    with pytest.warns(UserWarning) as said:
        batches = text_batches(folder, ["a b c d " * 5], 128, 4, 2)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [str(one.message) for one in said] == [
        "rows 128: there are only 5 rows of 4 tokens, which are used: more text gives more, and so "
        "does a smaller length",
        "the 5 rows are of 1 document, and what is fitted or measured on them may not hold for "
        "other text: give 8 documents or more, as a folder of files or as lines of a .jsonl file",
    ]
    (one, few) = text_rows(folder, ["a b c d " * 5], 128, 4, 2).remarks("--rows", "--length")
    assert one.startswith("--rows 128: there are only 5") and one.endswith("a smaller --length")
    assert "--" not in few


@pytest.mark.parametrize(
    ("documents", "rows", "warned"), [(7, 14, True), (8, 16, False), (3, 3, False), (3, 4, True)]
)
def test_rows_of_fewer_than_eight_documents_are_warned_of(
    folder: Path, documents: int, rows: int, warned: bool
) -> None:
    """And not where there are no more rows than documents."""
    remarks = text_rows(folder, ["a b c d " * 5] * documents, rows, 4, 2).remarks()
    assert [FEW in remark for remark in remarks] == [True] * warned


def test_text_errors(folder: Path, encoder: Path, tmp_path: Path) -> None:
    def refused(message: str, text: Any = ("a b",), rows: int = 1, length: int = 2) -> None:
        with pytest.raises(ValueError, match=message):
            text_batches(folder, text, rows, length, 1)

    refused("needs rows of at least 1, got 0", rows=0)
    refused("model has 32 positions, got a length of 33: take a smaller one", length=33)
    refused("a row needs 4 tokens, the text has 3: give more text, or take a smaller", length=4)
    refused("a row needs 2 tokens, the text has 0", text=[" "])
    refused("text 1 of the list is no text that can be encoded, got str", ["a", "\ud800"])
    absent = tmp_path / "absent.txt"
    refused("absent.txt does not exist: .* a folder of them$", absent)
    refused("absent.txt does not exist: .* a folder of them, or pass texts in a list", str(absent))
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer.json is no tokenizer")
    (folder / "tokenizer.json").unlink()
    refused("has no tokenizer.json: pass token ids instead, as 'file.safetensors:key'")
    with pytest.raises(ValueError, match="the text is blank: give one with a passage at least"):
        text_batches(encoder, ["", " "], 2, 4, 1)


# --- text for other models -----------------------------------------------------------------------


def test_encoder_passages_are_cut_and_padded_to_the_longest_of_their_batch(encoder: Path) -> None:
    first, second = text_batches(encoder, ["a b c d a b", "b", "c d"], 3, 5, 2)
    assert first["input_ids"].tolist() == [[3, 4, 5, 6, 3], [4, 0, 0, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert second["input_ids"].tolist() == [[5, 6]]
    model = load_folder(encoder)
    with torch.no_grad():
        assert model(**first).last_hidden_state.shape == (2, 5, 16)


def test_passages_of_a_plain_file_are_its_paragraphs(encoder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b\n\nc\n \nd d\n")
    with pytest.warns(UserWarning, match="the 3 rows are of 1 document"):
        passages = text_batches(encoder, str(text), 3, 8, 1)
    assert sorted(p["input_ids"].tolist() for p in passages) == [[[3, 4]], [[5]], [[6, 6]]]


def test_passages_are_of_all_documents_in_their_order(encoder: Path, tmp_path: Path) -> None:
    """Files take turns where not all passages are asked for; short texts are used up."""
    for name, words in (("1.txt", "aaaa"), ("2.txt", "bbbb"), ("3.txt", "cccc")):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("\n\n".join(words))
    dealt = text_rows(encoder, tmp_path / "texts", 6, 4, 8)
    assert dealt.documents == (0, 0, 1, 1, 2, 2)
    every = text_rows(encoder, tmp_path / "texts", 99, 4, 16)
    ids = [batch["input_ids"] for batch in every.batches if isinstance(batch, dict)]
    assert torch.cat(ids).flatten().tolist() == [A] * 4 + [B] * 4 + [C] * 4
    assert every.remarks()[0].startswith("rows 99: there are only 12 passages, which are used")


# --- stored ids ----------------------------------------------------------------------------------


def save_ids(path: Path, **tensors: Tensor) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def test_without_an_end_each_stored_row_is_a_document(tmp_path: Path) -> None:
    ids = torch.arange(36, dtype=torch.int16).view(12, 3)
    file = save_ids(tmp_path / "tokens.safetensors", train=ids)
    batches = token_rows(f"{file}:train", 8, 3)
    assert [len(batch) for batch in batches] == [3, 3, 2] and batches[0].dtype == torch.int64
    first = [row[0] for row in ids_of(batches)]
    assert len(set(first)) == 8 and all(row == [row[0], row[0] + 1, row[0] + 2]
                                        for row in ids_of(batches))  # fmt: skip
    assert max(first) > 24  # not the first rows
    assert ids_of(token_rows(f"{file}:train", 8, 3)) == ids_of(batches)
    assert ids_of(token_rows(f"{file}:train", 8, 3, seed=1)) != ids_of(batches)
    assert sorted(ids_of(token_rows(f"{file}:train", 12, 4))) == ids.tolist()


def test_stored_rows_are_dealt_over_the_documents_that_end_in_them(tmp_path: Path) -> None:
    """Nine documents laid end to end, one of 40 rows and eight of about two and a half."""
    lengths = [160, *[10] * 8]
    flat = [token for n, number in zip(lengths, range(9), strict=True)
            for token in [*[100 + number] * (n - 1), END]]  # fmt: skip
    ids = torch.tensor(flat, dtype=torch.int32).view(60, 4)
    file = save_ids(tmp_path / "tokens.safetensors", train=ids)
    dealt = stored_rows(f"{file}:train", 16, 2, (END,))
    assert Counter(dealt.documents)[0] == 2 and len(set(dealt.documents)) == 9
    assert dealt.remarks() == []
    held, trained = held_and_trained(dealt.documents, 2)
    assert held and len(held & trained) <= 1
    for row, document in zip(ids_of(dealt.batches), dealt.documents, strict=True):
        assert row.count(100 + document) + row.count(END) >= 2
    every = ids_of(token_rows(f"{file}:train", 60, 2, (END,)))
    assert sorted(every) == sorted(ids.tolist())
    with pytest.warns(UserWarning, match="there are only 60 rows of 4 tokens"):
        assert len(ids_of(token_rows(f"{file}:train", 61, 2, (END,)))) == 60
    assert stored_rows(f"{file}:train", 3, 2, (END,), length=3).batches[0].shape == (2, 3)


def test_stored_rows_of_few_documents_are_warned_of(tmp_path: Path) -> None:
    ids = torch.full((16, 4), A)
    ids[7, 3] = END
    file = save_ids(tmp_path / "tokens.safetensors", train=ids)
    told = "16 rows are of 2 documents, .*: take rows of 8 documents or more"
    with pytest.warns(UserWarning, match=told):
        token_rows(f"{file}:train", 16, 4, (END,))
    token_rows(f"{file}:train", 16, 4)  # nothing is known of documents


def test_token_rows_say_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    ids = torch.arange(12, dtype=torch.int16).view(4, 3)
    none = torch.zeros(0, 3, dtype=torch.int16)
    path = tmp_path / "tokens.safetensors"
    file = save_ids(path, train=ids, flat=ids.flatten(), real=ids.float(), none=none)
    for source, message in [
        (str(file), "token rows are named 'file.safetensors:key', got"),
        (f"{file}:valid", "has no tensor 'valid': it has flat, none, real, train"),
        (f"{file}:flat", r"needs integers of shape \[rows, tokens\], has torch.int16 \[12\]"),
        (f"{file}:real", r"has torch.float32 \[4, 3\]"),
        (f"{file}:none", r"has torch.int16 \[0, 3\]"),
        (f"{tmp_path}/absent.safetensors:train", "absent.safetensors cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            token_rows(source, 3, 2)
    with pytest.raises(ValueError, match="rows and batch of at least 1, got 3 and 0"):
        token_rows(f"{file}:train", 3, 0)


@pytest.mark.parametrize(("stored", "ends"), [(2, (2,)), ([2, 0], (2, 0)), (None, ())])
def test_the_ends_of_texts_are_those_of_the_config(
    folder: Path, stored: Any, ends: tuple[int, ...]
) -> None:
    change_config(folder, eos_token_id=stored)
    assert end_of_text(folder) == ends


# --- sampled_rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [3, 32])
def test_sampled_rows_begin_in_the_data_and_follow_the_model(prompt: int) -> None:
    """With 3 tokens of it, or with half a row."""
    model = certain(tiny("llama"))
    data = list(torch.randint(16, (6, 12)).split(4))
    rows = sampled_rows(model, data, 9, prompt=prompt, at_once=5)
    assert [tuple(batch.shape) for batch in rows] == [(4, 12), (4, 12), (1, 12)]
    begun = min(prompt, 6)
    places = torch.cat(data).unfold(1, begun, 1).reshape(-1, begun)
    for row in torch.cat(rows):
        assert (places == row[:begun]).all(1).any()
        with torch.no_grad():
            next_token = model(row[None]).logits[0].argmax(-1)
        assert row[begun:].equal(next_token[begun - 1 : -1])


def test_sampled_rows_are_drawn_from_the_models_own_distribution() -> None:
    """Whatever its generation config would do to it; the end-of-text token ends no row."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all 16 tokens are as likely
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, top_k=1, repetition_penalty=5.0, eos_token_id=list(range(16))
    )
    own = model.generation_config.to_dict()
    rows = torch.cat(sampled_rows(model, [torch.zeros(4, 24, dtype=torch.long)], 200, prompt=1))
    assert rows.shape == (200, 24)
    counts = rows[:, 1:].flatten().bincount(minlength=16)
    # 4600 draws: 287.5 a token, standard deviation 16.4; five of them either way
    assert counts.min() > 287.5 - 82 and counts.max() < 287.5 + 82
    assert model.generation_config.to_dict() == own


def test_sampled_rows_depend_on_the_seed_alone() -> None:
    model = tiny("llama").train()
    data = [torch.randint(16, (4, 12))]
    torch.manual_seed(1)
    first = torch.cat(sampled_rows(model, data, 3, prompt=2))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1).equal(after)
    torch.manual_seed(2)
    assert torch.cat(sampled_rows(model, data, 3, prompt=2)).equal(first)
    assert not torch.cat(sampled_rows(model, data, 3, prompt=2, seed=1)).equal(first)
    assert model.training


@pytest.mark.parametrize(
    ("kind", "shape", "options", "message"),
    [
        ("bert", (4, 12), {}, "a model of transformers that generates text, got BertModel"),
        ("llama", (4, 1), {}, r"2 tokens at least, got \[\(4, 1\)\]"),
        ("llama", (4, 12, 1), {}, r"2 tokens at least, got \[\(4, 12, 1\)\]"),
        ("llama", (4, 12), {"rows": 0}, "rows of at least 1, got 0"),
        ("llama", (4, 12), {"at_once": 0}, "at_once of at least 1, got 0"),
    ],
)
def test_sampled_rows_says_what_it_needs(
    kind: str, shape: tuple[int, ...], options: dict[str, int], message: str
) -> None:
    data = [torch.zeros(shape, dtype=torch.long)]
    with pytest.raises(ValueError, match=message):
        sampled_rows(tiny(kind), data, **{"rows": 2, "prompt": 2, **options})


def certain(model: Any) -> Any:
    """The model, sure of its next token: what it samples is what is likeliest."""
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    return model
