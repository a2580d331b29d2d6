"""Reconstruction of a folder part by part, against `reconstruct_` on the model loaded whole."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner

import secateur as sc
import secateur.files.stream
from secateur.cli import app
from secateur.criteria import snip
from secateur.files.sidecar import read_sidecar
from secateur.files.stream import reconstruct_folder
from secateur.integrations.tokens import end_of_text, stored_rows
from secateur.integrations.transformers import load_folder
from secateur.reconstruct import Solution
from tests.integrations.test_transformers import change_config, make_folder

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2}


def make_source(folder: Path, kind: str = "llama") -> Path:
    """A tiny causal language model with random weights."""
    torch.manual_seed(0)
    if kind == "llama":  # its head is tied to its embedding
        return make_folder(folder, "llama")
    if kind == "gpt2":
        ends = {"bos_token_id": 2, "eos_token_id": 2}
        config = transformers.GPT2Config(**SIZES, **ends, num_hidden_layers=2, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    elif kind in ("mixtral", "gpt_oss"):  # a file has experts one by one, or as the model has them
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 8}
        sizes = {**SIZES, **experts, "num_hidden_layers": 2, "num_key_value_heads": 1}
        if kind == "mixtral":
            model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
        else:
            ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            config = transformers.GptOssConfig(**sizes, **ends, head_dim=8, rope_scaling=None)
            model = transformers.GptOssForCausalLM(config)
    else:  # layers of two kinds of attention, a head of its own, several files, 16 bits
        config = transformers.Gemma2Config(
            **SIZES,
            intermediate_size=24,
            num_hidden_layers=3,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=4,
            tie_word_embeddings=False,
        )
        model = transformers.Gemma2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="8KB" if kind == "gemma2" else "5GB")
    return folder


def batches(padded: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    ids = [
        torch.randint(16, (rows, 12), generator=generator) for rows in (4, 4, 4 if padded else 3)
    ]
    if not padded:
        return list(ids)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = mask[2, 3:] = 0
    return [{"input_ids": x, "attention_mask": mask[: len(x)]} for x in ids]


def whole(source: Path, algorithm: Any, given: list[Any]) -> tuple[nn.Module, Any]:
    model = load_folder(source)
    if algorithm in (sc.magnitude, sc.wanda):
        return model, sc.prune_(model, planned(source), algorithm, given)
    return model, sc.reconstruct_(model, planned(source), algorithm, given)


def planned(source: Path) -> sc.Plan:
    """Everything in the blocks, even what is no Linear."""
    model = load_folder(source)
    blocks = "transformer.h.*" if hasattr(model, "transformer") else "model.layers.*"
    return sc.plan(model, {blocks: "2:4"})


def assert_same(model: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("kind", "algorithm", "padded"),
    [
        ("llama", sc.sparsegpt, False),
        ("llama", sc.blockwise(sc.refit(sc.wanda), epochs=1), True),
        ("gpt2", sc.refit(sc.wanda), False),
        ("gemma2", sc.sparsegpt, True),
        ("mixtral", sc.sparsegpt, False),
        ("mixtral", sc.swap(sc.wanda), True),
        ("gpt_oss", sc.refit(sc.wanda), False),
        ("llama", sc.wanda, True),
        ("llama", sc.magnitude, False),
        ("mixtral", sc.wanda, False),
        ("mixtral", sc.blockwise(sc.sparsegpt, epochs=1), True),
        ("gpt_oss", sc.blockwise(sc.sparsegpt, epochs=1), False),
    ],
)
def test_it_gives_exactly_what_reconstruct_gives(
    kind: str, algorithm: Any, padded: bool, tmp_path: Path
) -> None:
    source, target = make_source(tmp_path / "source", kind), tmp_path / "new" / "target"
    plan = planned(source)
    report = reconstruct_folder(source, target, plan, algorithm, batches(padded))
    expected, of_expected = whole(source, algorithm, batches(padded))
    assert (report.method, report.layers) == (of_expected.method, of_expected.layers)
    assert_same(expected, load_folder(target))
    loaded = sc.load(target)
    assert_same(expected, loaded)
    assert_same(expected, sc.load(target, load_folder(source)))
    assert loaded.dtype == expected.dtype
    assert loaded.config.to_dict() | {"_name_or_path": ""} == load_folder(
        source
    ).config.to_dict() | {"_name_or_path": ""}
    sidecar = read_sidecar(target)
    assert sidecar.plan == plan
    assert sidecar.reports[0]["layers"] == [vars(row) for row in report.layers]
    sc.save(expected, tmp_path / "saved")
    saved = read_sidecar(tmp_path / "saved")
    assert sidecar.sparsity == saved.sparsity
    assert {frozenset(pair) for pair in sidecar.tied.items()} == {
        frozenset(pair) for pair in saved.tied.items()
    }


@pytest.mark.parametrize("algorithm", [sc.sparsegpt, sc.blockwise(sc.refit(sc.wanda), epochs=1)])
def test_a_folder_with_torch_s_attention_in_and_beside_its_blocks(
    algorithm: Any, tmp_path: Path
) -> None:
    """BridgeTower's images, whose embeddings have tensors beside a module of their own, too."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2}
    text = transformers.BridgeTowerTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, max_position_embeddings=20, **sizes
    )
    vision = transformers.BridgeTowerVisionConfig(
        hidden_size=64, num_hidden_layers=3, image_size=32, patch_size=16
    )
    config = transformers.BridgeTowerConfig(
        text_config=text, vision_config=vision, hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    source, target = tmp_path / "source", tmp_path / "target"
    transformers.BridgeTowerModel(config).save_pretrained(source)
    generator = torch.Generator().manual_seed(1)
    given = [
        {
            "input_ids": torch.randint(2, 32, (2, 6), generator=generator),
            "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        }
        for _ in range(3)
    ]
    model = load_folder(source)
    plan = sc.plan(model, {"vision_model.visual.transformer.resblocks.*": "2:4"})
    assert sum("in_proj_weight" in name for name in plan.layers) == 3 * 3
    report = reconstruct_folder(source, target, plan, algorithm, given)
    assert report.layers == sc.reconstruct_(model, plan, algorithm, given).layers
    assert_same(model, load_folder(target))
    assert sc.check(load_folder(target), plan) == dict.fromkeys(plan.layers, 0.5)


def test_zeros_of_the_source_are_kept_or_warned_of(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "gpt2")
    thin = load_folder(source)
    sc.prune_(thin, "unstructured:0.6", sc.criteria.random)
    thin.save_pretrained(source)
    plan = sc.plan(thin, "2:4")
    expected = load_folder(source)
    sc.reconstruct_(expected, plan, sc.sparsegpt, batches(), keep_zeros=True)
    reconstruct_folder(source, tmp_path / "out", plan, sc.sparsegpt, batches(), keep_zeros=True)
    assert_same(expected, load_folder(tmp_path / "out"))
    for name in plan.layers:
        assert not expected.get_submodule(name).weight[thin.get_submodule(name).weight == 0].any()
    with pytest.warns(UserWarning, match="8 of 8 layers have zeros .* keep_zeros=True"):
        reconstruct_folder(source, tmp_path / "lost", plan, sc.sparsegpt, batches())


def test_one_part_at_a_time_holds_weights(tmp_path: Path) -> None:
    """Counted whenever a module is called: never more than the largest block or embedding."""
    source = make_source(tmp_path / "source")
    model = load_folder(source)
    largest = max(
        sum(p.numel() for p in part.parameters())
        for part in [*model.model.layers, model.model.embed_tokens]
    )
    root: list[nn.Module] = []
    counts: list[int] = []

    def count(module: nn.Module, args: Any) -> None:
        if type(module) is type(model):
            root[:] = [module]
        counts.append(sum(p.numel() for p in root[0].parameters() if not p.is_meta))

    handle = register_module_forward_pre_hook(count)
    try:
        reconstruct_folder(source, tmp_path / "target", "2:4", sc.sparsegpt, batches())
    finally:
        handle.remove()
    assert max(counts) == largest < sum(p.numel() for p in model.parameters()) / 2
    assert all(p.is_meta for p in root[0].parameters())


# --- stopped and called again --------------------------------------------------------------------


def stopping(after: int, stop: Callable[[], Any]) -> tuple[Any, list[int]]:
    """SparseGPT that stops after so many layers; and how many it has solved."""
    solved: list[int] = []

    def algorithm(weight: Tensor, gram: Tensor, pattern: Any) -> Solution:
        if len(solved) == after:
            stop()
        solved.append(1)
        return sc.sparsegpt(weight, gram, pattern)

    return algorithm, solved


def killed(source: str, target: str) -> None:
    """Runs in another process, which ends without a word in the middle of the second block."""
    import os

    algorithm, _ = stopping(10, lambda: os._exit(9))
    reconstruct_folder(source, target, "2:4", algorithm, batches())


def test_after_a_kill_the_same_call_goes_on(tmp_path: Path) -> None:
    """Llama has 7 layers a block: q, k, v are one stage of three, gate and up of two."""
    source, target = make_source(tmp_path / "source"), tmp_path / "target"
    code = "import sys; from tests.files.test_stream import killed; killed(*sys.argv[1:])"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(source), str(target)]
    assert subprocess.run(command, cwd=root, capture_output=True).returncode == 9
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_folder(target)
    algorithm, solved = stopping(99, lambda: None)
    report = reconstruct_folder(source, target, "2:4", algorithm, batches())
    assert len(solved) == 14 - 10
    expected, of_expected = whole(source, algorithm, batches())
    assert report.layers == of_expected.layers
    assert_same(expected, sc.load(target))
    assert not [p for p in target.iterdir() if "layers" in p.name or "progress" in p.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_experts_go_on_where_they_stopped_and_are_stored_as_they_were(tmp_path: Path) -> None:
    source, target = make_source(tmp_path / "source", "mixtral"), tmp_path / "target"

    def stop() -> None:
        raise KeyboardInterrupt

    algorithm, solved = stopping(9, stop)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_folder(source, target, planned(source), algorithm, batches())
    algorithm, solved = stopping(99, stop)
    report = reconstruct_folder(source, target, planned(source), algorithm, batches())
    assert 0 < len(solved) < len(report.layers) == 2 * (4 + 2 * 3)
    assert_same(whole(source, sc.sparsegpt, batches())[0], load_folder(target))
    stored = {
        folder: {
            n: t.shape for path in folder.glob("*.safetensors") for n, t in load_file(path).items()
        }
        for folder in (source, target)
    }
    assert stored[source] == stored[target]
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in stored[target]
    sidecar = read_sidecar(target)
    assert sidecar.sparsity["model.layers.1.mlp.experts.gate_up_proj.2"] == 0.5


def test_an_expert_that_a_folder_lacks_is_told(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "mixtral")
    tensors = load_file(source / "model.safetensors")
    missing = {n: t for n, t in tensors.items() if ".1.block_sparse_moe.experts.2." not in n}
    save_file(missing, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"makes model.layers.1.mlp.experts.\S+ \(2, .*: complete"):
        reconstruct_folder(source, tmp_path / "target", "2:4", sc.sparsegpt, batches())
    assert not (tmp_path / "target").exists()


def test_what_stops_while_the_result_is_written_loses_no_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "target"
    algorithm, solved = stopping(99, lambda: None)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(secateur.files.stream, "save_file", full)
        reconstruct_folder(source, target, "2:4", algorithm, batches())
    solved.clear()
    handle = register_module_forward_pre_hook(lambda module, args: solved.append(1))
    try:
        reconstruct_folder(source, target, "2:4", algorithm, batches())
    finally:
        handle.remove()
    assert not solved, "neither a layer is solved nor a block run"
    assert_same(whole(source, sc.sparsegpt, batches())[0], sc.load(target))


def test_files_that_were_put_beside_finished_layers_stay(tmp_path: Path) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "target"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct_folder(source, target, "2:4", stopping(4, stop)[0], batches())
    for name in ("notes.txt", "config.json"):
        (target / name).write_text("mine")
    algorithm, solved = stopping(100, stop)
    with pytest.raises(ValueError, match="config.json would be replaced by the model's: move it"):
        reconstruct_folder(source, target, "2:4", algorithm, batches())
    assert (target / "config.json").read_text() == "mine"
    (target / "config.json").unlink()
    solved.clear()
    reconstruct_folder(source, target, "2:4", algorithm, batches())
    assert not solved and (target / "notes.txt").read_text() == "mine"
    assert not list(target.glob("layers-*")) and not (target / "progress.json").exists()
    assert_same(whole(source, sc.sparsegpt, batches())[0], sc.load(target))


def test_another_run_does_not_go_on_in_its_folder(tmp_path: Path) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "target"

    def stop() -> None:
        raise KeyboardInterrupt

    algorithm, _ = stopping(4, stop)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_folder(source, target, "2:4", algorithm, batches())
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(ValueError, match="belongs to another run, its plan differs"):
        reconstruct_folder(source, target, "1:4", algorithm, batches())
    with pytest.raises(ValueError, match="belongs to another run, its method differs"):
        reconstruct_folder(source, target, "2:4", sc.sparsegpt, batches())
    with pytest.raises(ValueError, match="belongs to another run, its batches differs"):
        reconstruct_folder(source, target, "2:4", algorithm, batches()[:2])
    with pytest.raises(ValueError, match="belongs to another run, its source differs"):
        other = make_source(tmp_path / "other")
        reconstruct_folder(other, target, "2:4", algorithm, batches())
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before


# --- errors before anything is written -----------------------------------------------------------


def tensors(source: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    found = load_file(source / "model.safetensors")
    change(found)
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"

SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        lambda s: tensors(s, lambda t: t.pop(UP)),
        f"lacks 1 tensors of LlamaForCausalLM, first '{UP}'",
    ),
    "other shape": (
        lambda s: tensors(s, lambda t: t.update({UP: torch.zeros(24, 12)})),
        rf"has {UP} as \(24, 12\) of torch.float32, its config.json makes it \(24, 16\)",
    ),
    "other dtype": (
        lambda s: tensors(s, lambda t: t.update({UP: t[UP].half()})),
        rf"has {UP} as \(24, 16\) of torch.float16",
    ),
    "no file": (lambda s: (s / "model.safetensors").unlink(), "has no model.safetensors"),
    "no safetensors": (
        lambda s: (s / "model.safetensors").write_bytes(b"none"),
        "model.safetensors is no safetensors file",
    ),
    "unknown class": (
        lambda s: change_config(s, architectures=["OursForCausalLM"]),
        "OursForCausalLM', which is no model of transformers",
    ),
    "quantized": (lambda s: change_config(s, quantization_config={"bits": 4}), "needs a dense"),
    "no dtype": (lambda s: change_config(s, dtype=None), 'needs a "dtype"'),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_source_that_will_not_do_is_refused_before_anything_is_written(
    spoiled: str, tmp_path: Path
) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "target"
    spoil, message = SPOILED[spoiled]
    spoil(source)
    with pytest.raises(ValueError, match=message):
        reconstruct_folder(source, target, "2:4", sc.sparsegpt, batches())
    assert not target.exists()


def head(source: Path) -> sc.Plan:
    return sc.plan(load_folder(source), {"lm_head": "2:4"})


@pytest.mark.parametrize(
    ("plan", "algorithm", "given", "message"),
    [
        ("2:5", sc.sparsegpt, batches(), "14 of 14 layers cannot have their pattern"),
        (head, sc.sparsegpt, batches(), "takes layers inside the blocks, lm_head is outside"),
        ("2:4", sc.refit(snip), batches(), "asks for the gradient of the whole model"),
        ("2:4", sc.thorough, batches(), "trains the whole model at the end"),
        ("2:4", snip, batches(), "load the model whole and call prune_"),
        ("2:4", sc.sparsegpt, [], "needs at least one batch"),
    ],
    ids=["pattern", "head", "gradients", "whole model", "criterion", "no batches"],
)
def test_a_choice_that_will_not_do_is_refused_before_anything_is_written(
    plan: Any, algorithm: Any, given: list[Any], message: str, tmp_path: Path
) -> None:
    source, target = make_source(tmp_path / "source", "llama"), tmp_path / "target"
    if callable(plan):
        source = make_source(tmp_path / "gemma2", "gemma2")
        plan = plan(source)
    with pytest.raises(ValueError, match=message):
        reconstruct_folder(source, target, plan, algorithm, given)
    assert not target.exists()


def test_a_target_of_something_else_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    sc.save(load_folder(source), tmp_path / "saved")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, message in [
        ("saved", "holds a saved model: choose another folder"),
        ("other", "needs an empty folder or its own"),
        ("file", "is a file"),
        ("source", "needs an empty folder or its own"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=message):
            reconstruct_folder(source, tmp_path / name, "2:4", sc.sparsegpt, batches())
        assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_finite_are_told_by_their_layer(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    tensors(source, lambda t: t[UP].view(-1)[:2].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight holds 2 NaN"):
        reconstruct_folder(source, tmp_path / "target", "2:4", sc.sparsegpt, batches())
    assert not (tmp_path / "target").exists()


def test_the_index_names_every_tensor_once(tmp_path: Path) -> None:
    source, target = make_source(tmp_path / "source", "gemma2"), tmp_path / "target"
    reconstruct_folder(source, target, "2:4", sc.sparsegpt, batches())
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found = {name: p.name for p in target.glob("*.safetensors") for name in load_file(p)}
    assert index["weight_map"] == found
    sizes = [t.nbytes for p in target.glob("*.safetensors") for t in load_file(p).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_the_command_writes_the_same(tmp_path: Path) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "target"
    save_file({"ids": torch.cat(batches()[:2])}, tmp_path / "ids.safetensors")
    command = [
        *("stream", source, "-o", target, "-p", "2:4", "-m", "refit(wanda)", "--device", "cpu"),
        *("--tokens", f"{tmp_path / 'ids.safetensors'}:ids", "--rows", 8, "--batch", 4, "--json"),
    ]
    done = CliRunner().invoke(app, [str(argument) for argument in command])
    assert done.exit_code == 0, done.output
    # The command deals the rows in an order of its own, and the order decides the sums' last bits.
    dealt = stored_rows(f"{tmp_path / 'ids.safetensors'}:ids", 8, 4, end_of_text(source)).batches
    expected, report = whole(source, sc.refit(sc.wanda), dealt)
    assert_same(expected, sc.load(target))
    assert json.loads(done.stdout)["layers"] == [vars(row) for row in report.layers]
    again = CliRunner().invoke(app, [str(argument) for argument in command])
    assert again.exit_code == 2 and "holds a saved model: choose another folder" in again.stderr


def test_the_command_says_the_share_of_zeros_and_takes_criteria(tmp_path: Path) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "target"
    save_file({"ids": torch.cat(batches()[:2])}, tmp_path / "ids.safetensors")
    command = ["stream", str(source), "-o", str(target), "-p", "2:4", "--device", "cpu"]
    command += ["--tokens", f"{tmp_path / 'ids.safetensors'}:ids", "--rows", "8", "--batch", "4"]
    refused = CliRunner().invoke(app, [*command, "-m", "snip"])
    assert refused.exit_code == 2 and not target.exists()
    assert "take another method, or use `secateur prune`, which loads it whole" in refused.stderr
    done = CliRunner().invoke(app, [*command, "-m", "wanda"])
    assert done.exit_code == 0, done.output
    stored = [t for path in target.glob("*.safetensors") for t in load_file(path).values()]
    zeros, numbers = sum(int((t == 0).sum()) for t in stored), sum(t.numel() for t in stored)
    assert f"their zeros are {zeros / numbers:.1%} of all {numbers:,} parameters; written to" in (
        done.stdout
    )
