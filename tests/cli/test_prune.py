"""`secateur prune` on tiny models: what it writes, what it prints, and how it refuses."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import secateur as sc
from secateur.files.sidecar import read_sidecar
from secateur.integrations.tokens import sampled_rows, text_batches, token_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from tests.cli.shell import ROWS, refused, run, said, same, tokens, weights


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
    assert lines["zeros in plan"] == "0.0% 50.0% every layer checked".split()
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


@pytest.mark.filterwarnings("default::UserWarning")  # or it is an error before it is printed
def test_keep_zeros_loses_none(dense: Path, tmp_path: Path) -> None:
    thin, kept = tmp_path / "thin", tmp_path / "kept"
    text = ("--tokens", tokens(dense, "calibration"), "--rows", ROWS)
    said(run("prune", dense, "-p", "unstructured:0.6@layer", "-o", thin))
    again = ("prune", thin, "-p", "2:4", "-m", "sparsegpt", *text)
    said(run(*again, "--keep-zeros", "-o", kept))
    said(run("check", kept, "-p", "2:4"))
    for name, weight in weights(thin).items():
        assert not weights(kept)[name][weight == 0].any()
    lost = run(*again, "-o", tmp_path / "lost")
    assert "warning: 14 of 14 layers have zeros" in lost.stderr
    assert "give --keep-zeros to keep them" in lost.stderr


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
