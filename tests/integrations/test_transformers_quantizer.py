"""Packed models in transformers' own hands: loaded by from_pretrained, saved by save_pretrained."""

import copy
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from secateur.formats import SparseLinear
from secateur.integrations.transformers import load_folder
from tests.formats.weights import FORMATS
from tests.integrations.folders import change_config, make_folder

transformers = pytest.importorskip("transformers")
quantizer = pytest.importorskip("secateur.integrations.transformers_quantizer")
auto = pytest.importorskip("transformers.quantizers.auto")

IDS = torch.arange(12).view(2, 6)
LAYER = "model.layers.1.mlp.up_proj"

PATTERNS = {"csr": "unstructured:0.9", "block:4x8": "block:4x8@0.5", "block:2x1": "block:2x1@0.7"}


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random Llama of two layers, its rotary frequencies in float32 as when it is loaded."""
    sizes = {
        **{"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
        **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None},
    }
    config = transformers.LlamaConfig(**(sizes | changes))
    config.dtype = dtype
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM._from_config(config).eval()


def packed(format: str = "semi24", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = llama(dtype, **changes)
    sc.prune_(model, sc.plan(model, PATTERNS.get(format, "2:4")))
    sc.pack_(model, format)
    return model


def result(model: Any) -> Tensor:
    with torch.no_grad():
        first: Tensor = model(IDS)[0]
    return first


def from_pretrained(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@contextmanager
def stock() -> Iterator[None]:
    """transformers as it is without this library."""
    registries = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    kept = [registry.pop("secateur") for registry in registries]
    try:
        yield
    finally:
        for registry, entry in zip(registries, kept, strict=True):
            registry["secateur"] = entry


def edit_quantization(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, quantization_config=config["quantization_config"] | changes)


def edit_weights(folder: Path, name: str, tensor: Tensor | None) -> None:
    path = folder / "model.secateur.safetensors"
    tensors = load_file(path)
    assert tensors.pop(name) is not None
    save_file(tensors | ({} if tensor is None else {name: tensor}), path, {"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sc.save(packed(), tmp_path / "packed")
    return tmp_path / "packed"


# --- loading and saving --------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_model_comes_back_to_the_bit_or_not_at_all(format: str, tmp_path: Path) -> None:
    model = packed(format, torch.bfloat16)
    expected = result(model)
    sc.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for source in ("ours", "theirs"):
        loaded = from_pretrained(tmp_path / source)
        assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
        assert loaded.dtype == torch.bfloat16 and not loaded.training
        assert torch.equal(result(loaded), expected)
        again = tmp_path / f"{source} again"
        loaded.save_pretrained(again, max_shard_size="20KB")
        assert len(list(again.glob("*.safetensors"))) > 1
        assert torch.equal(result(from_pretrained(again)), expected)
        base = transformers.AutoModel.from_pretrained(tmp_path / source)
        assert torch.equal(result(base), result(model.model))
        with pytest.raises(OSError if source == "ours" else RuntimeError), stock():
            from_pretrained(tmp_path / source)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"), stock():
            from_pretrained(again)


def test_of_a_folder_that_sc_save_wrote_shards_are_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["secateur.files.save"], "SHARD_BYTES", 20_000)
    model = packed()
    sc.save(model, tmp_path)
    assert (tmp_path / "model.secateur.safetensors.index.json").is_file()
    for options in ({}, {"device_map": "cpu"}, {"local_files_only": True}):
        assert torch.equal(result(from_pretrained(tmp_path, **options)), result(model))
    assert torch.equal(result(sc.load(tmp_path)), result(model))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"), stock():
        from_pretrained(tmp_path)
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"lacks its weight file model\.secateur-00002-of-.*copy"):
        from_pretrained(tmp_path)


def test_the_config_names_what_is_packed_only_while_something_is(
    folder: Path, tmp_path: Path
) -> None:
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written.keys() == {"quant_method", "version", "weights", "packed"}
    assert written["weights"] == "model.secateur.safetensors"
    model = from_pretrained(folder)
    assert not hasattr(model.config, "transformers_weights")
    model.save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "transformers_weights" not in theirs
    assert theirs["quantization_config"] == {k: v for k, v in written.items() if k != "weights"}
    sc.unpack_(model)
    left = {"hf_quantizer", "is_quantized", "quantization_method", "save_pretrained"}
    assert not left & (vars(model).keys() | vars(model.model).keys())
    assert "quantization_config" not in model.config.to_dict()
    assert not hasattr(model.config, "_is_quantized")
    model.save_pretrained(tmp_path / "dense theirs")
    sc.save(model, tmp_path / "dense ours")
    for to in tmp_path.glob("dense*"):
        with stock():
            assert torch.equal(result(from_pretrained(to)), result(model))


def test_dequantize_is_unpack(folder: Path) -> None:
    model = from_pretrained(folder)
    expected = {name: m.weight for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    model.dequantize()
    assert expected and getattr(model, "hf_quantizer", None) is None
    for name, weight in expected.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, weight)


def test_a_model_of_another_head_takes_the_packed_layers_that_it_has(folder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(model.get_submodule(LAYER), SparseLinear)
    assert type(model.score) is nn.Linear
    assert torch.equal(result(model.model), result(from_pretrained(folder).model))


def test_layers_that_stay_float32_and_biases_are_read_as_they_were(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=48, decoder_start_token_id=0)
    bert = transformers.BertConfig(
        **{"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    t5 = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "t5", dtype=torch.float16
    )
    models = {"t5 packed": t5, "bert": transformers.BertForMaskedLM(bert).eval()}
    for name, model in models.items():
        sc.prune_(model, sc.plan(model, "2:4"))
        sc.pack_(model)
        model.save_pretrained(tmp_path / f"{name} theirs")
        sc.save(model, tmp_path / f"{name} ours")
        for source in ("theirs", "ours"):
            loaded = type(model).from_pretrained(tmp_path / f"{name} {source}")
            state = loaded.state_dict()
            for key, tensor in model.state_dict().items():
                assert state[key].dtype == tensor.dtype, key
                assert torch.equal(state[key], tensor), key


def test_what_stands_for_a_layer_meanwhile_is_left_alone_by_initialisation() -> None:
    """Some models draw the weights of their children, by functions that ask for two dimensions."""
    model = packed()
    description = model.config.quantization_config.packed[LAYER]
    stored = quantizer._Stored(model, LAYER, dict(description), False)
    import_module("transformers.initialization").xavier_uniform_(stored.weight)
    assert not isinstance(stored, nn.Linear) and not list(stored.parameters())
    assert all(tensor.is_meta for tensor in stored.buffers())


def test_a_packed_head_over_tied_embeddings_is_tied_no_longer(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    plan = sc.plan(model, {"lm_head": "2:4", "*_proj": "2:4"})
    sc.prune_(model, plan)
    sc.pack_(model)
    assert isinstance(model.lm_head, SparseLinear)
    sc.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for source in ("ours", "theirs"):
        loaded = from_pretrained(tmp_path / source)
        assert torch.equal(result(loaded), result(model))
        loaded.tie_weights()
        assert isinstance(loaded.lm_head, SparseLinear)
        assert torch.equal(result(loaded), result(model))
    sc.unpack_(model)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_model_over_several_devices_keeps_what_moves_its_inputs(tmp_path: Path) -> None:
    """The disk is the other device that there is without a GPU."""
    pytest.importorskip("accelerate")
    model = packed(tie_word_embeddings=False)
    sc.save(model, tmp_path / "packed")
    options: dict[str, Any] = {"offload_folder": str(tmp_path / "offloaded")}
    options["device_map"] = {"model": "cpu", "lm_head": "disk"}
    loaded = from_pretrained(tmp_path / "packed", **options)
    assert hasattr(loaded.get_submodule(LAYER), "_hf_hook")
    assert torch.equal(result(loaded), result(model))
    options["device_map"] = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="was offloaded, and packed layers are not: give device"):
        from_pretrained(tmp_path / "packed", offload_buffers=True, **options)


# --- what is wrong with a folder -----------------------------------------------------------------


def test_a_tensor_that_is_missing_or_damaged_is_an_error_and_never_random(folder: Path) -> None:
    whole = (folder / "model.secateur.safetensors").read_bytes()
    for key in ("values", "metadata"):
        edit_weights(folder, f"{LAYER}.{key}", None)
        said = f"packed layer '{LAYER}' lacks its {key} in the weight files: copy the folder again"
        with pytest.raises(ValueError, match=re.escape(said)):
            from_pretrained(folder)
        (folder / "model.secateur.safetensors").write_bytes(whole)
    metadata = load_file(folder / "model.secateur.safetensors")[f"{LAYER}.metadata"]
    edit_weights(folder, f"{LAYER}.metadata", torch.full_like(metadata, 0))
    with pytest.raises(ValueError, match=f"packed layer '{LAYER}': .*metadata.*: copy the folder"):
        from_pretrained(folder)
    (folder / "model.secateur.safetensors").write_bytes(whole)
    values = load_file(folder / "model.secateur.safetensors")[f"{LAYER}.values"]
    edit_weights(folder, f"{LAYER}.values", values.double())
    if transformers.__version__ < "5.18":  # which casts what it reads
        assert from_pretrained(folder).get_submodule(LAYER).packed["values"].dtype == values.dtype
        return
    said = rf"'{LAYER}': .*values needs \w+, got float64: copy the folder again"
    with pytest.raises(ValueError, match=said):
        from_pretrained(folder)


def test_a_dtype_that_weights_cannot_have_is_no_advice(folder: Path) -> None:
    with pytest.warns(UserWarning, match="though int8 was asked for: leave dtype= out"):
        from_pretrained(folder, dtype=torch.int8)


def test_what_the_config_may_not_say_is_one_line_with_the_remedy(folder: Path) -> None:
    whole = json.loads((folder / "config.json").read_text())["quantization_config"]
    packed = whole["packed"]

    def with_layer(**changes: Any) -> dict[str, Any]:
        return packed | {LAYER: packed[LAYER] | changes}

    cases: list[tuple[dict[str, Any], str]] = [
        ({"version": 2}, "has version 2 of .*, this secateur reads version 1: pip install -U"),
        ({"version": None}, "has version None of .* reads version 1: save the model again"),
        ({"weights": "../model.secateur.safetensors"}, "names the weight file '../model.*: copy"),
        ({"weights": "adapter.safetensors"}, "names the weight file 'adapter.*: copy"),
        ({"weights": "model.secateur.bin"}, "names the weight file 'model.secateur.bin'.*: copy"),
        ({"packed": [LAYER]}, "needs a description of each packed layer .* got list: copy"),
        ({"packed": packed | {"model.nothing": packed[LAYER]}}, "'model.nothing', Llama.* has no"),
        ({"packed": with_layer(format="semi42")}, f"'{LAYER}': .*semi42"),
        ({"packed": with_layer(out_features=64, stored=64)}, f"'{LAYER}' of 64 x 64, .*128 x 64"),
    ]
    for changes, said in cases:
        edit_quantization(folder, **(whole | changes))
        with pytest.raises(ValueError, match=said) as raised:
            from_pretrained(folder)
        assert "\n" not in str(raised.value)


def test_a_folder_of_pickles_is_not_opened(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {f"{LAYER}.values": "model.bin"}}
    (folder / "model.secateur.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.bin").write_text("no pickle")
    edit_quantization(folder, weights="model.secateur.safetensors.index.json")
    with pytest.raises(ValueError, match=r"weight file model\.bin, or it is no \.safetensors file"):
        from_pretrained(folder)


def test_a_packed_folder_of_transformers_is_no_dense_one(folder: Path, tmp_path: Path) -> None:
    from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    said = r"packed form, written by save_pretrained: load it with transformers\.LlamaForCausalLM\."
    with pytest.raises(ValueError, match=said):
        load_folder(tmp_path / "theirs")


def test_another_plug_in_of_this_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer._register()  # a second time is none
    other = type("Quantizer", (), {"__module__": "other_package"})
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "secateur", other)
    with pytest.raises(ValueError, match=r"by other_package: uninstall that package, or do not"):
        quantizer._register()


@pytest.mark.parametrize("hook", ["update_tp_plan", "update_attn_implementation"])
def test_tensor_parallelism_is_refused(hook: str, folder: Path) -> None:
    made = quantizer.Quantizer(quantizer.PackedConfig({}))
    for options in ({"tp_size": 2}, {"tp_plan": {"layers.*": "colwise"}}):
        config = SimpleNamespace(distributed_config=SimpleNamespace(**options))
        with pytest.raises(ValueError, match="cannot be split over devices yet, got tensor par"):
            getattr(made, hook)(config)
    getattr(made, hook)(SimpleNamespace(distributed_config=SimpleNamespace(tp_size=1)))


def test_a_dense_model_is_not_packed_on_its_way(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"packs no dense model: load it without, prune it, and"):
        from_pretrained(tmp_path, quantization_config=quantizer.PackedConfig({}))


# --- what people do with a model -----------------------------------------------------------------


def test_another_dtype_is_a_cast_afterwards(tmp_path: Path) -> None:
    model = packed(dtype=torch.bfloat16)
    sc.save(model, tmp_path)
    for dtype in (torch.float32, "float32"):
        with pytest.warns(UserWarning, match=r"packed in bfloat16 .*cast it afterwards"):
            loaded = from_pretrained(tmp_path, dtype=dtype)
        assert loaded.config.dtype == torch.bfloat16
        assert torch.equal(result(loaded), result(model))
    for dtype in (None, "auto", torch.bfloat16, "bfloat16"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asked = {} if dtype is None else {"dtype": dtype}
            assert torch.equal(result(from_pretrained(tmp_path, **asked)), result(model))
    assert result(loaded.to(torch.float32)).dtype == result(loaded.float()).dtype == torch.float32


def test_generation_and_pipelines_take_it_as_they_take_the_dense_model(tmp_path: Path) -> None:
    make_folder(tmp_path, "llama")  # for its tokenizer
    for file in tmp_path.glob("model*"):
        file.unlink()
    model = packed(vocab_size=16)
    tokenizer = (tmp_path / "tokenizer.json").read_bytes()
    sc.save(model, tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer.json").write_bytes(tokenizer)
    loaded = from_pretrained(tmp_path / "packed")
    sc.unpack_(model)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[3, 4, 5]])
    expected = model.generate(ids, **options)
    assert torch.equal(loaded.generate(ids, **options), expected)
    assert torch.equal(loaded.generate(ids, cache_implementation="static", **options), expected)
    assert loaded.hf_quantizer.is_compileable
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "packed"))
    assert isinstance(pipeline.model.get_submodule(LAYER), SparseLinear)
    (said,) = pipeline("a b c", **options)
    assert said["generated_text"].startswith("a b c")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depre:FutureWarning")  # PEFT's
def test_adapters_are_trained_and_written_beside_packed_layers(
    folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": True}
    torch.manual_seed(0)
    model = peft.get_peft_model(from_pretrained(folder), peft.LoraConfig(**settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = list[float]()
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    model.eval()
    expected = result(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(from_pretrained(folder), tmp_path / "adapter").eval()
    assert torch.equal(result(again), expected)
    model.get_base_model().save_pretrained(tmp_path / "base")  # without the adapters
    assert torch.equal(result(from_pretrained(tmp_path / "base")), result(from_pretrained(folder)))
    direct = from_pretrained(folder)
    direct.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(result(direct), expected)
    direct.save_pretrained(tmp_path / "direct")
    assert {p.name for p in (tmp_path / "direct").iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "direct" / "model.safetensors").exists()


def test_copies_carry_what_their_own_layers_are(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder)
    copied = copy.deepcopy(model)
    sc.unpack_(model)
    copied.save_pretrained(tmp_path / "copied")
    assert torch.equal(result(from_pretrained(tmp_path / "copied")), result(copied))
    assert copied.config.quantization_config is copied.hf_quantizer.quantization_config


@pytest.mark.parametrize("first", ["transformers", "secateur"])
def test_importing_secateur_is_enough_before_and_after_transformers(
    first: str, folder: Path
) -> None:
    other = "secateur" if first == "transformers" else "transformers"
    code = (
        f"import sys, {first}, {other}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"print(type(model.get_submodule({LAYER!r})).__name__)\n"
        "print([f for f in sys.meta_path if 'secateur' in type(f).__module__])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines()[-2:] == ["SparseLinear", "[]"]
