"""vLLM's plug-in, against what is recorded of vLLM: signatures, shards, and what it refuses.

It has not been run inside vLLM on a GPU.
"""

import importlib.metadata
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.formats import SparseLinear, describe
from secateur.formats.contract import Packed
from secateur.formats.format import parse_format
from secateur.integrations.packed_config import packed_config
from tests.integrations.vllm_stand_in import RECORD, Process, Registered, vllm_in_place

FORMATS = [
    "semi24", "semi24_int4", "semi24_int4:channel", "semi24_int8", "semi24_fp8",
    "semi24_int8_dynamic", "semi24_fp8_dynamic", "int8_dynamic", "fp8_dynamic",
    "int4", "int4:channel", "int8",
]  # fmt: skip
COLUMNS = 512
SIZES = {"q": 128, "k": 32, "v": 32, "gate": 96, "up": 96, "down": 64}
FUSED = {"qkv_proj": ["q", "k", "v"], "gate_up": ["gate", "up"]}
KV_HEADS = 2
BASE = "vllm.model_executor.layers.quantization.base_config"
LINEAR = "vllm.model_executor.layers.linear"


@pytest.fixture(scope="module")
def registered() -> Iterator[Registered]:
    with vllm_in_place() as found:
        yield found


@pytest.fixture
def plugin(registered: Registered) -> Any:
    import secateur.integrations.vllm_plugin as found

    return found


