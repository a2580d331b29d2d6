"""The bench of what a model holds, end to end on a toy."""

from pathlib import Path

import pytest
import torch

import secateur as sc
from bench.lib.llama import TINY
from bench.run import memory
from bench.run.memory import Case
from tests.bench.rows import rows_of

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")

pytest.importorskip("transformers")

# bfloat16 numbers of the tiny model: q, k, v, o; gate, up, down; norms; embeddings and head
LINEARS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
OTHERS = 2 * 2 * 32 + 32 + 2 * 64 * 32
INVERSE_FREQUENCIES = 2 * 4 * 8  # two float32 buffers that no folder holds


def test_a_row_for_each_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model tiny --prompt 16 --verb pack --device cpu --configurations dense semi24"
    assert memory.main([*words.split(), "--output", str(tmp_path)]) == 0
    dense, packed = rows_of(tmp_path, "memory")
    assert (dense["configuration"], dense["packed"], dense["runs"]) == ("dense", "0", "")
    assert (packed["configuration"], packed["packed"], packed["blocks"]) == ("semi24", "14", "2")
    assert packed["runs"] == "14 semi24 reference" and packed["verb"] == "pack"
    assert {row["tokens"] for row in (dense, packed)} == {"1 16"}
    assert int(dense["file"]) == 2 * (LINEARS + OTHERS)
    assert int(packed["file"]) == 2 * (0.5625 * LINEARS + OTHERS)
    for row in (dense, packed):
        assert int(row["held"]) == int(row["file"]) + INVERSE_FREQUENCIES
        assert row["allocated"] == row["peak"] == row["verb_peak"] == row["note"] == ""
    assert "dense: file 0.00 GB, held 0.00 GB, 0.0 s, runs dense" in capsys.readouterr().out


def case_of(configuration: str, verb: str) -> Case:
    return Case("tiny", 1, configuration, verb, (1, 4), 8)


def test_the_layers_of_the_blocks_are_2_4_and_nothing_else() -> None:
    model = memory.sparse_llama(case_of("semi24", "pack"), "cpu")
    names = memory.block_layers(model)
    assert len(names) == 7 and "lm_head" not in names
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in names:
            groups = parameter.unflatten(1, (-1, 4)).count_nonzero(2)
            assert torch.equal(groups, torch.full_like(groups, 2)), name
        elif parameter.dim() == 2:
            assert int(parameter.count_nonzero()) > 0.9 * parameter.numel()


def test_accelerate_is_told_the_tokens_and_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[tuple[object, ...]]()
    monkeypatch.setattr(sc, "accelerate_", lambda model, *arguments: told.append(arguments))
    case = case_of("semi24_int4", "accelerate")
    model = memory.sparse_llama(case, "cpu")
    memory.pack(model, case)
    assert told == [((1, 4), ("semi24_int4",), memory.block_layers(model))]
    memory.pack(model, case_of("dense", "accelerate"))
    assert len(told) == 1


def test_a_configuration_that_fails_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise MemoryError("no room for it\nin any place")

    monkeypatch.setattr(sc, "pack_", full)
    row = memory.measured(case_of("semi24", "pack"), "cpu")
    assert row == {**dict.fromkeys(memory.MEASURED, ""), "note": "MemoryError: no room for it"}


def test_sizes_and_prompt_are_filled_in() -> None:
    arguments = memory.parsed(["--model", "tiny", "--prompt", "32"])
    assert (arguments.blocks, arguments.tokens) == (TINY["num_hidden_layers"], (1, 32))
    arguments = memory.parsed(["--model", "tiny", "--blocks", "1", "--tokens", "1", "128"])
    assert (arguments.blocks, arguments.tokens) == (1, (1, 128))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_allocator_s_figures_on_a_gpu() -> None:
    row = memory.alone(case_of("dense", "pack"), "cuda")
    assert row["note"] == ""
    assert 0 < int(row["held"]) <= int(row["allocated"]) < int(row["peak"])
    assert int(row["file"]) < int(row["held"])
