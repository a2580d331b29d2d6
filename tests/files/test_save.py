"""Saving and loading: the same weights bit for bit, or a clear error and nothing changed."""

import copy
import errno
import hashlib
import importlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from secateur.files.save import load, require_writable, save
from secateur.files.sidecar import read_sidecar
from secateur.formats import SparseLinear, pack_
from secateur.integrations.transformers import load_folder
from tests.reconstruct.problems import gpt2_and_batches

# By its path in sys.modules: the package's own name `save` is the function.
save_module = importlib.import_module("secateur.files.save")


class Net(nn.Module):
    """Two linears and a tied pair, a buffer, a bf16 parameter and a view of a parameter."""

    def __init__(self, hidden: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Linear(8, hidden)
            self.outer = nn.Linear(hidden, 8, bias=False)
            self.embedding = nn.Embedding(5, 8)
            self.head = nn.Linear(8, 5, bias=False)
            self.scale = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
            self.register_buffer("steps", torch.tensor(seed))
        self.head.weight = self.embedding.weight
        self.register_buffer("corner", self.inner.weight.detach()[:2, :2])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.inner(x).relu()))


def pruned(seed: int = 0) -> Net:
    model = Net(seed=seed)
    sc.prune_(model, sc.plan(model, "2:4", layers=["inner", "outer"]))
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def edit_sidecar(folder: Path, **changes: Any) -> None:
    path = folder / "secateur.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- dense, any module ---------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 600])
def test_a_model_comes_back_bit_for_bit_whole_or_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(save_module, "SHARD_BYTES", shard_bytes)
    model, other = pruned(seed=1), Net(seed=2)
    save(model, tmp_path / "out")
    weights = other.embedding.weight
    assert load(tmp_path / "out", other) is other
    assert_same(other, state(model))
    assert other.embedding.weight is weights and other.head.weight is weights  # still tied
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    if shard_bytes == 600:
        assert files[0] == "model-00001-of-00003.safetensors"
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"]["outer.weight"] == "model-00002-of-00003.safetensors"
        stored = [load_file(tmp_path / "out" / name) for name in files[:3]]
        assert index["metadata"]["total_size"] == sum(t.nbytes for s in stored for t in s.values())
    else:
        assert files == ["model.safetensors", "secateur.json"]
        assert "head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_the_weight_file_is_one_that_safetensors_alone_can_load(tmp_path: Path) -> None:
    model = pruned()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    other = Net(seed=3)
    missing, unexpected = other.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["head.weight"], [])
    assert_same(other, state(model))


def test_an_untied_model_gets_the_tied_tensor_in_both_places(tmp_path: Path) -> None:
    model, other = Net(seed=1), Net(seed=2)
    other.head.weight = nn.Parameter(torch.zeros(5, 8))
    save(model, tmp_path)
    load(tmp_path, other)
    assert_same(other, state(model))


def test_the_sidecar_tells_plan_report_sparsity_versions_and_hashes(tmp_path: Path) -> None:
    model = Net()
    plan = sc.plan(model, {"inner": "1:4", "outer": "2:4"})
    report = sc.prune_(model, plan)
    save(model, tmp_path, plan=plan, reports=[report])
    found = read_sidecar(tmp_path)
    assert (found.form, found.model_class) == ("dense", "Net")
    assert found.plan == plan
    assert found.reports[0]["method"] == "magnitude"
    assert found.reports[0]["layers"][0]["layer"] == "inner"
    assert found.sparsity == {"inner": 0.75, "outer": 0.5, "embedding": 0.0, "head": 0.0}
    assert found.tied == {"head.weight": "embedding.weight"}
    assert found.torch_version == torch.__version__
    assert found.library_version == sc.__version__
    content = (tmp_path / "model.safetensors").read_bytes()
    weights = found.files["model.safetensors"]
    assert found.files.keys() == {"model.safetensors"}
    assert (weights.bytes, weights.sha256) == (len(content), hashlib.sha256(content).hexdigest())


# --- packed --------------------------------------------------------------------------------------


