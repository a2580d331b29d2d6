"""Failed allocations: reported in one line, with the layer and what needs less memory."""

import subprocess
import sys

import pytest
import torch
import typer
from torch import nn

import secateur as sc
from secateur.cli.console import failures
from secateur.core.memory import is_out_of_memory, room_for


def test_an_allocation_that_fails_names_the_layer_and_the_remedy() -> None:
    with pytest.raises(MemoryError) as error, room_for(["a", "b"], "its sums", "do less"):
        torch.empty(2**60, dtype=torch.float32, device="cpu")
    assert str(error.value) == (
        "layer a (and 1 more): not enough memory for its sums, which took 4611686018.4 GB more: "
        "do less"
    )


def test_on_a_gpu_it_stays_what_is_caught_there() -> None:
    message = "CUDA out of memory. Tried to allocate 37.25 GiB. GPU 0 has a total capacity of ..."
    with pytest.raises(torch.OutOfMemoryError) as error, room_for(["a"], "its sums", "do less"):
        raise torch.OutOfMemoryError(message)
    assert str(error.value) == (
        "layer a: not enough memory for its sums, which took 37.25 GiB more: do less"
    )


def test_the_innermost_is_told() -> None:
    with (
        pytest.raises(MemoryError, match="layer inner: not enough memory for b: c"),
        room_for(["outer"], "x", "y"),
        room_for(["inner"], "b", "c"),
    ):
        raise MemoryError


def test_other_errors_are_left_alone() -> None:
    for error in (RuntimeError("shapes"), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as seen, room_for(["a"], "b", "c"):
            raise error
        assert seen.value is error
        assert not is_out_of_memory(error)


# Each in its own process, limited to 4 GB of address space beyond what it has.
LIMITED = """
import resource, sys
import torch
from torch import nn
import secateur as sc
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(60_000, 4, bias=False))
before = model[0].weight.detach().clone()
batches = [torch.randn(2, 60_000) for _ in range(3)]
with open("/proc/self/statm") as statm:
    now = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30),) * 2)
try:
    {call}
except {kind} as error:
    print(error)
assert torch.equal(model[0].weight, before)
"""
GRAM = (
    "layer 0: not enough memory for the gram (width 60,000) of its inputs, which took 14.4 GB "
    "more: leave the layer out of the plan (ignore=), pass shorter batches, or take a method that "
    "needs no Gram matrix, such as sc.wanda"
)


TOLD = (
    "of the plan (--ignore), give a smaller --length, or take a method that needs no Gram matrix, "
    "such as --method wanda"
)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are Linux's here")
def test_a_gram_matrix_that_does_not_fit_is_told_and_the_remedy_works() -> None:
    call = 'sc.reconstruct_(model, "2:4", sc.sparsegpt, batches)'
    assert limited(call) == GRAM
    assert limited('sc.prune_(model, "2:4", sc.wanda, batches); before = model[0].weight') == ""


def limited(call: str) -> str:
    code = LIMITED.format(call=call, kind="MemoryError")
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return seen.stdout.strip()


@pytest.mark.parametrize(
    ("error", "cause", "said"),
    [
        (MemoryError(GRAM), RuntimeError(), TOLD),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."), None, "or --length"),
        (torch.OutOfMemoryError("CUDA out of memory."), None, "--length, or --device cpu"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    error: Exception, cause: Exception | None, said: str, capsys
) -> None:
    with pytest.raises(typer.Exit) as exit, failures(False):
        raise error from cause
    assert exit.value.exit_code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory: ") and printed.count("\n") == 1
    assert printed.endswith(f"{said}\n")


def test_every_step_of_a_run_is_told(monkeypatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise MemoryError

    def hungry(weight: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential()
    model.add_module("layers", nn.Sequential(*blocks))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [torch.randn(4, 8) for _ in range(4)]
    with pytest.raises(MemoryError, match=r"^layer layers.0.0: .* for what hungry computes: leave"):
        sc.prune_(model, "2:4", hungry)
    monkeypatch.setattr(sys.modules["secateur.reconstruct.blockwise"], "_Training", fails)
    with pytest.raises(MemoryError, match="for training layers.0: pass shorter .* sc.alps alone"):
        sc.reconstruct_(model, "2:4", sc.best, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
