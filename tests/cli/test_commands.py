"""The command line on tiny models: what it writes, what it prints, and how it refuses."""

import errno
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur as sc
from secateur import criteria, reconstruct
from secateur.allocation import read_sensitivity
from secateur.cli import app
from secateur.cli.console import table
from secateur.cli.methods import algorithms_by_name, find_method
from secateur.files.save import load
from secateur.files.sidecar import read_sidecar
from secateur.integrations.tokens import sampled_rows, text_batches, token_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from secateur.model.statistics import name_of
from secateur.report import write_html

WIDTH, ROWS, LENGTH = 32, 8, 24
WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block Llama in bfloat16 with tied embeddings, a tokenizer and token rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    draw = partial(torch.randint, 3, 93, (ROWS, LENGTH), dtype=torch.int16)
    save_file({"calibration": draw(), "validation": draw()}, folder / "tokens.safetensors")
    (folder / "text.txt").write_text(" ".join(WORDS * 4))
    return folder


@pytest.fixture(scope="module")
def pruned(dense: Path) -> Path:
    """The model pruned to 2:4 by the command line."""
    folder = dense.with_name("pruned")
    said(run("prune", dense, "-o", folder, "-p", "2:4"))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer BertModel without a head."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "encoder"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokens = torch.randint(3, 93, (ROWS, LENGTH), dtype=torch.int16)
    save_file({"rows": tokens}, folder / "tokens.safetensors")
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result: Any, code: int = 0) -> str:
    """What a command printed on stdout, once it has ended as expected."""
    assert result.exit_code == code, result.output
    text: str = result.stdout
    return text


def refused(result: Any, code: int = 2) -> str:
    """The one line that an error is."""
    said(result, code)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return str(lines[0])


def tokens(folder: Path, key: str) -> str:
    return f"{folder / 'tokens.safetensors'}:{key}"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: nn.Module, folder: Path) -> bool:
    """Whether the model, rounded as files are, has the folder's weights."""
    saved = load_folder(folder).state_dict()
    return all(torch.equal(t.to(saved[n].dtype), saved[n]) for n, t in one.state_dict().items())


# --- help ----------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom secateur.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'transformers', 'tokenizers', 'matplotlib', 'jinja2', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verbs = (
        "doctor inspect sense plan prune stream recover eval bench tune check export migrate "
        "report demo"
    )
    assert all(f" {verb} " in done.stdout for verb in verbs.split())


def test_prune_s_help_lists_every_method() -> None:
    text = " ".join(said(run("prune", "--help")).replace("│", " ").split())
    assert "magnitude, magnitude_l2, random, ria, snip" in text and "sparsegpt" in text
    assert "'best' is 'blockwise(alps)'" in text


def test_version() -> None:
    assert said(run("--version")) == f"secateur {sc.__version__}\n"


@pytest.mark.parametrize("module", [criteria, reconstruct])
def test_every_exported_function_is_a_method(module: Any) -> None:
    functions = [n for n in module.__all__ if not isinstance(vars(module)[n], type)]
    # They take a method, a mask, or a model that is pruned already.
    others = ("refit", "refitted", "swap", "swapped", "blockwise", "compensate", "compensation")
    others += ("estimate", "low_rank_part")  # one takes what the preset does, one gives factors
    functions = [n for n in functions if n not in others]
    assert functions
    for name in functions:
        method = find_method(name)
        assert method.function is vars(module)[name] and method.refits == (module is reconstruct)


def test_options_have_the_type_of_their_default() -> None:
    function = find_method("sparsegpt", ["damping=1"]).function
    assert isinstance(function, partial)
    assert function.keywords == {"damping": 1.0} and type(function.keywords["damping"]) is float


def test_refit_is_a_method_with_the_mask_of_another() -> None:
    method = find_method("refit(wanda)", ["damping=0.1"])
    assert method.refits and sorted(method.needs) == ["gram", "input_norm"]
    assert name_of(method.function) == "refit(wanda, damping=0.1)"
    assert find_method("refit(sparsegpt)").needs == ("gram", "held_gram")
    with pytest.raises(ValueError, match="unknown method 'low_rank_part'"):
        find_method("low_rank_part")
    with pytest.raises(ValueError, match="unknown method 'wand': did you mean 'wanda'"):
        find_method("refit(wand)")
    with pytest.raises(ValueError, match=r"refit\(wanda\) has no option 'grid=1': .* damping=None"):
        find_method("refit(wanda)", ["grid=1"])


def test_swap_is_a_method_that_betters_the_mask_of_another() -> None:
    method = find_method("swap(wanda)")
    assert method.refits and sorted(method.needs) == ["gram", "input_norm"]
    assert name_of(find_method("refit(swap(ria))", ["damping=0.1"]).function) == (
        "refit(swap(ria), damping=0.1)"
    )
    assert "swapped" not in algorithms_by_name() and "sparsegpt" in algorithms_by_name()
    with pytest.raises(ValueError, match=r"swap\(wanda\) has no option 'damping=1': .* none"):
        find_method("swap(wanda)", ["damping=1"])


def test_blockwise_is_a_method_that_trains_after_another() -> None:
    method = find_method("blockwise(refit(wanda))", ["epochs=2"])
    assert method.refits and sorted(method.needs) == ["gram", "held_gram", "input_norm"]
    assert method.function.name == "blockwise(refit(wanda), epochs=2)"
    with pytest.raises(ValueError, match=r"blockwise\(alps\) has no option 'damping=1': .* epochs"):
        find_method("blockwise(alps)", ["damping=1"])


@pytest.mark.parametrize(
    ("name", "function"),
    [("best", sc.blockwise(sc.alps)), ("thorough", sc.blockwise(sc.alps, distil=4))],
)
def test_a_preset_is_a_method_and_has_no_options(name: str, function: Any) -> None:
    method = find_method(name)
    assert method.function == function and method.refits
    assert method.needs == ("gram", "held_gram")
    with pytest.raises(ValueError, match=f"{name} has no option 'epochs=1': .* it has none"):
        find_method(name, ["epochs=1"])


def test_a_preset_s_name_is_guessed() -> None:
    with pytest.raises(ValueError, match="unknown method 'bst': did you mean 'best'"):
        find_method("bst")


def test_what_the_library_gives_is_no_option() -> None:
    assert find_method("alps", ["damping=1"]).function.keywords == {"damping": 1.0}
    with pytest.raises(ValueError, match="alps needs a float for damping, got 'much': it is None"):
        find_method("alps", ["damping=much"])
    with pytest.raises(ValueError, match=r"alps has no option 'once=1': .*, it has damping=None$"):
        find_method("alps", ["once=1"])


