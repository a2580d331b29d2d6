"""The child of a search whose library is the fake, and does to the child what it is told."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.formats.kernels import cusparselt_child, cusparselt_search
from secateur.formats.kernels.cusparselt import Setting
from tests.formats.kernels.fake_cusparselt import Fake, install

VARIABLE = "FAULTS_OF_A_CHILD"  # a file: microseconds and faults by setting, and where to note


class Faults:
    """A fake whose settings have faults, and a note of every setting before it runs."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told, self.notes = told, Path(told["notes"])
        self.fake = Fake(
            {Setting.parse(text): us for text, us in told["us"].items()},
            wrong={Setting.parse(text) for text in told.get("wrong", ())},
        )

    def sparse_mm(self, *arguments: Any, **options: Any) -> Tensor:
        setting = Setting(options["alg_id"], options["split_k"], options["split_k_mode"])
        with self.notes.open("a") as notes:
            notes.write(f"{setting} {os.getpid()}\n")
        result = self.fake.sparse_mm(*arguments, **options)
        happen(self.told.get("faults", {}).get(str(setting), ""))
        return result

    def time(
        self, chains: Sequence[Sequence[Callable[[], object]]], device: torch.device, rounds: int
    ) -> list[float]:
        times = self.fake.time(chains, device, rounds)
        if rounds == cusparselt_search.FINAL_ROUNDS:
            for setting in self.fake.seen[-len(chains) :]:
                happen(self.told.get("finally", {}).get(str(setting), ""))
        return times


def happen(fault: str) -> None:
    if fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault))
        time.sleep(60)
    elif fault == "hang":
        time.sleep(600)
    elif fault == "raise":
        raise RuntimeError("CUDA error: insufficient resources when calling something")
    elif fault == "lost":
        raise torch.AcceleratorError("CUDA error: an illegal instruction was encountered")
    elif fault == "no room":
        raise torch.AcceleratorError("CUDA error: out of memory")
    elif fault == "no room in torch":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB")


def main(uuid: str) -> None:
    told = json.loads(Path(os.environ[VARIABLE]).read_text())
    if "at the start" in told:
        sys.exit(told["at the start"])
    faults = Faults(told)
    patch = pytest.MonkeyPatch()
    install(patch, Path(told["cache"]), faults.fake, isolated=True)
    patch.setattr(torch, "_cslt_sparse_mm", faults.sparse_mm)
    patch.setattr(cusparselt_search, "_us", faults.time)
    if "version" in told:
        patch.setattr(torch.backends.cusparselt, "version", lambda: told["version"])
    torch.set_num_threads(1)
    cusparselt_child.main(uuid)
