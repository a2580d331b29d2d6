"""A process killed at any of its file operations loses nothing: the same call resumes.

A child makes the call and kills itself before its k-th operation on a file under the test's
folder, for a seeded sample of k and for the first and the last ones. Then the same call is made
again: it has to end as an undisturbed call does, and leave no other files than that.
"""

import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

import secateur as sc
from secateur.allocation import sensitivity
from secateur.files.save import load, save
from secateur.model.outputs import answer
from secateur.reconstruct import compensate
from tests.faults.verbs import TRIED, batches, dense, pruned

# Python's audit events for file operations; safetensors writes without them.
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")

Result = dict[str, Tensor]


def _prune(folder: Path) -> Result:
    model = dense()
    sc.reconstruct_(model, "2:4", sc.sparsegpt, batches(), checkpoint=folder / "run")
    return model.state_dict()


def _distil(folder: Path) -> Result:
    model = pruned()
    sc.distil_(model, dense(), batches(), steps=3, checkpoint=folder / "run")
    return model.state_dict()


def _thorough(folder: Path) -> Result:
    model = dense()
    method = sc.blockwise(sc.sparsegpt, epochs=1, distil=1)
    sc.reconstruct_(model, "2:4", method, batches(), checkpoint=folder / "run")
    return model.state_dict()


def _save(folder: Path) -> Result:
    model = pruned()
    save(model, folder / "out", overwrite=True)
    with torch.no_grad():
        model.head.weight.zero_()
    save(model, folder / "out", overwrite=True)
    return load(folder / "out", dense()).state_dict()


def _adapter(folder: Path) -> Result:
    model = pruned()
    if not (folder / "adapter").exists():
        compensate(model, dense().state_dict(), batches(), folder / "adapter", rank=1)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def _sense(folder: Path) -> Result:
    def loss(model: torch.nn.Module) -> float:
        return float(answer(model, batches()[0], "the batch").square().mean())

    found = sensitivity(dense(), ["2:4", "1:4"], loss, checkpoint=folder / "sense.json")
    found.write(folder / "found.json")
    return {name: torch.tensor(list(rows.values())) for name, rows in found.increase.items()}


CALLS: Mapping[str, Callable[[Path], Result]] = {
    "reconstruct_": _prune,
    "thorough": _thorough,
    "distil_": _distil,
    "save": _save,
    "compensate": _adapter,
    "sensitivity": _sense,
}


def operations(folder: Path, kill_at: int, call: Callable[[Path], Any]) -> int:
    """The number of file operations of the call; `kill_at` ends the process before that one."""
    count, base = 0, str(folder)

    def operation(*_: object) -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(event: str, arguments: Any) -> None:
        if event in EVENTS and str(arguments[0]).startswith(base):
            operation()

    write = safetensors.torch.save_file

    def writing(*arguments: Any) -> None:
        operation()
        write(*arguments)
        operation()

    safetensors.torch.save_file = writing
    sys.addaudithook(hear)
    call(folder)
    return count


def in_child(folder: Path, kill_at: int, call: Callable[[Path], Any]) -> int:
    """The count from a process of its own, or -1 if it was killed."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reads)
        try:
            os.write(writes, str(operations(folder, kill_at, call)).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        said = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return int(said) if status == 0 else -1


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", CALLS)
def test_at_any_file_operation(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[name]
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    whole = tmp_path / "whole"
    whole.mkdir()
    expected, files = call(whole), left(whole)
    counted = tmp_path / "counted"
    counted.mkdir()
    count = in_child(counted, 0, call)
    assert count > 3
    chosen = random.Random(name)
    some = {chosen.randint(1, count) for _ in range(TRIED)}
    for kill_at in sorted(some | {1, 2, count - 1, count}):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        assert in_child(folder, kill_at, call) == -1, kill_at
        result = call(folder)
        different = [key for key in expected if not torch.equal(expected[key], result[key])]
        assert (kill_at, different) == (kill_at, [])
        assert (kill_at, left(folder)) == (kill_at, files)
    assert [name for name in left(tmp_path / "tmp") if "secateur" in name] == []


def test_two_processes_do_not_share_a_checkpoint(tmp_path: Path) -> None:
    """The second one is refused; once the first is gone, anybody may use its checkpoint."""
    from secateur.core.disk.checkpoint import Checkpoint

    with Checkpoint(tmp_path / "run", {}) as first:
        first.add({"a": torch.ones(2)}, {"a": {}})

        def second(folder: Path) -> None:
            with pytest.raises(ValueError, match=r"run is in use by another process: wait until"):
                Checkpoint(folder, {})

        assert in_child(tmp_path / "run", 0, second) >= 0
    with Checkpoint(tmp_path / "run", {}) as again:
        assert torch.equal(again.weights(["a"])["a"], torch.ones(2))
