"""Hugging Face folders: what is loaded and what is refused."""

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

from secateur.integrations.tokens import text_batches
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
from tests.integrations.folders import change_config, make_folder, tiny

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer of one word a token, `[END]` its end-of-text token."""
    return make_folder(tmp_path / "model", "llama", eos_token_id=2)


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
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"has no config.json, only model.Q4_K_M.gguf: a GGUF"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"files, only model.Q4_K_M.gguf: .*take the folder"):
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
    save_config(model, tmp_path, {"quant_method": "secateur"})
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


@pytest.mark.parametrize("layers", [2**31, 2**63, 10_001])
def test_a_config_has_no_layers_without_end(layers: int, folder: Path) -> None:
    change_config(folder, num_hidden_layers=layers)
    for load in (load_folder, unloaded, hollow):
        with pytest.raises(ValueError, match=f"has {layers:,} as its num_hidden_layers, more than"):
            load(folder)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size"])
def test_a_model_far_larger_than_its_files_is_not_built(key: str, folder: Path) -> None:
    """It would be filled with random numbers first, of which this one has 10**10 and more."""
    change_config(folder, num_hidden_layers=1000, **{key: 2**24})
    with pytest.raises(ValueError, match="would have more than 16 times as many numbers as the"):
        load_folder(folder)


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
