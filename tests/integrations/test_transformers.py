"""Hugging Face folders: what is loaded and what is refused."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.integrations.tokens import text_batches
from secateur.integrations.transformers import (
    copy_tokenizer,
    hollow,
    is_transformers,
    load_folder,
    save_config,
    save_folder,
    unloaded,
)
from tests.integrations.folders import change_config, make_folder, tiny

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
    refused("config.json is not JSON: Expecting property name")
    (folder / "config.json").write_text("[]")
    refused("config.json needs a JSON object, got list")


def test_weights_that_are_missing_truncated_or_packed_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    first = "model.layers.0.mlp.up_proj.weight"
    kept = {name: tensor for name, tensor in weights.items() if name != first}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights of LlamaForCausalLM, first '{first}'"):
        load_folder(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model cannot be loaded as LlamaForCausalLM"):
        load_folder(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        load_folder(folder)
    (folder / "model.secateur.safetensors").touch()
    with pytest.raises(ValueError, match=r"in secateur's packed form: load it with sc\.load\('"):
        load_folder(folder)


def test_a_folder_with_pickled_weights_only_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded as LlamaForCausalLM"):
        load_folder(folder)


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
        save_folder(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_copy_tokenizer_takes_the_tokenizer_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    (folder / "merges.txt").write_text("#version")
    target = tmp_path / "target"
    target.mkdir()
    assert copy_tokenizer(folder, target) == ("tokenizer.json", "merges.txt")
    assert {p.name for p in target.iterdir()} == {"tokenizer.json", "merges.txt"}
    assert (target / "merges.txt").read_text() == "#version"


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
    with pytest.raises(ValueError, match="cannot be loaded as LlamaForCausalLM"):
        load_folder(copied)