def test_a_packed_model_is_packed_on_disk_and_comes_back_packed(tmp_path: Path) -> None:
    model = pruned()
    dense = state(model)
    pack_(model, "semi24", ["inner", "outer"])
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.secateur.safetensors",
        "secateur.json",
    ]
    stored = load_file(tmp_path / "model.secateur.safetensors")
    assert "inner.weight" not in stored and stored["inner.values"].numel() == 16 * 8 // 2
    found = read_sidecar(tmp_path)
    assert found.form == "packed" and found.packed["inner"]["format"] == "semi24"
    assert (found.sparsity["inner"], found.sparsity["outer"]) == (0.5, 0.5)
    for other in (Net(seed=5), pack_and_return(pruned(seed=6))):  # a dense and a packed skeleton
        load(tmp_path, other.eval())
        assert isinstance(other.inner, SparseLinear) and not other.inner.training
        assert torch.equal(other.inner.weight, dense["inner.weight"])
        assert torch.equal(other.inner.bias, dense["inner.bias"])
        assert torch.equal(other(x), expected)


def pack_and_return(model: Net) -> Net:
    pack_(model, "bitmap", ["inner"])
    return model


def test_a_packed_gpt2_comes_back_and_unpacks_to_its_own_layers(tmp_path: Path) -> None:
    model, batches = gpt2_and_batches(blocks=1)
    plan = sc.plan(model, "2:4")
    sc.reconstruct_(model, plan, sc.sparsegpt, batches)
    expected = model(batches[0]).logits
    save(model, tmp_path / "dense", plan=plan)
    pack_(model)
    save(model, tmp_path / "packed", plan=plan)
    loaded = load(tmp_path / "packed")
    assert isinstance(loaded.transformer.h[0].attn.c_attn, SparseLinear)
    assert torch.equal(loaded(batches[0]).logits, model(batches[0]).logits)
    sc.unpack_(loaded)
    assert torch.equal(loaded(batches[0]).logits, expected)
    stock = load_folder(tmp_path / "dense").state_dict()
    assert all(torch.equal(tensor, stock[key]) for key, tensor in loaded.state_dict().items())
    assert sc.check(loaded, plan) == dict.fromkeys(plan.layers, 0.5)