def test_a_new_criterion_works_by_being_exported(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def smallest(weight: Tensor) -> Tensor:
        return -weight.abs()

    monkeypatch.setattr(criteria, "__all__", [*criteria.__all__, "smallest"])
    monkeypatch.setattr(criteria, "smallest", smallest, raising=False)
    said(run("prune", dense, "-o", tmp_path / "out", "-p", "2:4", "-m", "smallest"))
    before, after = weights(dense), weights(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    groups = before[name].float().abs().view(-1, 4)
    kept = groups <= groups.kthvalue(2, dim=1, keepdim=True).values
    assert bool((kept.sum(1) >= 2).all())
    assert bool(((after[name].view(-1, 4) != 0) <= kept).all())


# --- prune ---------------------------------------------------------------------------------------


def test_prune_writes_the_two_largest_of_four_and_leaves_the_rest(
    dense: Path, pruned: Path
) -> None:
    before, after = weights(dense), weights(pruned)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype == torch.bfloat16
        if "proj" not in name:
            assert torch.equal(after[name], weight)
            continue
        old, new = weight.float().view(-1, 4), after[name].float().view(-1, 4)
        assert bool(((new != 0).sum(1) == 2).all())
        assert torch.equal(new[new != 0], old[new != 0])
        dropped = torch.where(new == 0, old.abs(), 0).amax(1)
        kept = torch.where(new != 0, old.abs(), math.inf).amin(1)
        assert bool((dropped <= kept).all())
    assert (pruned / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    saved = read_sidecar(pruned)
    assert saved.plan is not None and len(saved.plan.layers) == 14
    assert saved.reports[0]["method"] == "magnitude"


def test_the_summary_says_what_was_done_and_what_was_not_measured(
    dense: Path, tmp_path: Path
) -> None:
    text = said(run("prune", dense, "-o", tmp_path / "out", "-p", "2:4"))
    assert "pattern 2:4 / method magnitude / 14 of 15 layers" in text
    assert "left alone: lm_head: its weight is tied to model.embed_tokens" in text
    lines = {line[:13].strip(): line[13:].split() for line in text.splitlines()}
    assert lines["zeros in plan"] == "0.0% 50.0% every group of 4 checked".split()
    model = load_folder(tmp_path / "out")  # tied embeddings, counted once
    everything = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert lines["zeros of all"][:3] == ["0.0%", f"{zeros / everything:.1%}", f"{everything:,}"]
    size = f"{(dense / 'model.safetensors').stat().st_size / 1000:.1f}"
    assert lines["file size"][:4] == [size, "kB", size, "kB"]
    assert lines["speed"][:4] == ["-", "-", "not", "measured:"]
    assert "perplexity" not in text


def test_prune_by_wanda_is_the_library_s_on_the_same_tokens(dense: Path, tmp_path: Path) -> None:
    said(
        run(
            "prune", dense, "-o", tmp_path / "out", "-p", "4:8", "-m", "wanda", "--tokens",
            tokens(dense, "calibration"), "--rows", 4, "--length", 10, "--batch", 2,
        )
    )  # fmt: skip
    model = load_folder(dense).float()
    rows = token_rows(tokens(dense, "calibration"), 4, 2)
    sc.prune_(model, sc.plan(model, "4:8"), sc.wanda, [ids[:, :10] for ids in rows])
    assert same(model, tmp_path / "out")
    full = load_folder(dense).float()
    sc.prune_(full, sc.plan(full, "4:8"), sc.wanda, rows)
    assert not same(full, tmp_path / "out")


def test_prune_calibrates_on_rows_that_the_dense_model_writes(dense: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tokens(dense, "calibration")
    said(
        run(
            "prune", dense, "-o", out, "-p", "2:4", "-m", "wanda", "--tokens", data, "--rows", ROWS,
            "--batch", 4, "--sample", 6, "--dtype", "float32",
        )
    )  # fmt: skip
    model = load_folder(dense, torch.float32)
    batches = token_rows(data, ROWS, 4)
    written = sampled_rows(model, batches, 6)
    assert [len(batch) for batch in written] == [4, 2]
    sc.prune_(model, "2:4", sc.wanda, [*batches, *written])
    assert same(model, out)
    refused_without = run("prune", dense, "-o", tmp_path / "b", "-p", "2:4", "--sample", 6)
    assert "--sample 6 needs a method that calibrates, 'magnitude'" in refused(refused_without)


def test_prune_by_sparsegpt_takes_text_and_options(dense: Path, tmp_path: Path) -> None:
    result = run(
        "prune", dense, "-o", tmp_path / "out", "-p", "unstructured:0.5", "-m", "sparsegpt",
        "--text", dense / "text.txt", "--rows", 4, "--length", 16, "--batch", 4, "--option",
        "damping=0.3",
    )  # fmt: skip
    assert "calibration 4 rows, 64 tokens" in said(result)
    model = load_folder(dense).float()
    algorithm = partial(sc.sparsegpt, damping=0.3)
    with pytest.warns(UserWarning, match="the 4 rows are of 1 document"):
        batches = text_batches(dense, dense / "text.txt", 4, 16, 4)
    sc.reconstruct_(model, sc.plan(model, "unstructured:0.5"), algorithm, batches)
    assert same(model, tmp_path / "out")


def test_prune_measures_before_and_after_what_it_wrote(dense: Path, tmp_path: Path) -> None:
    arguments = (
        "prune", dense, "-p", "2:4", "--eval-tokens", tokens(dense, "validation"), "--eval-rows", 4,
    )  # fmt: skip
    found = json.loads(said(run(*arguments, "-o", tmp_path / "a", "--json")))
    rows = token_rows(tokens(dense, "validation"), 4, 4)
    before, after = load_folder(dense).float(), load_folder(tmp_path / "a").float()
    agreement = evaluate.compare(after, before, rows)
    expected = evaluate.perplexity(before, rows).perplexity
    assert found["before"] == {"perplexity": pytest.approx(expected, rel=1e-5)}
    assert found["after"] == {
        "perplexity": pytest.approx(evaluate.perplexity(after, rows).perplexity, rel=1e-5),
        "KL to dense": pytest.approx(agreement.kl, rel=1e-4),
        "same top-1": pytest.approx(agreement.top1),
    }
    assert found["zeros"] == [0.0, 0.5] and found["speed"] is None
    text = said(run(*arguments, "-o", tmp_path / "b"))
    (line,) = [line for line in text.splitlines() if line.startswith("perplexity")]
    assert line.split()[1] == f"{expected:.3f}"
    assert "(tokens.safetensors:validation, 96 tokens)" in line


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--text", "missing.txt", "missing.txt does not exist: name a text file"),
        ("--tokens", "missing.safetensors:x", "missing.safetensors cannot be read"),
        ("--tokens", "text.txt", "--tokens needs FILE:KEY, 'file.safetensors:key', got 'text.txt'"),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_data_that_no_method_reads_is_checked_all_the_same(
    dense: Path, tmp_path: Path, option: str, value: str, told: str, method: str
) -> None:
    command = ("prune", dense, "-o", tmp_path / "out", "-p", "2:4", "-m", method)
    assert told in refused(run(*command, option, value))
    assert not (tmp_path / "out").exists()
    here = dense / "text.txt" if option == "--text" else tokens(dense, "calibration")
    result = run(*command, option, here)
    assert "no calibration data" in said(result)
    assert (
        result.stderr == f"warning: {option} {here} is not read: method '{method}' needs no data\n"
    )


def test_warnings_of_the_library_are_one_line_in_words_of_the_shell(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(*arguments: object, **options: object) -> None:
        warnings.warn("something is odd: pass overwrite=True\nor not", stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr("secateur.cli.methods.prune_", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("prune", dense, "-o", tmp_path / "out", "-p", "2:4")
    said(result, 2)
    assert result.stderr.splitlines() == [
        "warning: something is odd: give --overwrite or not", "error: enough",
    ]  # fmt: skip


def test_selectors_choose_layers_and_patterns(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    text = said(
        run("plan", dense, "-p", "*.mlp.*=4:8", "-p", "re:q_proj$=block:16x16@0.5", "-o", out)
    )
    layers = yaml.safe_load(out.read_text())["layers"]
    assert {name.split(".")[-1]: entry["pattern"] for name, entry in layers.items()} == {
        "gate_proj": "4:8", "up_proj": "4:8", "down_proj": "4:8", "q_proj": "block:16x16@0.5",
    }  # fmt: skip
    assert "model.layers.0-1.mlp.up_proj" in text
    assert "model.layers.1.mlp.up_proj" in said(run("plan", dense, "-p", "2:4", "--full"))
    summary = said(run("prune", dense, "-o", tmp_path / "out", "--plan", out))
    assert "8 of 15 layers" in summary and "every layer checked" in summary
    assert said(run("check", tmp_path / "out"))


def test_an_interrupted_prune_says_what_is_left(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.cli.methods.prune_", interrupt)
    command = ("prune", dense, "-o", tmp_path / "out", "-p", "2:4")
    result = run(*command)
    said(result, 130)
    assert result.stderr == "\ninterrupted: nothing was changed\n"
    result = run(*command, "--checkpoint", tmp_path / "kept")
    assert result.stderr == "\ninterrupted: nothing was changed\n"
    (tmp_path / "kept").mkdir()
    result = run(*command, "--checkpoint", tmp_path / "kept")
    said(result, 130)
    assert f"what is finished is kept in {tmp_path / 'kept'}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_came_from(dense: Path, tmp_path: Path) -> None:
    result = run("prune", dense, "-o", tmp_path / "out", "-p", "2:3", "--debug")
    assert isinstance(result.exception, ValueError) and "divisible by 3" in str(result.exception)


NO_DATA = "method 'wanda' needs calibration data (input_norm): give --text FILE or --tokens"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-p", "2:4", "-m", "wanda"], NO_DATA),
        (["-p", "2:4", "-m", "wandaa"], "unknown method 'wandaa': did you mean 'wanda'? Methods"),
        ([], "either --pattern or --plan is needed, got neither"),
        (["-p", "2:4", "--plan", "x.yaml"], "either --pattern or --plan is needed, got both"),
        (["--plan", "missing.yaml"], "missing.yaml does not exist"),
        (["-p", "unstructured:50"], "sparsity must be in [0, 1), got 50: did you mean 0.5?"),
        (["-p", "2:3"], "2:3 needs in_features divisible by 3, got 32"),
        (["-p", "2:4", "--layers", "model.layers.0.mlp.up_projj"], "Closest: 'model.layers.0.mlp"),
        (["-p", "2:4", "-p", "*.mlp.*=4:8"], "several patterns need SELECTOR=PATTERN each, got"),
        (["-p", "2:4", "--option", "damping=1"], "magnitude has no option 'damping=1'"),
        (["-p", "2:4", "-m", "sparsegpt", "--option", "damping=x"], "a float for damping, got 'x'"),
        (["-p", "2:4", "--dtype", "int8"], "--dtype needs to be one of auto, stored, float32"),
        (["-p", "2:4", "--device", "nowhere"], "--device nowhere cannot be used here"),
        (["-p", "2:4", "-m", "wanda", "--text", "a", "--tokens", "b:c"], "FILE:KEY, got both"),
        (
            ["-p", "2:4", "-m", "wanda", "--text", "missing.txt"],
            "missing.txt does not exist: name a text file, a .jsonl file or",
        ),
        (["-p", "2:4", "-m", "wanda", "--tokens", "x"], "'file.safetensors:key', got 'x'"),
        (["-p", "2:4", "--eval-text", "a", "--eval-tokens", "b:c"], "--eval-text FILE or --eval"),
    ],
)
def test_what_prune_refuses(
    dense: Path, tmp_path: Path, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(run("prune", dense, "-o", "out", *arguments))
    assert not Path("out").exists()


def test_an_error_that_lists_every_layer_keeps_its_advice(dense: Path, tmp_path: Path) -> None:
    line = refused(run("prune", dense, "-o", tmp_path / "out", "-p", "2:3"))
    assert len(line) < 900 and "dense-remainder" in line and "(--debug shows all)" in line


def test_the_output_is_checked_before_the_work(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as unread:
        unread.setattr(
            "secateur.cli.groups.open_source", lambda *a: pytest.fail("the model was read")
        )
        line = refused(run("prune", dense, "-o", pruned, "-p", "2:4"))
        assert "holds a saved model: choose another folder, or give --overwrite" in line
        (tmp_path / "other.txt").write_text("mine")
        assert "holds other files" in refused(run("prune", dense, "-o", tmp_path, "-p", "2:4"))
    out = tmp_path / "out"
    said(run("prune", dense, "-o", out, "-p", "2:4"))
    said(run("prune", dense, "-o", out, "-p", "1:4", "--overwrite"))
    assert float((weights(out)["model.layers.0.mlp.up_proj.weight"] == 0).float().mean()) == 0.75


def test_what_is_no_model(dense: Path, tmp_path: Path) -> None:
    assert "there is no folder nowhere" in refused(run("inspect", "nowhere"))
    assert "has no config.json" in refused(run("inspect", tmp_path))
    assert "config.json is no model" in refused(run("inspect", dense / "config.json"))
    (tmp_path / "cut.safetensors").write_bytes(b"12345678901")
    line = refused(run("inspect", tmp_path / "cut.safetensors"))
    assert "cut.safetensors is no safetensors file: " in line


# --- the verbs that look -------------------------------------------------------------------------


def test_inspect_shows_zeros_and_why_layers_are_left_alone(dense: Path, pruned: Path) -> None:
    text = said(run("inspect", pruned))
    (line,) = [li for li in text.splitlines() if "model.layers.0-1.mlp.up_proj" in li]
    assert line.split() == "model.layers.0-1.mlp.up_proj 64 32 bfloat16 50.0% 2:4 4:8 64x64".split()
    assert "left alone: lm_head: its weight is tied to model.embed_tokens" in text
    found = json.loads(said(run("inspect", dense, "--json")))
    assert {layer["zeros"] for layer in found["layers"]} == {0.0}
    assert len(found["layers"]) == 16 and set(found["left_alone"]) == {
        "lm_head", "model.embed_tokens",
    }  # fmt: skip


def test_check_ends_with_0_or_1(dense: Path, pruned: Path) -> None:
    assert "all 14 layers hold their pattern" in said(run("check", pruned))
    found = json.loads(said(run("check", pruned, "-p", "4:8", "--json")))
    assert found["ok"] and found["layers"][0] == {
        "layer": "model.layers.0.self_attn.q_proj", "pattern": "4:8", "zeros": "50.00%",
        "verdict": "holds",
    }  # fmt: skip
    result = run("check", pruned, "-p", "1:4")
    assert refused(result, 1) == "error: 14 of 14 layers break the plan"
    assert "512 groups of 4 keeping more than 1" in result.stdout
    found = json.loads(said(run("check", pruned, "-p", "1:4", "--json"), 1))
    assert not found["ok"] and "break the plan" in found["error"]


def test_check_finds_one_lost_zero(dense: Path, pruned: Path, tmp_path: Path) -> None:
    changed = weights(pruned)
    name = "model.layers.1.mlp.down_proj.weight"
    changed[name][3, :4] = 1
    out = tmp_path / "changed"
    out.mkdir()
    for file in pruned.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    save_file(changed, out / "model.safetensors", {"format": "pt"})
    for verb in (
        ("check",),
        ("inspect",),
        ("eval", "--rows", "8", "--tokens", tokens(dense, "validation")),
    ):
        line = refused(run(verb[0], out, *verb[1:]))
        assert "model.safetensors was changed after it was saved, its sha256 differs" in line
    (out / "secateur.json").unlink()  # which vouches for the files; without it the zeros count
    result = run("check", out, "-p", "2:4")
    assert refused(result, 1) == "error: 1 of 14 layers break the plan"
    assert "model.layers.1.mlp.down_proj" in result.stdout and "keeping 4" in result.stdout
    assert "q_proj" not in result.stdout


def test_check_needs_a_plan_for_this_model(dense: Path, pruned: Path, encoder: Path) -> None:
    assert "has no secateur.json with a plan" in refused(run("check", dense))
    plan = pruned.with_name("other.yaml")
    said(run("plan", encoder, "-p", "2:4", "-o", plan))
    assert "made for another model" in refused(run("check", pruned, "--plan", plan))


def test_doctor_lists_every_format() -> None:
    found = json.loads(said(run("doctor", "--json")))
    told = {entry["capability"]: entry["state"] for entry in found}
    assert told["torch"] == "info" and told["semi24 reference"] == "yes"
    assert "csr reference" in said(run("doctor", "--all"))
    lines = said(run("doctor")).splitlines()
    assert len(lines) == 5 and "secateur doctor --all" in lines[-1]
    assert [line.partition(":")[0] for line in lines[:4]] == [
        "this machine", "sparse here", "not here", "to install",
    ]  # fmt: skip


# --- the verbs that measure ----------------------------------------------------------------------


def test_eval_is_the_library_s(dense: Path, pruned: Path) -> None:
    command = ("eval", pruned, "--tokens", tokens(dense, "validation"), "--rows", ROWS)
    found = json.loads(said(run(*command, "--baseline", dense, "--json")))
    rows = token_rows(tokens(dense, "validation"), ROWS, ROWS)
    model, teacher = load_folder(pruned).float(), load_folder(dense).float()
    assert found["tokens"] == ROWS * LENGTH
    assert found["dense"]["perplexity"] == pytest.approx(
        evaluate.perplexity(teacher, rows).perplexity, rel=1e-5
    )
    assert found["pruned"]["KL to dense"] == pytest.approx(
        evaluate.compare(model, teacher, rows).kl, rel=1e-4
    )
    text = said(run(*command))
    perplexity = evaluate.perplexity(model, rows).perplexity
    assert f"pruned {perplexity:.3f}" in " ".join(text.split())
    assert "on 192 tokens of tokens.safetensors:validation" in text


def test_eval_of_an_encoder_needs_a_baseline(encoder: Path, tmp_path: Path) -> None:
    data = ("--tokens", tokens(encoder, "rows"), "--rows", 4)
    said(run("prune", encoder, "-o", tmp_path / "out", "-p", "2:4", "--ignore", "pooler.*"))
    line = refused(run("eval", tmp_path / "out", *data))
    assert "BertModel has no perplexity: compare it by --baseline DENSE" in line
    arguments = ("--eval-tokens", tokens(encoder, "rows"), "--eval-rows", 4, "--ignore", "pooler.*")
    text = said(run("prune", encoder, "-o", tmp_path / "x", "-p", "2:4", *arguments))
    (told,) = [line for line in text.splitlines() if line.startswith("cosine to dense")]
    assert told.split()[3] == "-" and "(tokens.safetensors:rows, 96 tokens)" in told
    found = json.loads(said(run("eval", tmp_path / "out", *data, "--baseline", encoder, "--json")))
    assert f"{found['out']['cosine to dense']:.4f}" == told.split()[4]
    rows = token_rows(tokens(encoder, "rows"), 4, 4)
    expected = evaluate.embedding_cosine(load_folder(tmp_path / "out"), load_folder(encoder), rows)
    assert found["out"]["cosine to dense"] == pytest.approx(expected.mean, rel=1e-5)
    assert 0 < found["out"]["cosine to dense"] < 0.9999


def test_eval_needs_data(pruned: Path) -> None:
    assert "either --text FILE or --tokens FILE:KEY, got neither" in refused(run("eval", pruned))


def test_a_short_text_is_used_as_it_is_and_that_is_said(pruned: Path, tmp_path: Path) -> None:
    """In the words of the command line, on stderr; no error unless there is not one row."""
    text = tmp_path / "text.txt"
    text.write_text("a b c d " * 21)
    result = run("eval", pruned, "--text", text, "--rows", 9, "--length", 16)
    assert "on 80 tokens of text.txt" in said(result)
    short, few = result.stderr.splitlines()
    assert short.startswith("warning: --rows 9: there are only 5 rows of 16 tokens, which are used")
    assert short.endswith("a smaller --length") and few.startswith("warning: the 5 rows are of 1 d")
    (tmp_path / "texts").mkdir()
    for name in "12345678":
        (tmp_path / "texts" / name).write_text("a b c d " * 5)
    result = run("eval", pruned, "--text", tmp_path / "texts", "--rows", 8, "--length", 16)
    assert "on 128 tokens of texts" in said(result) and result.stderr == ""
    text.write_text("a b c")
    line = refused(run("eval", pruned, "--text", text, "--length", 16))
    assert (
        "a row needs 16 tokens, the text has 4: give more text, or give a smaller --length" in line
    )


def test_warnings_name_the_option_that_is_meant(dense: Path, tmp_path: Path) -> None:
    data = ("--eval-tokens", tokens(dense, "validation"), "--eval-rows", ROWS + 1)
    result = run("prune", dense, "-o", tmp_path / "out", "-p", "2:4", *data)
    said(result)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"warning: --eval-rows {ROWS + 1}: there are only {ROWS} rows of")


def test_eval_compares_folders_on_one_text(dense: Path, pruned: Path, tmp_path: Path) -> None:
    other = tmp_path / "pruned"
    said(run("prune", dense, "-o", other, "-p", "unstructured:0.25"))
    data = ("--tokens", tokens(dense, "validation"), "--rows", ROWS, "--baseline", dense, "--json")
    both = json.loads(said(run("eval", pruned, other, *data)))
    assert list(both) == ["tokens", "data", "dense", str(pruned), str(other)]  # of one name
    for folder in (pruned, other):
        alone = json.loads(said(run("eval", folder, *data)))
        assert alone["pruned"] == both[str(folder)] and alone["dense"] == both["dense"]
    assert both[str(other)]["KL to dense"] < both[str(pruned)]["KL to dense"]
    assert "is named twice" in refused(run("eval", pruned, pruned, *data))


def test_folders_of_two_tokenizers_are_not_compared_on_a_text(dense: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"w7"', '"x7"'))
    text = ("--text", dense / "text.txt", "--rows", 1, "--length", 8)
    for verb in ("eval", "report"):
        line = refused(run(verb, dense, other, *text))
        assert f"{file} is another tokenizer than {dense / 'tokenizer.json'}" in line
    assert said(run("eval", dense, other, "--tokens", tokens(dense, "validation"), "--rows", 2))


def test_sense_writes_curves_and_a_page(dense: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "sense.json", tmp_path / "sense.html"
    text = said(
        run(
            "sense", dense, "-p", "2:4", "--pattern", "unstructured:0.9", "--layers", "*.1.mlp.*",
            "--tokens",
            tokens(dense, "validation"), "--rows", 2, "-o", out, "--html", page,
        )
    )  # fmt: skip
    found = read_sensitivity(out)
    assert found.patterns == ("2:4", "unstructured:0.9") and len(found.increase) == 3
    rows = token_rows(tokens(dense, "validation"), 2, 2)
    model = load_folder(dense).float()
    before = evaluate.perplexity(model, rows).nll
    assert found.loss == pytest.approx(before, rel=1e-5)
    name = "model.layers.1.mlp.up_proj"
    sc.prune_(model, sc.plan(model, "unstructured:0.9", layers=[name]))
    increase = evaluate.perplexity(model, rows).nll - before
    assert found.increase[name]["unstructured:0.9"] == pytest.approx(increase, abs=1e-5)
    assert f"{increase:+.4f}" in text
    assert name in page.read_text() and "<svg" in page.read_text()


def test_what_sense_refuses(dense: Path, tmp_path: Path) -> None:
    data = ("--tokens", tokens(dense, "validation"), "--rows", 1)
    line = refused(run("sense", dense, *data, "-m", "sparsegpt"))
    assert "needs a criterion, 'sparsegpt' refits the kept weights" in line
    assert "unknown pattern 'foo'" in refused(run("sense", dense, *data, "-p", "2:4", "-p", "foo"))
    line = refused(run("sense", dense, *data, "-o", tmp_path / "no" / "sense.json"))
    assert "name a file in a folder that exists" in line


@pytest.mark.parametrize("others", [5, 7, 11])
def test_a_narrow_terminal_keeps_the_names_of_rows(
    others: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Console(width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("secateur.cli.console.console", lambda: shown)
    name = "model.language_model.layers.0.self_attn.q_proj and 3 more"
    table(("what", *"abcdefghijk"[:others]), [(name, *["12345678 us"] * others)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["what", "a"] for line in lines)
    assert any(line.strip().startswith("model") for line in lines)


def test_bench_says_what_runs_and_why(pruned: Path) -> None:
    command = (
        "bench",
        pruned,
        "--tokens-per-call",
        "4,1",
        "--layers",
        "model.layers.0.mlp.up_proj",
    )
    found = json.loads(said(run(*command, "--json")))
    assert found["tokens"] == [1, 4]
    (layer,) = found["layers"]
    assert layer["layer"] == "model.layers.0.mlp.up_proj" and layer["shape"] == [64, 32]
    text = said(run(*command))
    assert "measured on cpu" in text and layer["reason"].split(":")[0][:20] in text
    assert "what would be faster here" in text or "would not be faster here either" in text
    (heads,) = [line for line in text.splitlines() if line.strip().startswith("layer ")]
    assert heads.split() == "layer tokens runs eager us prepacked us sparse us".split()
    assert "vs prepacked" in said(run(*command, "--full"))
    line = refused(run("bench", pruned, "--tokens-per-call", "1,x"))
    assert "needs numbers of at least 1 separated by commas, got '1,x'" in line


# --- the verbs that write again ------------------------------------------------------------------


def test_export_packs_and_unpacks_exactly(pruned: Path, tmp_path: Path) -> None:
    packed, again = tmp_path / "packed", tmp_path / "again"
    text = said(run("export", pruned, "--to", "packed", "-o", packed))
    assert f"packed form written to {packed}" in text
    assert {entry["format"] for entry in read_sidecar(packed).packed.values()} == {"semi24"}
    assert len(read_sidecar(packed).packed) == 14
    small, large = packed / "model.secateur.safetensors", pruned / "model.safetensors"
    assert small.stat().st_size < large.stat().st_size
    assert said(run("check", packed))
    said(run("export", packed, "--to", "dense", "-o", again))
    before, after = weights(pruned), weights(again)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    saved = read_sidecar(again)
    assert saved.plan == read_sidecar(pruned).plan
    assert [dict(r) for r in saved.reports] == [dict(r) for r in read_sidecar(pruned).reports]
    line = refused(run("prune", packed, "-o", tmp_path / "x", "-p", "2:4"))
    assert "is in packed form, whose weights are frozen" in line


def test_export_says_where_packed_is_slower(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = said(run("export", pruned, "--to", "packed", "-o", tmp_path / "a"))
    assert (
        "slower than dense on this machine: 14 of 14 layers, for nothing here multiplies semi24"
        in text
    )
    assert "bench" not in text
    said(
        run("prune", dense, "-o", tmp_path / "x", "-p", "*.up_proj=block:16x16@0.5", "-p", "*=2:4")
    )
    text = said(run("export", tmp_path / "x", "--to", "packed", "-o", tmp_path / "b"))
    assert "slower than dense on this machine: 12 of 14 layers" in text
    assert "whether the other 2 layers are faster is for `secateur bench`" in text
    assert "slower" not in said(
        run("export", tmp_path / "b", "--to", "dense", "-o", tmp_path / "c")
    )


def test_export_that_rounds_says_how_far(pruned: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    text = said(run("export", pruned, "--to", "packed", "--format", "semi24_int4", "-o", packed))
    assert "semi24_int4 rounds weights: those of a layer are off by up to" in text
    formats = {entry["format"] for entry in read_sidecar(packed).packed.values()}
    assert formats == {"semi24_int4"}
    assert said(run("check", packed))


def test_export_packs_each_layer_in_the_format_of_its_pattern(dense: Path, tmp_path: Path) -> None:
    out, packed = tmp_path / "out", tmp_path / "packed"
    patterns = ("-p", "*.up_proj=block:16x16@0.5", "-p", "*.down_proj=unstructured:0.8")
    said(run("prune", dense, "-o", out, *patterns))
    said(run("export", out, "--to", "packed", "-o", packed))
    formats = {n.split(".")[-1]: e["format"] for n, e in read_sidecar(packed).packed.items()}
    assert formats == {"up_proj": "block:16x16", "down_proj": "bitmap"}
    said(run("export", out, "--to", "packed", "--format", "csr", "-o", tmp_path / "csr"))
    entries = read_sidecar(tmp_path / "csr").packed.values()
    assert {entry["format"] for entry in entries} == {"csr"}
    model = load(packed)
    ids = token_rows(tokens(dense, "validation"), 1, 1)[0]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, load_folder(out)(ids).logits, atol=0.25)


def test_what_export_refuses(dense: Path, pruned: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x")
    line = refused(run("export", pruned, "--to", "dense", "--format", "csr", *out))
    assert "--format goes with --to packed" in line
    line = refused(run("export", pruned, "--to", "packed", "--format", "semi42", *out))
    assert "unknown format 'semi42': did you mean 'semi24'?" in line
    line = refused(run("export", dense, "--to", "packed", *out))
    assert "packing needs a layer that fits semi24, got none" in line
    assert "name another --format" in line
    assert not (tmp_path / "x").exists()


def test_recover_learns_while_every_zero_holds(dense: Path, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "recovered"
    found = json.loads(
        said(
            run(
                "recover", pruned, "--teacher", dense, "-o", out, "--tokens",
                tokens(dense, "calibration"), "--rows", ROWS, "--batch", 4, "--steps", 20,
                "--learning-rate", 0.003, "--eval-tokens", tokens(dense, "calibration"),
                "--eval-rows", ROWS, "--json",
            )
        )
    )  # fmt: skip
    assert found["report"]["steps"] == 20
    assert found["after"]["KL to dense"] < 0.8 * found["before"]["KL to dense"]
    before, after = weights(pruned), weights(out)
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16 and not torch.equal(before[name], after[name])
    assert torch.equal(before[name] == 0, after[name] == 0)
    assert said(run("check", out))
    assert [set(report) >= {"steps"} for report in read_sidecar(out).reports] == [False, True]
    line = refused(run("recover", dense, "--teacher", dense, "-o", tmp_path / "x", "--tokens",
                       tokens(dense, "calibration"), "--rows", 2))  # fmt: skip
    assert "hold needs a model with zeros" in line


# --- pages ---------------------------------------------------------------------------------------


def test_report_shows_what_the_folder_and_the_measures_tell(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    said(
        run(
            "report", pruned, "-o", out, "--baseline", dense, "--tokens",
            tokens(dense, "validation"), "--rows", 2, "--title", "Two blocks",
        )
    )  # fmt: skip
    page = out.read_text()
    assert "<title>Two blocks</title>" in page
    for section in ("accuracy", "sparsity", "masks", "errors", "sizes", "plan", "provenance"):
        assert f'<section id="{section}">' in page
    assert '<section id="dispatch">' not in page and "Speed was not measured" in page
    rows = token_rows(tokens(dense, "validation"), 2, 2)
    perplexity = evaluate.perplexity(load_folder(pruned).float(), rows).perplexity
    assert f">{perplexity:.3f}<" in page and "bfloat16" in page


def test_report_says_what_packing_would_give(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("secateur.cli.report.write_html", lambda *_, **given: shown.append(given))
    page = ("-o", tmp_path / "report.html")
    said(run("export", pruned, "--to", "packed", "-o", tmp_path / "packed"))
    said(run("report", pruned, "--baseline", dense, *page))
    written = (tmp_path / "packed" / "model.secateur.safetensors").stat().st_size
    sizes = shown[0]["sizes"]
    size = (dense / "model.safetensors").stat().st_size
    assert list(sizes) == ["dense", "pruned", "pruned, if packed"]
    assert sizes["dense"] == sizes["pruned"] == size
    headers = 14 * 200  # names and shapes of more tensors
    assert sizes["pruned, if packed"] == pytest.approx(written, abs=headers)
    assert written < size - 2 * headers
    for folder in (dense, tmp_path / "packed"):  # nothing to pack
        said(run("report", folder, *page))
        assert list(shown[-1]["sizes"]) == [folder.name]


def test_report_compares_folders(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("secateur.cli.report.write_html", lambda *_, **given: shown.append(given))
    other, page = tmp_path / "other", ("-o", tmp_path / "report.html")
    data = ("--tokens", tokens(dense, "validation"), "--rows", 2)
    said(run("prune", dense, "-o", other, "-p", "2:4", "-m", "random"))
    said(run("report", pruned, other, "--baseline", dense, *data, *page))
    assert list(shown[0]["evaluations"]) == ["dense", "pruned", "other"]
    assert [r.method for r in shown[0]["prune"]] == ["pruned: magnitude", "other: random"]
    assert shown[0]["plan"] == read_sidecar(pruned).plan and shown[0]["model"] is None
    assert shown[0]["title"] == "pruned and other"
    found = json.loads(said(run("eval", other, "--baseline", dense, *data, "--json")))
    assert shown[0]["evaluations"]["other"] == found["other"]
    line = refused(run("report", pruned, other, "--tokens-per-call", "1", *page))
    assert "--tokens-per-call needs one folder, got 2" in line


@pytest.mark.parametrize("name", ["rep.pdf", "report", "a.html.png", "report.json"])
def test_a_page_is_called_what_it_is(pruned: Path, tmp_path: Path, name: str) -> None:
    line = refused(run("report", pruned, "-o", tmp_path / name))
    assert line.endswith("give it a name that ends in .html") and not (tmp_path / name).exists()
    data = ("--tokens", tokens(pruned.with_name("dense"), "validation"), "--rows", 1)
    assert "ends in .html" in refused(run("sense", pruned, *data, "--html", tmp_path / name))
    name = name.replace(".json", ".html")
    assert "ends in .json" in refused(run("sense", pruned, *data, "-o", tmp_path / name))


def test_report_measures_speed_where_it_is_asked_to(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    said(run("report", pruned, "-o", out, "--tokens-per-call", "1"))
    assert '<section id="dispatch">' in out.read_text()
    assert "Speed was not measured" not in out.read_text()
    line = refused(run("report", pruned, "-o", out, "--sensitivity", pruned / "config.json"))
    assert "config.json is no sensitivity" in line


def test_demo_calls_the_job_with_its_folder(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("secateur.cli.demo.run", lambda *arguments: calls.append(arguments))
    said(run("demo", "-o", tmp_path, "--model", dense))
    assert calls == [(tmp_path, dense)]


# --- bare state dicts ----------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    draw = torch.randn
    tensors = {
        "embed.weight": draw(20, 16), "blocks.0.type.weight": draw(8, 16),
        "blocks.0.type.bias": draw(8), "blocks.0.norm.weight": draw(16),
        "stem.weight": draw(8, 8, 3, 3), "dw.weight": draw(8, 1, 3, 3),
        "gpt.a.c_fc.weight": draw(16, 32), "gpt.a.c_fc.bias": draw(32),
        "gpt.b.c_fc.weight": draw(16, 16), "ids.weight": torch.ones(4, 4, dtype=torch.int8),
        "lm_head.weight": draw(20, 16), "step": torch.tensor(7),
    }  # fmt: skip
    save_file(tensors, tmp_path / "weights.safetensors", {"format": "pt", "made": "by hand"})
    return tmp_path / "weights.safetensors"


def test_a_bare_state_dict_is_pruned_where_it_may_be(bare: Path, tmp_path: Path) -> None:
    text = said(run("prune", bare, "-o", tmp_path / "out", "-p", "2:4"))
    before, after = load_file(bare), load_file(tmp_path / "out" / "weights.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed == {"blocks.0.type.weight", "stem.weight"}
    linear, conv = after["blocks.0.type.weight"], after["stem.weight"]
    assert bool(((linear.view(-1, 4) != 0).sum(1) == 2).all())
    along_channels = conv.permute(0, 2, 3, 1).reshape(-1, 4)
    assert bool(((along_channels != 0).sum(1) == 2).all())
    with safe_open(tmp_path / "out" / "weights.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt", "made": "by hand"}
    assert "2 of 8 layers" in text
    zeros = sum(int((t == 0).sum()) for n, t in after.items() if n in changed)
    everything = sum(t.numel() for t in after.values())
    (line,) = [line for line in text.splitlines() if line.startswith("zeros of all")]
    assert line.split()[4:6] == [f"{zeros / everything:.1%}", f"{everything:,}"]
    for reason in ("embed and 1 more: an embedding or output head", "dw: a convolution over one",
                   "gpt.a.c_fc and 1 more: stored as [in, out]",
                   "ids: stored as torch.int8"):  # fmt: skip
        assert f"left alone: {reason}" in text
    assert "recover" not in text and "bench" not in text
    assert said(run("check", tmp_path / "out"))
    found = json.loads(said(run("inspect", tmp_path / "out", "--json")))
    assert {layer["layer"]: layer["zeros"] for layer in found["layers"]} == {
        "blocks.0.type": 0.5, "stem": 0.5,
    }  # fmt: skip


def test_shards_keep_their_files_and_their_index(bare: Path, tmp_path: Path) -> None:
    tensors = load_file(bare)
    folder = tmp_path / "sharded"
    folder.mkdir()
    files = {
        "a.safetensors": ["stem.weight"],
        "b.safetensors": ["embed.weight", "blocks.0.type.weight"],
    }
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    out = tmp_path / "out"
    said(run("prune", folder, "-o", out, "-p", "unstructured:0.25"))
    assert {file.name for file in out.iterdir()} == {
        *files, "m.safetensors.index.json", "secateur.json",
    }  # fmt: skip
    assert float((load_file(out / "a.safetensors")["stem.weight"] == 0).float().mean()) == 0.25
    assert set(load_file(out / "b.safetensors")) == set(files["b.safetensors"])
    assert said(run("check", out / "m.safetensors.index.json", "-p", "unstructured:0.25"))
    assert set(read_sidecar(out).files) == {*files, "m.safetensors.index.json"}


def test_what_a_bare_state_dict_cannot_do(bare: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out", "-p", "2:4")
    line = refused(run("prune", bare, *out, "-m", "wanda", "--tokens", "a.safetensors:b"))
    assert "is a bare state dict, which cannot be run on data" in line
    assert "cannot be run on data" in refused(run("prune", bare, *out, "--eval-tokens", "a:b"))
    assert "--dtype needs a model folder" in refused(run("prune", bare, *out, "--dtype", "float32"))
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "norms.safetensors")
    line = refused(run("inspect", tmp_path / "norms.safetensors"))
    assert "has no weight that can be pruned" in line
    assert "holds several state dicts" in refused(run("inspect", tmp_path))
    (tmp_path / "x.safetensors.index.json").write_text('{"weights": []}')
    line = refused(run("inspect", tmp_path / "x.safetensors.index.json"))
    assert "is no index of safetensors" in line
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "lacks its weight file gone.safetensors" in refused(
        run("inspect", tmp_path / "x.safetensors.index.json")
    )
    assert not (tmp_path / "out").exists()


# --- the reference model -------------------------------------------------------------------------

REFERENCE = Path(__file__).parents[3] / "shared" / "models" / "reference-lm"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="shared/models/reference-lm is not here")
def test_the_reference_model_is_planned_with_its_tied_head_left_alone() -> None:
    found = json.loads(said(run("plan", REFERENCE, "-p", "2:4", "--json")))
    assert len(found["layers"]) == 56 and list(found["skipped"]) == ["lm_head"]


# --- files that refuse, and names that lie -------------------------------------------------------


EVIL = "a\x1b[2J\x1b]0;owned\x07\n[bold red]error: x[/bold red][/]\r\u202e<b>"


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A state dict with keys that would clear a screen, forge a line, and end a markup."""
    tensors = {f"{EVIL}.{i}.weight": torch.randn(8, 8) for i in range(2)}
    tensors |= {f"{EVIL}.bad.weight": torch.randn(8, 7)}
    tensors |= {f"lm_head{EVIL}.weight": torch.randn(8, 8)}
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_names_from_files_are_never_obeyed(evil: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    ignore = ("--ignore", "*bad")
    verbs: list[tuple[object, ...]] = [
        ("inspect", evil),
        ("inspect", evil, "--full"),
        ("inspect", evil, "--json"),
        ("plan", evil, "-p", "2:4", *ignore, "-o", plan),
        ("plan", evil, "-p", "2:4"),
        ("prune", evil, "-p", "2:4", *ignore, "-o", out),
        ("prune", evil, "--plan", plan, "-o", tmp_path / "out2"),
        ("prune", evil, "-p", "2:4", "--layers", "nothing", "-o", tmp_path / "out3"),
        ("check", out),
        ("check", evil, "--plan", plan),
    ]
    for verb in verbs:
        result = run(*verb)
        told = result.stdout + result.stderr
        assert not isinstance(result.exception, Exception) or isinstance(
            result.exception, SystemExit
        ), verb
        assert not set(told) & set("\x1b\x07\r\u202e"), verb
        assert not any(line.startswith(("[bold red]", "error: x")) for line in told.splitlines())
    assert (
        "a\\x1b[2J\\x1b]0;owned\\x07\\n[bold red]error: x[/bold red][/]"
        in run("inspect", evil).stdout
    )
    assert read_sidecar(out).plan == sc.read_plan(plan)
    assert all("\x1b" in name for name in load_file(out / "m.safetensors"))


def test_names_in_a_report_are_text(tmp_path: Path) -> None:
    model = nn.Sequential()
    name = EVIL.replace(".", "")
    model._modules[name] = nn.Linear(8, 8)
    plan = sc.plan(model, "2:4")
    report = sc.prune_(model, plan)
    write_html(tmp_path / "r.html", title=EVIL, plan=plan, prune=[report], model=model)
    page = (tmp_path / "r.html").read_text()
    assert not set(page) & set("\x1b\x07\r\u202e") and "<b>" not in page
    assert "owned\\x07" in page and "&lt;b&gt;" in page
    for shown in (str(plan), str(report)):
        assert not set(shown) & set("\x1b\x07\r\u202e")


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("where", ["", "secateur-undo", "ck", "out"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    where: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch as st

    write = st.save_file

    def full(tensors: Any, path: Any, *rest: Any) -> None:
        if where in str(path):
            raise SafetensorError(FULL)
        write(tensors, path, *rest)

    monkeypatch.setattr(st, "save_file", full)
    out, kept = tmp_path / "out", tmp_path / "ck"
    line = refused(run("prune", bare, "-p", "2:4", "-o", out, "--checkpoint", kept))
    assert "No space left on device" in line and "os error" not in line
    assert not out.exists() and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    said(run("prune", bare, "-p", "2:4", "-o", out, "--checkpoint", kept))
    assert said(run("check", out))


@pytest.mark.parametrize("verb", ["plan", "report", "sense"])
def test_a_page_or_table_that_cannot_be_written_is_one_line(
    verb: str, dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / ("out.json" if verb == "sense" else "out.html")
    calls = {
        "plan": ("plan", dense, "-p", "2:4", "-o", out),
        "report": ("report", pruned, "-o", out),
        "sense": ("sense", dense, "--tokens", tokens(dense, "calibration"), "--rows", "1",
                  "-p", "2:4", "--layers", "*q_proj", "-o", out),
    }  # fmt: skip
    out.write_text("before")

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert refused(run(*calls[verb])).endswith(f"{out.name}: No space left on device")
    assert out.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {out.name}
    monkeypatch.undo()
    said(run(*calls[verb]))
    assert out.read_text() != "before"


def test_the_output_may_be_the_input_and_holds_all_that_it_held(
    dense: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    said(run("prune", dense, "-p", "unstructured:0.25", "-o", folder))
    mine = {"notes.txt": b"mine", "adapter_model.safetensors": b"mine"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert "holds a saved model" in refused(run("prune", folder, "-p", "2:4", "-o", folder))
    for _ in range(2):
        said(run("prune", folder, "-p", "2:4", "-o", folder, "--overwrite"))
        assert all((folder / name).read_bytes() == content for name, content in mine.items())
        assert (folder / "tokenizer.json").read_bytes() == tokenizer
        assert "tokenizer.json" in read_sidecar(folder).files
        assert "all 14 layers hold their pattern" in said(run("check", folder))
    said(run("export", folder, "--to", "packed", "-o", folder, "--overwrite"))
    assert {p.name for p in folder.glob("model*")} == {"model.secateur.safetensors"}
    assert "all 14 layers hold their pattern" in said(run("check", folder))


def test_the_output_may_be_a_state_dict_of_its_own_folder(bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said(run("prune", bare, "-p", "unstructured:0.25", "-o", out))
    said(run("prune", out, "-p", "2:4", "-o", out, "--overwrite"))
    assert said(run("check", out))
    assert {p.name for p in out.iterdir()} == {"weights.safetensors", "secateur.json"}
    (out / "weights.safetensors").write_bytes((bare).read_bytes())
    assert "it was cut off or changed" in refused(run("check", out, "-p", "2:4")) or "sha256" in (
        refused(run("check", out, "-p", "2:4"))
    )


def test_a_tokenizer_of_somebody_else_is_not_replaced(dense: Path, tmp_path: Path) -> None:
    sc.save(load_folder(dense), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("mine")
    line = refused(run("prune", dense, "-p", "2:4", "-o", tmp_path / "m", "--overwrite"))
    assert "tokenizer.json is none of the saved model's files and would be replaced" in line
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "mine"
    assert float((weights(tmp_path / "m")["model.layers.0.mlp.up_proj.weight"] == 0).sum()) == 0


@pytest.mark.parametrize("name", ["w.bin", "w.pt"])
def test_a_pickle_says_how_to_convert_it(
    name: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(load_file(bare), tmp_path / name)
    line = refused(run("inspect", tmp_path / name))
    command = re.search(r'python -c "(.*)"', line)
    assert command is not None and "a pickle may hold code, so it is never read" in line
    exec(command[1])
    assert same_tensors(load_file(tmp_path / "w.safetensors"), load_file(bare))
    assert "hf download a/b-c --local-dir b-c" in refused(run("inspect", "a/b-c"))


def same_tensors(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
