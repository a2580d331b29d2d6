"""`doctor`: every format and implementation is there, and the answers are this machine's."""

import sys
import tomllib
from copy import copy
from pathlib import Path

import pytest
import torch
from pytest import MonkeyPatch

from secateur.accelerate import doctor as module
from secateur.accelerate.doctor import EXTRAS, STATES, Finding, digest, doctor
from secateur.formats.contract import Implementation, Packed
from secateur.formats.format import FORMATS, parse_format
from secateur.formats.kernels.gpu import why_no_gpu
from secateur.formats.reference import REFERENCE
from secateur.patterns import parse


def test_every_implementation_is_examined() -> None:
    found = {entry.capability: entry for entry in doctor()}
    assert {"block:64x64", "semi24_int4", "semi24_int4:channel"} <= set(map(str, FORMATS))
    for format in FORMATS:
        for implementation in format.implementations:
            assert f"{format} {implementation.name}" in found
        assert found[f"{format} reference"].state == "yes"
    assert {entry.state for entry in found.values()} <= set(STATES)


def test_torch_and_threads_are_those_of_this_process() -> None:
    found = {entry.capability: entry for entry in doctor()}
    assert found["torch"].detail == torch.__version__
    assert found["cpu"].detail.startswith(f"{torch.get_num_threads()} threads, ")


def test_a_machine_without_cuda_says_so(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {entry.capability: entry for entry in doctor()}
    assert found["cuda"].state == "no" and "no CUDA device" in found["cuda"].detail
    assert found["block:64x64 cpu"].state == "yes"


def test_packages_are_looked_up_and_not_imported(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPTIONAL", {"antigravity": "x", "no.such": "y", "xml.none": "z"})
    found = {entry.capability: entry.state for entry in doctor()}
    assert (found["antigravity"], found["no.such"], found["xml.none"]) == ("yes", "no", "no")
    assert "antigravity" not in sys.modules


def test_what_cannot_run_says_why(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    found = {entry.capability: entry for entry in doctor()}
    assert found["csr torch_csr"].state == "no"
    assert found["csr torch_csr"].detail == "csr torch_csr needs a torch built with MKL"
    told = {
        entry.detail for entry in found.values() if entry.state == "no" and " " in entry.capability
    }
    assert told == {"csr torch_csr needs a torch built with MKL", why_no_gpu(torch.device("cpu"))}


def test_implementations_are_asked_at_few_and_many_tokens(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked: list[tuple[str, int]] = []

    def few(packed: Packed, tokens: int) -> str | None:
        asked.append((str(packed.format), tokens))
        if packed.dtype == torch.float32:
            return "needs 16 bits"
        return None if tokens < 65 else "takes at most 64 tokens"

    entries = (Implementation("few", REFERENCE.linear, few), REFERENCE)
    formats = [copy(parse_format(text)) for text in ("semi24_int4", "semi24_int4:channel")]
    for format in formats:
        object.__setattr__(format, "implementations", entries)
    monkeypatch.setattr(module, "FORMATS", formats)
    found = {entry.capability: entry for entry in doctor()}
    for format in map(str, formats):
        assert found[f"{format} few"] == Finding(
            f"{format} few",
            "yes",
            "cpu, at 1 token in float16, bfloat16; at 4096 tokens not: takes at most 64 tokens",
        )
        assert {tokens for name, tokens in asked if name == format} == {1, 4096}
    everywhere = "cpu, at 1 and 4096 tokens in float32, float16, bfloat16"
    assert found["semi24_int4 reference"].detail == everywhere


@pytest.mark.usefixtures("no_cpu_kernels")
def test_four_lines_say_what_a_newcomer_needs(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "_installed", lambda name: True)
    lines = dict(digest(doctor()))
    assert list(lines) == ["this machine", "sparse here", "not here", "to install"]
    assert lines["this machine"].startswith(f"torch {torch.__version__}; a CPU with ")
    assert lines["this machine"].endswith("no CUDA GPU")
    assert lines["sparse here"].startswith("block:64x64, csr; prune to block:64x64@0.8 or ")
    assert lines["not here"].startswith("semi24, semi48, bitmap, semi24_int4, semi24_int8, ")
    assert lines["not here"].endswith(
        ", bitmap_int4: running it packed needs a CUDA GPU, and this machine has none"
    )
    assert lines["to install"].startswith("nothing: ")
    monkeypatch.setattr(module, "_installed", lambda name: name == "scipy")
    told = dict(digest(doctor()))["to install"]
    assert told == (
        "pip install 'secateur[hf]' for models in Hugging Face folders; "
        "pip install 'secateur[report]' for pages of results; "
        "pip install 'secateur[serve]' for answers over HTTP; "
        "pip install 'secateur[eval]' for the tasks of lm-eval"
    ), "extras for GPUs are for machines with one"


def test_a_machine_with_a_gpu_is_told_what_it_can_run_and_lacks(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: "cuda" not in name)
    found = [
        Finding("torch", "info", "2.11"), Finding("cpu", "info", "8 threads, AVX2"),
        Finding("cuda", "yes", "NVIDIA X, compute capability 9.0"),
        Finding("semi24 decode", "no", "needs cuda-bindings"),
        Finding("semi24 dense", "yes", "cuda, at 1 token in bfloat16"),
        Finding("semi24 reference", "yes", ""), Finding("csr torch_csr", "no", "needs a CPU"),
    ]  # fmt: skip
    lines = dict(digest(found))
    assert lines["this machine"].endswith("NVIDIA X, compute capability 9.0")
    assert lines["sparse here"].startswith("semi24; prune to 2:4, and ")
    assert "csr: needs a CPU" in lines["not here"]
    assert lines["to install"] == "pip install 'secateur[cuda]' for the kernels for a GPU"


def test_the_extras_and_the_patterns_exist() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert EXTRAS.keys() == project["optional-dependencies"].keys() - {"docs", "dev"}
    wanted = {str(format): format.prune_to for format in FORMATS if format.prune_to}
    assert wanted.keys() == {"semi24", "semi48", "block:64x64", "csr"}
    for format, pattern in wanted.items():
        chosen = parse_format(format)
        torch.manual_seed(0)
        weight = torch.randn(128, 128)
        weight *= parse(pattern).mask(weight.abs())
        assert chosen.why_not(weight) is None, f"{pattern} cannot be stored as {format}"