def test_a_bare_packed_layer_is_refused(tmp_path: Path) -> None:
    layer = pack_and_return(pruned()).inner
    with pytest.raises(ValueError, match=r"got a bare SparseLinear: wrap it in nn\.Sequential"):
        save(layer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- transformers --------------------------------------------------------------------------------


def tiny(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


def first_output(model: nn.Module) -> Tensor:
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        output: Tensor = model(ids)[0]
    return output


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_dense_transformers_folder_is_stock(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny(kind)
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    save(model, tmp_path, plan=plan)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    stock = type(model).from_pretrained(tmp_path)
    assert_same(stock, state(model))
    assert_same(transformers.AutoModel.from_pretrained(tmp_path), state(base_of(model)))
    loaded = load(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert_same(loaded, state(model))
    assert sc.check(loaded, read_sidecar(tmp_path).plan)
    given = type(model)(model.config)
    assert load(tmp_path, given) is given
    assert_same(given, state(model))


def base_of(model: Any) -> nn.Module:
    base: nn.Module = model.base_model
    return base


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_packed_transformers_folder_is_loaded_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    sc.prune_(model, sc.plan(model, "2:4"))
    report = pack_(model, "semi24")
    expected = first_output(model)
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"is in secateur's packed form: load it with sc\.load\('"):
        load_folder(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert_same(loaded, state(model))
    assert len([m for m in loaded.modules() if isinstance(m, SparseLinear)]) == len(report.layers)
    assert torch.equal(first_output(loaded), expected)
    if kind == "llama":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    given = type(model)(model.config).eval()
    load(tmp_path, given)
    assert torch.equal(first_output(given), expected)


def packed_llama() -> tuple[Any, sc.Plan]:
    model = tiny("llama")
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    pack_(model, "semi24")
    return model, plan


def test_every_copy_of_a_packed_model_writes_itself_and_no_part_of_one_does(
    tmp_path: Path,
) -> None:
    model, _ = packed_llama()
    save(model, tmp_path / "ours")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = {
        "itself": model,
        "copied": copy.deepcopy(model),
        "pickled": torch.load(buffer, weights_only=False),
        "loaded": load(tmp_path / "ours"),
        "compiled": torch.compile(model, backend="eager"),
    }
    said = (
        r"no other loader knows: write them with sc.save\(model, folder\), or call unpack_\(model"
    )
    for name, packed in others.items():
        packed.save_pretrained(tmp_path / name)
        assert_same(type(model).from_pretrained(tmp_path / name), state(model))
        with pytest.raises(ValueError, match=said):
            packed.model.save_pretrained(save_directory=str(tmp_path / "part"))
        assert any(key.endswith("0.mlp.up_proj.values") for key in packed.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"ours", *others}
    del others["compiled"]  # dynamo does not trace the shape checks of a test run
    assert all(torch.equal(first_output(other), first_output(model)) for other in others.values())
    copied = copy.deepcopy(model)
    sc.unpack_(model)
    for plain, folder in ((model, "plain"), (model.model, "inner")):
        assert not {"save_pretrained", "hf_quantizer"} & vars(plain).keys()
        plain.save_pretrained(tmp_path / folder)
    assert_same(load_folder(tmp_path / "plain"), state(model))
    assert "save_pretrained" in vars(copied.model) and "hf_quantizer" in vars(copied)


def test_a_model_is_packed_for_its_writers_until_the_last_layer_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    sc.prune_(model, sc.plan(model, "2:4"))
    names = [name for name, m in model.named_modules() if name.endswith("up_proj")]
    pack_(model, "semi24", names[:1])
    pack_(model, "bitmap", names[1:])
    assert sorted(model.config.quantization_config.packed) == sorted(names)
    with pytest.raises(ValueError, match="no other loader knows"):
        model.model.save_pretrained(tmp_path)
    packed = model.config.quantization_config

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("secateur.formats.pack.separate_activations_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sc.unpack_(model)
    assert model.config.quantization_config is model.hf_quantizer.quantization_config is packed
    sc.unpack_(model)
    monkeypatch.setattr("secateur.formats.pack.PackReport", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_(model, "semi24")
    model.save_pretrained(tmp_path)
    assert_same(load_folder(tmp_path), state(model))


# --- what is refused before it is read into a model ----------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    save(pruned(), folder)
    return folder


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    model = pruned()
    pack_(model, "semi24", ["inner"])
    save(model, tmp_path / "packed")
    return tmp_path / "packed"


def refused(folder: Path, message: str, model: nn.Module | None = None) -> None:
    model = Net(seed=9) if model is None else model
    before, modules = state(model), list(model.modules())
    with pytest.raises(ValueError, match=message):
        load(folder, model)
    assert_same(model, before)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def test_damaged_weight_files_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    cut = rf"model.safetensors has {len(whole) - 10:,} bytes, {len(whole):,} were saved: .*copy the"
    refused(saved, cut)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(saved, r"model.safetensors was changed after it was saved, its sha256 differs: copy")
    path.unlink()
    refused(saved, r"saved lacks its file model.safetensors: copy the folder again")
    path.write_bytes(whole)
    load(saved, Net())


def test_a_missing_shard_and_a_foreign_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_module, "SHARD_BYTES", 600)
    save(pruned(), tmp_path)
    save_file({"inner.weight": torch.zeros(16, 8)}, tmp_path / "model.safetensors")
    refused(
        tmp_path,
        r"model.safetensors was not saved with this model, and loaders would read it: move",
    )
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    content = index.read_text()
    index.write_text(content.replace("00002-of", "00001-of"))
    refused(tmp_path, "index.json was changed after it was saved")
    index.write_text(content)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "lacks its file model-00002-of-00003.safetensors")


def test_a_damaged_foreign_or_newer_sidecar_is_refused(saved: Path) -> None:
    path = saved / "secateur.json"
    whole = path.read_text()
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"version": 3, "library_version": "9.1"},
            "has format version 3, by secateur 9.1; this .* reads version 2: pip install -U",
        ),
        (
            {"version": 1, "library_version": "0.1"},
            "has format version 1, by secateur 0.1; this .* reads version 2: save the model again",
        ),
        ({"version": None}, "is damaged: it has no version"),
        ({"form": "zip"}, "is damaged: at form: Input should be 'dense' or 'packed'"),
        ({"import": "os"}, "is damaged: at import: Extra inputs are not permitted"),
        (
            {"sparsity": {"inner": "half"}},
            r"is damaged: at sparsity.inner: Input should be a valid",
        ),
        ({"form": "packed"}, "its form is packed with 0 packed layers"),
        ({"files": {}}, "is damaged: at files: Dictionary should have at least 1 item"),
        *(
            ({"files": {name: {"bytes": 0, "sha256": "0" * 64}}}, "names the file .* none of its")
            for name in ("../x.safetensors", "/x", "a/b", "..", "", "secateur.json", "a\\b")
        ),
        (
            {"plan": {"version": 1}},
            "the plan in .*secateur.json is not a plan: at layers: Field req",
        ),
    ]
    for changes, message in cases:
        edit_sidecar(saved, **changes)
        refused(saved, message)
        path.write_text(whole)
    path.write_text(whole[:100])
    refused(saved, r"secateur.json cannot be read as JSON: .*: copy the folder again from where")
    path.write_text('{"version": 2, "version": 2}')
    refused(saved, r"secateur.json cannot be read as JSON: it has the key 'version' twice: copy")
    path.unlink()
    refused(saved, r"has no secateur.json: sc.load reads what sc.save wrote; a Hugging Face folder")
    refused(saved / "nowhere", "there is no folder .*nowhere")
    (saved / "model.gguf").write_bytes(b"GGUF")
    refused(saved, "has no secateur.json: .*; a GGUF file holds weights quantised for llama.cpp")
    with pytest.raises(ValueError, match="downloaded first: hf download owner/name --local"):
        sc.load("owner/name")


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    refused(saved, r"\(a Net\) has inner.weight as \(16, 8\) of .*, this Net as \(24, 8\)", Net(24))
    refused(
        saved, r"inner.bias as \(16,\) of torch.float32, this Net as \(16,\) of .*64", in_double()
    )
    more = Net()
    more.extra = nn.Linear(2, 2)
    refused(saved, "lacks 2 tensors of this Net, first 'extra.weight': pass a model of the", more)
    less = Net()
    del less.outer
    refused(saved, "has 1 tensors that this Net lacks, first 'outer.weight'", less)
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ValueError, match=r"has no memory \(meta device\): call model.to_empty"):
        load(saved, empty)


