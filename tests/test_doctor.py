"""`doctor`: every format and implementation is there, and the answers are this machine's."""

import sys

import torch
from pytest import MonkeyPatch

from secateur import doctor as module
from secateur.doctor import STATES, doctor
from secateur.formats.format import FOLDERS


def test_every_implementation_is_examined() -> None:
    found = {entry.capability: entry for entry in doctor()}
    for name, folder in FOLDERS.items():
        for implementation in folder.IMPLEMENTATIONS:
            assert f"{name} {implementation.name}" in found
        assert found[f"{name} reference"].state == "yes"
    assert {entry.state for entry in found.values()} <= set(STATES)


def test_torch_and_threads_are_those_of_this_process() -> None:
    found = {entry.capability: entry for entry in doctor()}
    assert found["torch"].detail == torch.__version__
    assert found["cpu"].detail.startswith(f"{torch.get_num_threads()} threads, ")


def test_a_machine_without_cuda_says_so(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {entry.capability: entry for entry in doctor()}
    assert found["cuda"].state == "no" and "no CUDA device" in found["cuda"].detail
    assert found["block cpu"].state == "yes"


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
