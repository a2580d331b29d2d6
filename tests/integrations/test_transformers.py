"""Hugging Face folders: what is loaded, what is refused, and text as token batches."""

import json
import math
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.integrations.tokens import sampled_rows, text_batches, token_rows
from secateur.integrations.transformers import (
    hollow,
    is_transformers,
    load_folder,
    save_config,
    save_folder,
    tokenizer_files,
    unloaded,
    weight_files,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[END]", "a", "b", "c", "d"]


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of two layers."""
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes)).to(dtype).eval()
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True)
    config.dtype = dtype
    return transformers.LlamaForCausalLM._from_config(config).to(dtype).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer of one word a token, `[END]` its end-of-text token."""
    return make_folder(tmp_path / "model", "llama", eos_token_id=2)


def make_folder(path: Path, kind: str, **config: Any) -> Path:
    tiny(kind).save_pretrained(path)
    change_config(path, **config)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(3)  # as sentence encoders' files have it: must not cut our rows
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_folder_is_loaded_as_the_class_that_its_config_names(kind: str, tmp_path: Path) -> None:
    model = tiny(kind, torch.bfloat16).train()
    model.save_pretrained(tmp_path)
    loaded = load_folder(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(loaded.state_dict()[name], tensor), name
    wider = load_folder(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wider.parameters()} == {torch.float32}


def test_loading_errors_name_file_and_remedy(folder: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_folder(folder)

    with pytest.raises(ValueError, match=r"no folder .*nowhere: models are read from local"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config.json: it is no Hugging Face model folder"):
        load_folder(tmp_path)
    change_config(folder, quantization_config={"quant_method": "gptq"})
    refused("has a quantization_config: use the model that it was quantized from")
    change_config(folder, quantization_config=None, architectures=[])
    refused(r'config.json needs a model class under "architectures", got \[\]')
    change_config(folder, architectures=["os.system"])
    refused("names the class 'os.system', which is no model of transformers")
    change_config(folder, architectures=["AutoConfig"])
    refused("names the class 'AutoConfig', which is no model")
    change_config(folder, architectures=["MyModel"], auto_map={"AutoModel": "evil.MyModel"})
    refused(r"no model of transformers .* \(its own code, under auto_map, is never run\): make the")
    (folder / "config.json").write_text("{")
    refused("config.json cannot be read as JSON: Expecting property name")
    (folder / "config.json").write_text("[]")
    refused("config.json cannot be read as JSON: it needs an object in braces, got a list")


def test_weights_that_are_missing_truncated_or_packed_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    first = "model.layers.0.mlp.up_proj.weight"
    kept = {name: tensor for name, tensor in weights.items() if name != first}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights of LlamaForCausalLM, first '{first}'"):
        load_folder(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file: "):
        load_folder(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors, nor the index .*: copy the"):
        load_folder(folder)
    (folder / "model.secateur.safetensors").touch()
    with pytest.raises(ValueError, match=r"in secateur's packed form: load it with sc\.load\('"):
        load_folder(folder)


def test_a_folder_with_pickled_weights_only_says_how_to_convert_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError) as raised:
        load_folder(folder)
    assert f"{folder} has no model.safetensors" in str(raised.value)
    command = re.search(r'python -c "(.*)"', str(raised.value))
    assert command is not None
    monkeypatch.chdir(tmp_path)
    exec(command[1])
    assert_same(load_folder(tmp_path / "converted"), weights)


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"need {package}, not .* pip install 'secateur\[hf\]'"):
        if package == "transformers":
            load_folder(folder)
        else:
            text_batches(folder, ["a b c"], 1, 2, 1)


def test_unloaded_has_the_config_dtype_but_keeps_float32_buffers(tmp_path: Path) -> None:
    model = tiny("llama", torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    save_config(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json"]
    built = unloaded(tmp_path)
    assert type(built) is type(model) and not built.training
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert torch.equal(built.model.rotary_emb.inv_freq, load_frequencies(tmp_path / "stock"))
    assert built.generation_config.max_new_tokens == 7
    assert torch.get_default_dtype() == torch.float32


def load_frequencies(path: Path) -> torch.Tensor:
    tiny("llama", torch.bfloat16).save_pretrained(path)
    frequencies: torch.Tensor = load_folder(path).model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    return frequencies


def test_is_transformers() -> None:
    assert is_transformers(tiny("bert"))
    assert not is_transformers(nn.Linear(2, 2))


def test_a_quantized_model_is_not_saved_as_dense(tmp_path: Path) -> None:
    model = tiny("bert")
    model.config.quantization_config = SimpleNamespace()
    with pytest.raises(ValueError, match="this BertModel is quantized: load it without"):
        save_folder(model, tmp_path, model.state_dict())
    assert not list(tmp_path.iterdir())


def test_the_tokenizers_files_are_listed_and_nothing_else(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version")
    found = tokenizer_files(folder)
    assert found == {name: folder / name for name in ("tokenizer.json", "merges.txt")}


# --- what a folder may not do --------------------------------------------------------------------


def assert_same(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert weights and all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.fixture
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was given to a loader that runs code, whoever called it."""
    calls: list[object] = []

    def seen(*args: object, **kwargs: object) -> object:
        calls.append(args)
        raise RuntimeError("a pickle was read")

    for module, name in (
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(module, name, seen)
    return calls


def move_weights(folder: Path, name: str) -> None:
    """The weights in a file of another name, with an index that names it."""
    path = folder / "model.safetensors"
    keys = list(load_file(path))
    (folder / name).parent.mkdir(exist_ok=True)
    path.rename(folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["w.bin", "w.pt", "../w.safetensors", "sub/w.safetensors", "/w.safetensors", ".."]
)
def test_an_index_names_safetensors_files_of_its_own_folder_only(
    name: str, folder: Path, unpickled: list[object]
) -> None:
    weights = load_file(folder / "model.safetensors")
    move_weights(folder, "part.safetensors")
    assert_same(load_folder(folder), weights)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("part.safetensors", name))
    for source in (folder / name, folder / "w.bin"):
        if ".." not in name and not name.startswith("/"):
            source.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / "part.safetensors", source)
    said = f"index.json names the file {name!r}: weights are read from .safetensors files of the"
    for load in (load_folder, weight_files):
        with pytest.raises(ValueError, match=re.escape(said)):
            load(folder)
    assert not unpickled


@pytest.mark.parametrize(
    "content, said",
    [
        ("{}", "is no index of safetensors: it needs a weight_map"),
        ('{"weight_map": []}', "is no index of safetensors: it needs a weight_map"),
        ('{"weight_map": {}}', "is no index of safetensors: it needs a weight_map"),
        ('{"weight_map": {"a": 5}}', "names the file '5'"),
        ('{"weight_map": {"a": null}}', "names the file 'None'"),
        ('{"weight_map": {"a": "b.safetensors"}}', "lacks its weight file b.safetensors"),
        ("[" * 9999, "index.json cannot be read as JSON: it is nested more than"),
        ("\x00", "index.json cannot be read as JSON: "),
    ],
)
def test_a_damaged_index_is_one_line(content: str, said: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_folder(folder)


def test_two_files_with_one_tensor_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    move_weights(folder, "a.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"] + 1}, folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["extra"] = "b.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"b.safetensors has the tensor 'model.norm.weight', wh"):
        load_folder(folder)


def test_nothing_beside_a_model_is_read_or_run(folder: Path, unpickled: list[object]) -> None:
    """Adapters with a base model elsewhere, pickles and distributed checkpoints, as stock reads."""
    weights = load_file(folder / "model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "/elsewhere", "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    for name in ("adapter_model.bin", "pytorch_model.bin", ".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert_same(load_folder(folder), weights)
    change_config(folder, transformers_weights="pytorch_model.bin")
    with pytest.raises(ValueError, match="config.json does not make a LlamaForCausalLM with the"):
        load_folder(folder)
    assert not unpickled


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernels"},
        {"_attn_implementation": {"text_config": "someone/kernels"}},
        {"text_config": {"experts_implementation": "someone/kernels"}},
        {"parts": [{"attn_implementation": "someone/kernels"}]},
    ],
)
def test_a_config_takes_no_code_from_a_hub(changes: dict[str, Any], folder: Path) -> None:
    change_config(folder, **changes)
    for load in (load_folder, unloaded, hollow):
        with pytest.raises(ValueError, match="asks for the code of 'someone/kernels', which is"):
            load(folder)


def test_a_config_names_no_other_config(folder: Path) -> None:
    change_config(folder, configuration_files=["config.1.0.0.json"])
    with pytest.raises(ValueError, match="names other files under configuration_files: keep the"):
        load_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": "2"},
        {"hidden_size": 15},
        {"hidden_size": -16},
        {"hidden_size": {}},
        {"dtype": 1e308},
        {"dtype": "float99"},
        {"mlp_bias": {}},
        {"hidden_act": "nope"},
        {"rope_parameters": 5},
        {"num_hidden_layers": "x"},
        {"vocab_size": 1.5},
        {"pad_token_id": 10**9},
        {"architectures": ["PreTrainedModel"]},
        {"architectures": [5]},
        {"architectures": "LlamaForCausalLM"},
        {"id2label": 3},
    ],
)
def test_whatever_transformers_says_of_a_config_is_one_line_that_names_it(
    changes: dict[str, Any], folder: Path
) -> None:
    change_config(folder, dtype="float32")
    change_config(folder, **changes)
    for load in (load_folder, unloaded, hollow):
        with pytest.raises(ValueError) as raised:
            load(folder)
        assert str(folder / "config.json") in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_damaged_generation_config_is_one_line_that_names_it(folder: Path) -> None:
    path = folder / "generation_config.json"
    for content in ("[" * 9999, '{"a": 1, "a": 2}', "[]", '{"num_beams": "x"}', '{"top_k": {}}'):
        path.write_text(content)
        for load in (load_folder, unloaded):
            try:
                load(folder)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert content.startswith('{"num') or content.startswith('{"top')


def test_a_config_may_say_infinity(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8, "state_size": 4}
    heads = {"num_heads": 2, "head_dim": 8, "n_groups": 1, "expand": 2}
    model = transformers.Mamba2Model(transformers.Mamba2Config(**sizes, **heads))
    model.save_pretrained(tmp_path)
    change_config(tmp_path, time_step_limit=[0.0, math.inf])
    assert "Infinity" in (tmp_path / "config.json").read_text()
    loaded: Any = load_folder(tmp_path)
    assert tuple(loaded.config.time_step_limit) == (0.0, math.inf)


def test_settings_of_generation_are_those_of_the_folder(folder: Path) -> None:
    stock = transformers.LlamaForCausalLM.from_pretrained(folder)
    for load in (load_folder, unloaded):
        loaded: Any = load(folder)
        assert loaded.generation_config.to_dict() == stock.generation_config.to_dict()
        assert loaded.config.to_dict() == stock.config.to_dict()
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert load_folder(folder).generation_config.max_new_tokens == 7
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=5)
    assert load_folder(folder).generation_config.eos_token_id == 5


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "openai/whisper-tiny.en"])
def test_a_hubs_name_says_how_to_download_it(name: str) -> None:
    local = name.partition("/")[2]
    for load in (load_folder, hollow):
        with pytest.raises(ValueError, match=rf"first: hf download {name} --local-dir {local}$"):
            load(name)
    with pytest.raises(
        ValueError, match="no folder /a/b/c: models are read from local fol.* only$"
    ):
        load_folder("/a/b/c")


def test_saved_files_have_the_mode_of_other_new_files(tmp_path: Path) -> None:
    model = tiny("llama")
    (tmp_path / "plain").write_text("")
    save_folder(model, tmp_path / "out", model.state_dict())
    modes = {p.name: p.stat().st_mode for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}
    assert "model.safetensors" in modes


def test_a_hollow_model_is_the_loaded_one_without_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama", dtype="bfloat16")
    model, loaded = hollow(folder), load_folder(folder)
    assert type(model) is type(loaded) and not model.training
    described = {n: (p.shape, p.dtype) for n, p in loaded.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == described
    assert all(p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    buffers = dict(loaded.named_buffers())
    assert buffers and all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    change_config(folder, dtype=None)
    with pytest.raises(ValueError, match='needs a "dtype", the one in which'):
        hollow(folder)


# --- text ----------------------------------------------------------------------------------------


def test_causal_rows_are_cut_from_documents_laid_end_to_end(folder: Path) -> None:
    batches = text_batches(folder, ["a b c d a", " ", "b b [END]", "c d x"], 3, 4, 2)
    # a b c d a END | b b END | c d UNK END: nothing is padded, END is not doubled
    assert [b.tolist() for b in batches] == [[[3, 4, 5, 6], [3, 2, 4, 4]], [[2, 5, 6, 1]]]
    assert batches[0].dtype == torch.int64
    change_config(folder, eos_token_id=None)
    assert text_batches(folder, ["a b", "c d"], 1, 4, 1)[0].tolist() == [[3, 4, 5, 6]]


def test_encoder_passages_are_cut_and_padded_to_the_longest_of_their_batch(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "bert", pad_token_id=0)
    batches = text_batches(folder, ["a b c d a b", "b", "c d", "d"], 3, 5, 2)
    first, second = batches
    assert first["input_ids"].tolist() == [[3, 4, 5, 6, 3], [4, 0, 0, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert second["input_ids"].tolist() == [[5, 6]]
    model = load_folder(folder)
    with torch.no_grad():
        assert model(**first).last_hidden_state.shape == (2, 5, 16)


def test_text_files_are_one_document_or_its_paragraphs(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b\n\nc\n \nd d\n")
    assert text_batches(folder, text, 1, 6, 1)[0].tolist() == [[3, 4, 5, 6, 6, 2]]
    encoder = make_folder(tmp_path / "bert", "bert")
    passages = text_batches(encoder, str(text), 3, 8, 1)
    assert [p["input_ids"].tolist() for p in passages] == [[[3, 4]], [[5]], [[6, 6]]]
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "a b"}\n\n{"text": "c", "more": 1}\n')
    assert text_batches(folder, lines, 1, 5, 1)[0].tolist() == [[3, 4, 2, 5, 2]]


def test_text_errors(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, text: Any = ("a b",), rows: int = 1, length: int = 2) -> None:
        with pytest.raises(ValueError, match=message):
            text_batches(folder, text, rows, length, 1)

    refused("needs rows of at least 1, got 0", rows=0)
    refused("length of at most 32, the positions of the model in .*, got 33", length=33)
    refused("needs 4 tokens, the text has 3: ask for fewer or shorter rows", rows=2)
    refused(
        "absent.txt cannot be read as text: .*strings are passed in a list", tmp_path / "absent.txt"
    )
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "a"}\n{"words": "b"}\n')
    refused(r'text.jsonl, line 2: needs a JSON object with a string "text"', lines)
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer.json is no tokenizer")
    (folder / "tokenizer.json").unlink()
    refused("has no tokenizer.json: pass token ids instead, as 'file.safetensors:key'")
    encoder = make_folder(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="needs 2 passages, the text has 1"):
        text_batches(encoder, ["a"], 2, 4, 1)


def test_token_rows_are_the_first_rows_of_a_tensor(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    ids = torch.arange(12, dtype=torch.int16).view(4, 3)
    save_file({"train": ids, "flat": ids.flatten().clone(), "real": ids.float()}, file)
    batches = token_rows(f"{file}:train", 3, 2)
    assert [b.tolist() for b in batches] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8]]]
    assert batches[0].dtype == torch.int64
    for source, message in [
        (str(file), "token rows are named 'file.safetensors:key', got"),
        (f"{file}:valid", "has no tensor 'valid': it has flat, real, train"),
        (f"{file}:flat", r"needs integers of shape \[at least 3, tokens\], has shape \[12\]"),
        (f"{file}:real", r"has torch.float32 \[4, 3\]"),
        (f"{tmp_path}/absent.safetensors:train", "absent.safetensors cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            token_rows(source, 3, 2)
    with pytest.raises(ValueError, match=r"\[at least 5, tokens\], has torch.int16 \[4, 3\]"):
        token_rows(f"{file}:train", 5, 2)
    with pytest.raises(ValueError, match="rows and batch of at least 1, got 3 and 0"):
        token_rows(f"{file}:train", 3, 0)


# --- real folders --------------------------------------------------------------------------------

REFERENCE = Path(__file__).parents[2] / ".." / "shared" / "models" / "reference-lm"


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference language model is not here")
def test_a_sharded_folder_with_a_real_tokenizer(tmp_path: Path) -> None:
    model = load_folder(REFERENCE)
    weights = sum(p.numel() for p in model.parameters())
    assert f"{weights / 1e6:.1f}M" == "27.8M"
    text = "def f(x):\n    return x + 1\n"
    rows = text_batches(REFERENCE, [text], 1, 8, 1)
    decoded = tokenizers.Tokenizer.from_file(str(REFERENCE / "tokenizer.json")).decode(
        rows[0][0].tolist()
    )
    assert text.startswith(decoded) and len(decoded) > 8
    copied = tmp_path / "copy"
    shutil.copytree(REFERENCE, copied)
    (copied / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks its weight file model-00002-of-00004.safetensors"):
        load_folder(copied)


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