def in_double() -> Net:
    model = Net()
    model.inner.bias = nn.Parameter(model.inner.bias.double())
    return model


def test_packed_layers_of_another_model_are_refused(packed: Path) -> None:
    refused(packed, r"packed linear layer 'inner' of 16 x 8, this Net has Linear\(in_fe", Net(24))
    other = Net()
    other.inner = nn.Identity()
    refused(packed, r"packed linear layer 'inner' of 16 x 8, this Net has Identity\(\)", other)
    other = Net()
    other.head.weight = nn.Parameter(torch.zeros(6, 8))
    refused(packed, r"has head.weight as \(5, 8\)", other)
    entry = json.loads((packed / "secateur.json").read_text())["packed"]["inner"]
    edit_sidecar(packed, packed={"inner": entry | {"format": "os.system"}})
    refused(packed, "packed layer 'inner': unknown format 'os.system'")
    edit_sidecar(packed, packed={"inner": entry | {"stored": 5}})
    refused(packed, "packed layer 'inner': ")


def test_a_folder_without_a_config_needs_a_model(saved: Path) -> None:
    with pytest.raises(
        ValueError, match=r"weights of a Net and no config.json .* pass it as model="
    ):
        load(saved)


@pytest.mark.parametrize("when", ["copying", "swapping"])
def test_an_interrupted_load_leaves_the_model_as_it_was(
    packed: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    model = Net(seed=9)
    before, inner = state(model), model.inner
    calls: list[int] = []
    swap = save_module.swap

    def interrupted(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1 and when == "copying":
            raise KeyboardInterrupt
        swap(*args)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(packed, model)
    assert_same(model, before)
    assert model.inner is inner
    monkeypatch.undo()
    load(packed, model)
    assert isinstance(model.inner, SparseLinear)


# --- where a save may go, and what it leaves when it fails ---------------------------------------


def test_a_folder_with_other_files_is_never_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files: choose another"):
            save(Net(), tmp_path, overwrite=overwrite)
    with pytest.raises(ValueError, match=r"thesis.tex is a file: choose another name"):
        require_writable(tmp_path / "thesis.tex")
    with pytest.raises(
        ValueError, match=r"cannot write into .*thesis.tex: Not a directory: choose"
    ):
        require_writable(tmp_path / "thesis.tex" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_without_write_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Root may write anywhere, so the system's answer to another user is given here.
    monkeypatch.setattr("tempfile.mkdtemp", refused)
    text = f"save cannot write into {tmp_path}: Permission denied: choose a folder that you may"
    with pytest.raises(ValueError, match=re.escape(text)):
        require_writable(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_model_is_replaced_only_when_asked_and_the_tokenizer_stays(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a saved model: .* or pass overwrite=True"):
        save(pruned(seed=4), saved)
    assert_same(load(saved, Net()), state(pruned()))
    model = pruned(seed=4)
    pack_(model, "semi24", ["inner"])
    save(model, saved, overwrite=True)
    assert sorted(p.name for p in saved.iterdir()) == [
        "model.secateur.safetensors",
        "secateur.json",
        "tokenizer.json",
    ]
    assert_same(load(saved, Net()), state(model))


def test_a_save_that_fails_leaves_the_old_folder(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "fingerprints", interrupted)  # the weights are written by then
    with pytest.raises(KeyboardInterrupt):
        save(pruned(seed=4), saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("kind", ["plain", "packed", "llama"])
def test_overwriting_removes_what_was_saved_and_nothing_else(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_module, "SHARD_BYTES", 600)
    folder = tmp_path / "m"
    model = tiny("llama") if kind == "llama" else pruned()
    if kind == "packed":
        pack_(model, "semi24", ["inner"])
    save(model, folder)
    written = {path.name for path in folder.iterdir()}
    mine = {
        "adapter_model.safetensors": "a",
        "adapter_config.json": "{}",
        "tokens.safetensors": "b",
        "pytorch_model.bin": "c",
        "tokenizer.json": "{}",
        "notes/a.txt": "d",
    }
    (folder / "notes").mkdir()
    for name, content in mine.items():
        (folder / name).write_text(content)
    load(folder, type(model)(model.config) if kind == "llama" else Net())  # they are no hurdle
    save(Net(), folder, overwrite=True)
    assert {name: (folder / name).read_text() for name in mine} == mine
    after = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert after - mine.keys() == {*read_sidecar(folder).files, "secateur.json"}
    if kind != "plain":
        assert not (written - {"secateur.json", *read_sidecar(folder).files}) & after
    assert_same(load(folder, Net(seed=3)), state(Net()))


@pytest.mark.parametrize(
    "name, early",
    [
        ("model-00009-of-00009.safetensors", True),
        ("model.safetensors.index.json", True),
        ("model.secateur.safetensors", True),
        ("generation_config.json", True),
        ("config.json", False),  # a model of no transformers may have one
    ],
)
def test_a_file_that_is_not_the_models_is_never_replaced(
    name: str, early: bool, saved: Path
) -> None:
    (saved / name).write_text("mine")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    said = re.escape(f"{saved / name} is none of the saved model's files and would be replaced")
    with pytest.raises(ValueError, match=said):
        save(tiny("llama"), saved, overwrite=True)
    if early:
        with pytest.raises(ValueError, match=said):
            require_writable(saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_full_disk_is_an_oserror_that_names_the_file_and_changes_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    models = [pruned(seed=4), pack_and_return(pruned()), tiny("llama")]

    def full(*args: object, **kwargs: object) -> None:
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(text)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for model in models:
        with pytest.raises(OSError, match="No space left on device: '.*partial") as raised:
            save(model, saved, overwrite=True)
        assert raised.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_files_and_folder_have_the_mode_of_other_new_ones(tmp_path: Path) -> None:
    for umask, file, folder in ((0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0, 0o666, 0o777)):
        before = os.umask(umask)
        try:
            for i, model in enumerate((pruned(), pack_and_return(pruned()), tiny("llama"))):
                out = tmp_path / f"{umask}-{i}"
                save(model, out)
                assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {file}
                assert out.stat().st_mode & 0o777 == folder
        finally:
            os.umask(before)


# --- every file is verified ----------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_every_file_that_a_loader_reads_is_verified(
    name: str, is_packed: bool, tmp_path: Path
) -> None:
    model = tiny("llama")
    sc.prune_(model, sc.plan(model, "2:4"))
    if is_packed:
        pack_(model, "semi24")
    save(model, tmp_path)
    assert read_sidecar(tmp_path).files.keys() == {p.name for p in tmp_path.iterdir()} - {
        "secateur.json"
    }
    assert torch.equal(first_output(load(tmp_path)), first_output(model))
    path = tmp_path / name
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"hidden_act": "relu", "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match=rf"{name} has .* it was cut off or changed: copy the fol"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"lacks its file {name}: copy the folder again"):
        load(tmp_path)


def test_a_config_that_was_not_saved_makes_no_model(saved: Path) -> None:
    tiny("llama").config.save_pretrained(saved)
    with pytest.raises(ValueError, match="weights of a Net and no config.json to make it from"):
        load(saved)
    assert_same(load(saved, Net(seed=2)), state(pruned()))


# --- models inside others ------------------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    return wrapped  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
@pytest.mark.parametrize("kind", ["plain", "packed", "llama", "packed llama"])
def test_of_a_wrapped_model_it_is_the_model_that_is_saved(
    wrap: Any, kind: str, tmp_path: Path
) -> None:
    model = tiny("llama") if "llama" in kind else Net()
    plan = sc.plan(model, "2:4", layers=["*q_proj", "inner"][:1] if "llama" in kind else ["inner"])
    sc.prune_(model, plan)
    if "packed" in kind:
        pack_(model, "semi24", list(plan.layers))
    save(model, tmp_path / "plain", plan=plan)
    save(wrap(model), tmp_path / "wrapped", plan=plan)
    files = {p.name for p in (tmp_path / "plain").iterdir()}
    assert files == {p.name for p in (tmp_path / "wrapped").iterdir()}
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "wrapped" / name
        ).read_bytes()
    fresh = type(model)(model.config) if "llama" in kind else Net(seed=2)
    given = wrap(fresh)
    assert load(tmp_path / "plain", given) is given
    assert_same(fresh, state(model))


def test_a_part_that_is_compiled_is_saved_under_its_plain_name(tmp_path: Path) -> None:
    for model, part in ((pruned(), "inner"), (tiny("llama"), "model")):
        expected = state(model)
        setattr(model, part, compiled(getattr(model, part)))
        save(model, tmp_path / part)
        stored = load_file(tmp_path / part / "model.safetensors")
        assert stored and all(torch.equal(t, expected[name]) for name, t in stored.items())
        assert not any("_orig_mod" in name for name in read_sidecar(tmp_path / part).sparsity)
    assert_same(load(tmp_path / "inner", Net(seed=2)), state(pruned()))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depre:FutureWarning")  # PEFT's
@pytest.mark.parametrize("way", ["around", "inside"])
@pytest.mark.parametrize("packs", [False, True])
def test_of_an_adapted_model_it_is_the_model_that_is_saved(
    way: str, packs: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    plan = sc.plan(model, "2:4", layers=["*_proj"])
    sc.prune_(model, plan)
    if packs:
        pack_(model, "semi24", list(plan.layers)[-1:])  # a down_proj, which is not adapted
    save(model, tmp_path / "plain", plan=plan)
    copies = ["o_proj"] if way == "around" else None
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=copies)
    given: Any = model
    if way == "around":
        given = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    adapted = sc.plan(given, "2:4", layers=["*q_proj.base_layer", "*up_proj"])
    with pytest.warns(UserWarning, match="save writes the model without the adapters that PEFT"):
        save(given, tmp_path / "adapted", plan=adapted)
    one, two = tmp_path / "plain", tmp_path / "adapted"
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    found, expected = read_sidecar(two), read_sidecar(one)
    assert (found.files, found.packed) == (expected.files, expected.packed)
    assert (found.tied, found.sparsity) == (expected.tied, expected.sparsity)
    names = {name for name in plan.layers if name.endswith(("q_proj", "up_proj"))}
    assert found.plan is not None and found.plan.layers.keys() == names
    loaded = load(two)
    sc.unpack_(loaded)
    assert sc.check(loaded, found.plan)
    if way == "inside":
        assert model._hf_peft_config_loaded


# --- weights that are computed -------------------------------------------------------------------


class Mask(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (weight > 0)


@pytest.mark.parametrize("kind", ["net", "llama"])
@pytest.mark.parametrize("way", ["prune", "parametrize"])
def test_weights_that_are_computed_are_refused_with_what_makes_them_plain(
    way: str, kind: str, tmp_path: Path
) -> None:
    model: Any = tiny("llama") if kind == "llama" else Net()
    name = "model.layers.1.mlp.up_proj" if kind == "llama" else "outer"
    if way == "prune":
        torch.nn.utils.prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)
    else:
        torch.nn.utils.parametrize.register_parametrization(
            model.get_submodule(name), "weight", Mask()
        )
    with pytest.raises(ValueError, match=f"weights that loaders know, {name}.weight ") as raised:
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    remedy = re.search(r"with (torch\S+\(.*\))$", str(raised.value))
    assert remedy is not None
    eval(remedy[1], {"torch": torch, "layer": model.get_submodule(name)})
    save(model, tmp_path / "out")
    given = type(model)(model.config) if kind == "llama" else Net(seed=2)
    expected = state(model)  # in the order of a model that never had a mask
    assert_same(load(tmp_path / "out", given), {n: expected[n] for n in given.state_dict()})
    assert bool((model.get_submodule(name).weight == 0).any())


def test_a_norm_of_the_weights_belongs_to_its_architecture(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "conv_dim": [16], "conv_stride": [2], "conv_kernel": [3],
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 8,
        "num_feat_extract_layers": 1,
    }  # fmt: skip
    speech = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes)).eval()
    save(speech, tmp_path / "speech")
    assert_same(load(tmp_path / "speech"), state(speech))
    plain = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    save(plain, tmp_path / "plain")
    other = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert_same(load(tmp_path / "plain", other), state(plain))
    normed = tiny("llama")
    torch.nn.utils.parametrizations.weight_norm(normed.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"know, model.layers.0.mlp.up_proj.weight is computed by"):
        save(normed, tmp_path / "normed")


class Endless:
    def to_dict(self) -> dict[str, Any]:
        return {"seconds": float("inf")}


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="reports of plain finite data, Endless is not: Out of"):
        save(Net(), folder, reports=[Endless()])
    with pytest.raises(ValueError, match="the plan was made for another model than this Net"):
        save(Net(), folder, plan=sc.plan(nn.Sequential(nn.Linear(4, 4)), "2:4"))
    with torch.device("meta"), pytest.raises(ValueError, match=r"has no data \(meta device\)"):
        save(Net(), folder)
    sparse = Net()
    sparse.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"table is a Tensor of layout torch.sparse_coo: make it"):
        save(sparse, folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that refuses root")
def test_a_place_that_refuses_even_root_is_found_out_before_the_work() -> None:
    with pytest.raises(ValueError, match="save cannot write into /proc: .*: choose a folder"):
        require_writable("/proc/out")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_scripted_parts_are_saved_as_what_they_hold(whole: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 4)))
        scripted: nn.Module = torch.jit.script(model)
        return scripted if whole else model

    model, other = make(), make()
    save(model, tmp_path / "saved")
    load(tmp_path / "saved", other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