def packed(format: str, rows: int, seed: int = 0, columns: int = COLUMNS) -> Packed:
    """A packed weight of random numbers, two of four zero where the format is 2:4."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    fours = weight.view(rows, -1, 4)
    if "24" in format:
        fours.scatter_(-1, fours.abs().topk(2, -1, largest=False).indices, 0)
    return parse_format(format).pack(weight)


def stored(weight: Packed) -> dict[str, Any]:
    """The tensors as a file has them, and the number of columns."""
    return {**weight.tensors, "in": weight.shape[1]}


def config_of(plugin: Any, weights: dict[str, Packed]) -> Any:
    """The plug-in's config for a folder of these layers, with vLLM's names of siblings."""
    described = {f"m.{n}": describe(SparseLinear(w)) for n, w in weights.items()}
    found = plugin.SecateurConfig.from_config(
        packed_config(described, "model.secateur.safetensors")
    )
    found.packed_modules_mapping = FUSED
    return found


def linear() -> nn.Module:

    made: nn.Module = sys.modules[LINEAR].LinearBase()
    return made


def loaded(config: Any, name: str, load: Any, *given: Any) -> tuple[Any, nn.Module]:
    """The method and the layer of this name, loaded by a rule from what is given."""
    layer = linear()
    method = config.get_quant_method(layer, f"m.{name}")
    load(method, layer, *given)
    method.process_weights_after_loading(layer)
    assert [n for n, _ in layer.named_parameters()] == [], "no tensor is held twice"
    return method, layer


def test_it_is_found_and_registered_once_or_twice(registered: Registered, plugin: Any) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    group = RECORD["modules"]["vllm.plugins"]["constants"]["DEFAULT_PLUGINS_GROUP"]
    point = importlib.metadata.EntryPoint(
        "secateur", pyproject["project"]["entry-points"][group]["secateur"], group
    )
    for _ in range(2):
        point.load()()
    assert registered.configs == {"secateur": plugin.SecateurConfig}
    assert registered.second_loader == ["SecateurLinearMethod"]


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("SecateurConfig", [(BASE, "QuantizationConfig")]),
        ("SecateurLinearMethod", [(LINEAR, "LinearMethodBase"), (BASE, "QuantizeMethodBase")]),
    ],
)
def test_signatures_are_those_that_vllm_calls(plugin: Any, name: str, recorded: Any) -> None:
    found = getattr(plugin, name)
    assert not inspect.isabstract(found)
    bases = [RECORD["modules"][m]["definitions"][c]["methods"] for m, c in recorded]
    own = [n for n, value in vars(found).items() if not n.startswith("_") and _callable(value)]
    assert own
    for method in own:
        theirs = next((base[method] for base in bases if method in base), None)
        assert theirs is not None, f"vLLM calls no {method}"
        named = [n for n in theirs if not n.startswith("*") and n not in ("self", "cls")]
        ours = list(inspect.signature(getattr(found, method)).parameters)
        assert [n for n in ours if n != "self"][: len(named)] == named


def _callable(value: object) -> bool:
    return callable(value) or isinstance(value, classmethod | staticmethod)


def test_every_layer_of_vllm_gives_what_create_weights_takes(plugin: Any) -> None:
    takes = set(inspect.signature(plugin.SecateurLinearMethod.create_weights).parameters)
    layers = RECORD["modules"][LINEAR]["definitions"]
    given = {name: set(found.get("create_weights_given", ())) for name, found in layers.items()}
    for name in ("ColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear"):
        assert "weight_loader" in given[name] and given[name] <= takes


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_the_parts_of_all_processes_are_the_layer(plugin: Any, format: str, size: int) -> None:
    """Loaded by vLLM's rules: rows, siblings, replicated keys and values, columns."""
    weights = {n: packed(format, rows, i) for i, (n, rows) in enumerate(SIZES.items())}
    config = config_of(plugin, weights)
    dense = {name: weight.dense() for name, weight in weights.items()}
    pair = [stored(weights[n]) for n in FUSED["gate_up"]]
    three = [stored(weights[n]) for n in FUSED["qkv_proj"]]
    down, replicas = stored(weights["down"]), max(1, size // KV_HEADS)
    for rank in range(size):
        process = Process(rank, size)
        _, layer = loaded(config, "down", process.columns, down)
        assert torch.equal(_weight(layer), dense["down"].chunk(size)[rank])
        _, layer = loaded(config, "gate_up", process.merged, pair)
        parts = [dense[n].chunk(size)[rank] for n in FUSED["gate_up"]]
        assert torch.equal(_weight(layer), torch.cat(parts))
        _, layer = loaded(config, "qkv_proj", process.qkv, three, KV_HEADS)
        parts = [dense["q"].chunk(size)[rank]]
        parts += [dense[n].chunk(size // replicas)[rank // replicas] for n in "kv"]
        assert torch.equal(_weight(layer), torch.cat(parts))
        _, layer = loaded(config, "down", process.rows, down)
        assert torch.equal(_weight(layer), dense["down"].chunk(size, 1)[rank])


def _weight(layer: Any) -> Tensor:
    return layer.packed.weight.as_subclass(Tensor)  # type: ignore[no-any-return]


def test_apply_multiplies_and_adds_the_bias_once(plugin: Any) -> None:
    weight = packed("semi24", 64)
    config = config_of(plugin, {"down": weight})
    x, bias = torch.randn(2, 3, COLUMNS).bfloat16(), torch.randn(64).bfloat16()
    whole = SparseLinear(weight)(x)
    method, layer = loaded(config, "down", Process(0, 1).rows, stored(weight))
    assert torch.equal(method.apply(layer, x), whole)
    assert torch.equal(method.apply(layer, x, bias), whole + bias)
    halves = [loaded(config, "down", Process(r, 2).rows, stored(weight)) for r in range(2)]
    parts = [m.apply(y, part) for (m, y), part in zip(halves, x.chunk(2, -1), strict=True)]
    torch.testing.assert_close(sum(parts), whole, rtol=0.02, atol=0.3)


def test_what_is_not_packed_is_vllm_s(plugin: Any) -> None:

    config = config_of(plugin, {"q": packed("semi24", 16)})
    dense = sys.modules[LINEAR].UnquantizedLinearMethod
    assert type(config.get_quant_method(linear(), "m.down")) is dense
    assert config.get_quant_method(nn.Embedding(2, 2), "m.embed") is None
    assert (config.get_name(), config.get_config_filenames()) == ("secateur", [])
    assert torch.bfloat16 in config.get_supported_act_dtypes()
    assert config.get_min_capability() == 80


def test_names_are_those_of_vllm(plugin: Any) -> None:
    config = config_of(plugin, {"down": packed("semi24", 16)})
    assert (
        "apply_dict"
        in RECORD["modules"]["vllm.model_executor.models.utils"]["definitions"]["WeightsMapper"][
            "methods"
        ]
    )
    renaming = SimpleNamespace(apply_dict=lambda d: {f"language.{n}": x for n, x in d.items()})
    config.apply_vllm_mapper(renaming)
    assert isinstance(
        config.get_quant_method(linear(), "language.m.down"), plugin.SecateurLinearMethod
    )


def test_siblings_that_are_not_packed_alike_are_refused(plugin: Any) -> None:
    one = packed("semi24", 16)
    for others, said in [
        ({}, "'m.up' and 'm.gate'"),
        ({"up": packed("semi24_int8", 16)}, "'m.gate' and 'm.up'"),
    ]:
        config = config_of(plugin, {"gate": one, **others})
        with pytest.raises(ValueError, match=f"vLLM runs {said} as one layer, and they are n"):
            config.get_quant_method(linear(), "m.gate_up")


def test_what_vllm_cannot_run_packed_is_refused(plugin: Any) -> None:
    config = config_of(plugin, {"head": packed("semi24", 16), "experts.0.up": packed("semi24", 16)})
    for layer, prefix, name in [
        (nn.Embedding(2, 2), "m.head", "m.head"),
        (nn.Module(), "m.experts", "m.experts.0.up"),
    ]:
        with pytest.raises(ValueError, match=f"layer '{name}' is packed, and vLLM runs it as a"):
            config.get_quant_method(layer, prefix)


def test_a_cut_within_a_group_is_refused(plugin: Any) -> None:
    for format, columns, size, tensor in [
        ("semi24_int4", 384, 2, "scales"),
        ("semi24_int4", 240, 2, "scales"),  # as many groups as two parts have, and others
        ("semi24_int4", 248, 2, "metadata"),
        ("semi24", 24, 2, "metadata"),
    ]:
        weight = packed(format, 16, columns=columns)
        config = config_of(plugin, {"down": weight})
        with pytest.raises(ValueError, match=f"no whole groups of its {tensor}: give vLLM a small"):
            loaded(config, "down", Process(1, size).rows, stored(weight))
        loaded(config, "down", Process(0, 1).rows, stored(weight))


@pytest.mark.parametrize("format", ["bitmap", "csr", "block:64x64"])
def test_formats_without_rows_are_refused(plugin: Any, format: str) -> None:
    weight = torch.zeros(128, 128).bfloat16()
    weight[:64, :64] = 1
    whole = parse_format(format).pack(weight)
    config = config_of(plugin, {"down": whole})
    with pytest.raises(ValueError, match=f"'m.down' is packed in {format}, which vLLM's loaders"):
        loaded(config, "down", Process(0, 1).columns, stored(whole))


def test_damage_is_noticed(plugin: Any) -> None:
    weight = packed("semi24", 16)
    config = config_of(plugin, {"down": weight})

    def lacking(method: Any, layer: nn.Module) -> None:
        Process(0, 1).rows(method, layer, stored(weight))
        layer.metadata.data.zero_()  # type: ignore[union-attr, operator]

    with pytest.raises(ValueError, match="packed layer 'm.down': metadata of row 0"):
        loaded(config, "down", lacking)
    method = config.get_quant_method(linear(), "m.down")
    for columns, dtype, said in [
        (256, torch.bfloat16, "'m.down' of 512 columns, vLLM has one of 256"),
        (512, torch.float16, "in bfloat16, vLLM runs the model in float16: give vLLM --dtype bfl"),
    ]:
        with pytest.raises(ValueError, match=said):
            method.create_weights(linear(), columns, [16], columns, 16, dtype, weight_loader=None)
    good = packed_config({"m.down": describe(SparseLinear(weight))}, "model.secateur.safetensors")
    for change, said in [
        ({"version": 2}, "version 2 of secateur's packed form"),
        ({"weights": None}, "this one is by save_pretrained"),
        ({"packed": {"m.down": {}}}, "packed layer 'm.down': .* needs the keys"),
        ({"packed": []}, "a description of each packed layer"),
    ]:
        with pytest.raises(ValueError, match=said):
            plugin.SecateurConfig.from_config(good | change)
