"""`doctor`: every format and implementation is there, and the answers are this machine's."""

import sys

import torch
from pytest import MonkeyPatch

from secateur import doctor as module
from secateur.doctor import STATES, Finding, doctor
from secateur.formats.contract import Implementation, Packed
from secateur.formats.format import FOLDERS


def test_every_implementation_is_examined() -> None:
    found = {entry.capability: entry for entry in doctor()}
    for name, folder in FOLDERS.items():
        formats = [f"{name}:64x64" if name == "block" else name]
        formats += ["semi24_int4:channel"] if name == "semi24_int4" else []
        for format in formats:
            for implementation in folder.IMPLEMENTATIONS:
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


def test_implementations_are_asked_at_few_and_many_tokens(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked: list[tuple[str, int]] = []

    def few(packed: Packed, tokens: int) -> str | None:
        asked.append((packed.format, tokens))
        if packed.dtype == torch.float32:
            return "needs 16 bits"
        return None if tokens < 65 else "takes at most 64 tokens"

    folder = FOLDERS["semi24_int4"]
    reference = folder.IMPLEMENTATIONS[-1]
    entries = (Implementation("few", reference.linear, few), reference)
    monkeypatch.setattr(folder, "IMPLEMENTATIONS", entries)
    found = {entry.capability: entry for entry in doctor()}
    for format in ("semi24_int4", "semi24_int4:channel"):
        assert found[f"{format} few"] == Finding(
            f"{format} few",
            "yes",
            "cpu, at 1 token in float16, bfloat16; at 4096 tokens not: takes at most 64 tokens",
        )
        assert {tokens for name, tokens in asked if name == format} == {1, 4096}
    everywhere = "cpu, at 1 and 4096 tokens in float32, float16, bfloat16"
    assert found["semi24_int4 reference"].detail == everywhere
