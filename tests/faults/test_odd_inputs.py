"""Every verb, on models and inputs of every kind: it does its work, or says why it cannot.

A verb that raises has changed nothing, and names the layer or the argument. One that prunes keeps
weights bit for bit, and its result passes `check`; one that packs and saves can be undone.
"""

import copy
import json
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune

import secateur as sc
from secateur.allocation import sensitivity
from secateur.files.save import save
from secateur.model.outputs import answer
from secateur.prune.decompose import decompose_
from secateur.prune.permute import permute_
from secateur.report.inspection import inspect
from tests.faults.verbs import TRIED, WIDTH, batches, dense, differences, everything, packed, pruned

ROOT = Path(__file__).parents[2]
NAME = "blocks.0.up_proj"


# --- models --------------------------------------------------------------------------------------


def changed(change: Callable[[Any], Any], name: str = NAME) -> Callable[[], nn.Module]:
    """A pruned model with one module changed in place."""

    def make() -> nn.Module:
        model = pruned()
        change(model.get_submodule(name))
        return model

    return make


def weight(change: Callable[[Tensor], Tensor], name: str = NAME) -> Callable[[], nn.Module]:
    """A pruned model with one weight replaced."""

    def replace(module: nn.Module) -> None:
        module.weight = nn.Parameter(change(module.weight.detach()), requires_grad=False)

    return changed(replace, name)


def element(value: float) -> Callable[[], nn.Module]:
    def put(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[3, 5] = value
        return tensor

    return weight(put)


def without_bias(module: Any) -> None:
    module.bias = None


def tied() -> nn.Module:
    model = pruned()
    model.blocks[1].up_proj.weight = model.blocks[0].up_proj.weight
    return model


def tied_transposed() -> nn.Module:
    model = pruned()
    model.blocks[0].down_proj.weight = nn.Parameter(model.blocks[0].up_proj.weight.data.t())
    return model


def twice() -> nn.Module:
    model = pruned()
    model.blocks[1] = model.blocks[0]
    return model


def with_part(part: Callable[[], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = pruned()
        model.extra = part()
        return model

    return make


class Alone(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is one of me")


def compiled() -> nn.Module:
    model: Any = torch.compile(pruned(), backend="eager")
    return model  # type: ignore[no-any-return]


def in_inference_mode() -> nn.Module:
    model = pruned()
    with torch.inference_mode():
        return copy.deepcopy(model)


def frozen() -> nn.Module:
    return pruned().requires_grad_(False)


MODELS: Mapping[str, Callable[[], Any]] = {
    "dense": dense,
    "pruned": pruned,
    "packed": packed,
    "eval": lambda: pruned().eval(),
    "frozen": frozen,
    "float64": lambda: pruned().double(),
    "bfloat16": lambda: pruned().bfloat16(),
    "float16": lambda: pruned().half(),
    "meta": lambda: pruned().to("meta"),
    "no bias": changed(without_bias),
    "all zeros": weight(torch.zeros_like),
    "all ones": weight(torch.ones_like),
    "minus zero": element(-0.0),
    "subnormal": element(1e-42),
    "huge": element(3e38),
    "NaN": element(float("nan")),
    "infinite": element(float("-inf")),
    "one meta weight": weight(lambda w: w.to("meta")),
    "transposed": weight(lambda w: w.t().contiguous().t()),
    "expanded": weight(lambda w: w[:1].expand_as(w)),
    "a view": weight(lambda w: torch.cat([w, w])[8 : 8 + len(w)]),
    "CSR": weight(lambda w: w.to_sparse_csr()),
    "COO": weight(lambda w: w.to_sparse()),
    "float8": weight(lambda w: w.to(torch.float8_e4m3fn)),
    "complex": weight(lambda w: w.to(torch.complex64)),
    "int8": weight(lambda w: (10 * w).to(torch.int8)),
    "boolean": weight(lambda w: w > 0),
    "one weight of bfloat16": weight(lambda w: w.bfloat16()),
    "odd width": with_part(lambda: nn.Linear(13, 7)),
    "no rows": with_part(lambda: nn.Linear(WIDTH, 0)),
    "no columns": with_part(lambda: nn.Linear(0, WIDTH)),
    "never called": with_part(lambda: nn.Linear(WIDTH, WIDTH)),
    "lazy": with_part(lambda: nn.LazyLinear(WIDTH)),
    "scripted part": with_part(lambda: torch.jit.script(nn.Linear(WIDTH, WIDTH))),
    "convolution": with_part(lambda: nn.Conv2d(8, 8, 3)),
    "depthwise": with_part(lambda: nn.Conv2d(8, 8, 3, groups=8)),
    "embedding": with_part(lambda: nn.Embedding(4, WIDTH)),
    "LSTM": with_part(lambda: nn.LSTM(WIDTH, WIDTH)),
    "attention": with_part(lambda: nn.MultiheadAttention(WIDTH, 2)),
    "quantized": with_part(lambda: torch.ao.nn.quantized.Linear(WIDTH, WIDTH)),
    "no deepcopy": with_part(Alone),
    "a lock": changed(lambda module: setattr(module, "lock", threading.Lock())),
    "tied": tied,
    "tied transposed": tied_transposed,
    "one block twice": twice,
    "mask of torch": changed(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "mask on a bias": changed(lambda m: prune.l1_unstructured(m, "bias", 0.5)),
    "weight norm": changed(parametrizations.weight_norm),
    "spectral norm": changed(nn.utils.spectral_norm),
    "parametrization": changed(
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity())
    ),
    "no layers": lambda: nn.Sequential(nn.LayerNorm(WIDTH)),
    "nothing": nn.Identity,
    "a bare layer": lambda: nn.Linear(WIDTH, WIDTH),
    "compiled": compiled,
    "DataParallel": lambda: nn.DataParallel(pruned()),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH))),
    "made in inference mode": in_inference_mode,
    "no model": lambda: {"weight": torch.ones(4, 4)},
    "a class": lambda: nn.Linear,
}


# --- data ----------------------------------------------------------------------------------------


def broken() -> Iterator[Tensor]:
    yield batches()[0]
    raise ValueError("the batches end in an error of their own")


BATCHES: Mapping[str, Callable[[], Any]] = {
    "none": lambda: None,
    "no batch": list,
    "a tensor": lambda: batches()[0],
    "a number": lambda: 3,
    "text": lambda: "some text",
    "texts": lambda: ["some", "text"],
    "no rows": lambda: [torch.empty(0, 3, WIDTH)],
    "no tokens": lambda: [torch.empty(4, 0, WIDTH)],
    "another width": lambda: [torch.ones(4, 3, WIDTH + 1)],
    "integers": lambda: [torch.ones(4, 3, WIDTH, dtype=torch.long)],
    "float64": lambda: [torch.ones(4, 3, WIDTH, dtype=torch.float64)],
    "meta": lambda: [torch.ones(4, 3, WIDTH, device="meta")],
    "NaN": lambda: [torch.full((4, 3, WIDTH), float("nan"))],
    "infinite": lambda: [torch.full((4, 3, WIDTH), float("inf"))],
    "huge": lambda: [torch.full((4, 3, WIDTH), 3e38)],
    "zeros": lambda: [torch.zeros(4, 3, WIDTH)],
    "one token": lambda: [torch.ones(1, 1, WIDTH)],
    "another key": lambda: [{"y": torch.ones(4, 3, WIDTH)}],
    "by name": lambda: [{"x": torch.ones(4, 3, WIDTH)}],
    "more than the model takes": lambda: [(torch.ones(4, 3, WIDTH), torch.ones(4))],
    "of several kinds": lambda: [*batches(), None],
    "breaks off": broken,
    "a generator": lambda: (batch for batch in batches()),
    "in inference mode": lambda: _in_inference_mode(batches),
    "requires a gradient": lambda: [b.requires_grad_() for b in batches()],
}


def _in_inference_mode(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


PATTERNS: Mapping[str, Any] = {
    "of other words": "two of four",
    "empty": "",
    "none": None,
    "a number": 0.5,
    "more than all": "unstructured:1.5",
    "of nothing": "0:4",
    "of none": "2:0",
    "kept whole": "4:4",
    "wider than it": "8:64",
    "of odd width": "2:5",
    "large blocks": "block:64x64@0.5",
    "no blocks": "block:0x0@0.5",
    "in full": "unstructured:1.0",
    "not at all": "unstructured:0",
    "no selectors": {},
    "a selector of nothing": {"nothing": "2:4"},
    "a model": nn.Linear(2, 2),
    "a list": ["2:4"],
}


# --- verbs ---------------------------------------------------------------------------------------


def _loss(model: nn.Module) -> float:
    return float(answer(model, batches()[0], "the batch").float().square().mean())


def _parameters(model: Any) -> Any:
    return model.parameters() if isinstance(model, nn.Module) else dense().parameters()


Call = Callable[[Any, Any, Any, Path], Any]

# A verb takes the model, a pattern, batches and a folder, and uses the ones that it needs.
CALLS: Mapping[str, Call] = {
    "plan": lambda m, p, b, f: sc.plan(m, p),
    "inspect": lambda m, p, b, f: inspect(m),
    "prune_": lambda m, p, b, f: sc.prune_(m, p),
    "prune_ wanda": lambda m, p, b, f: sc.prune_(m, p, sc.wanda, b),
    "reconstruct_": lambda m, p, b, f: sc.reconstruct_(m, p, sc.sparsegpt, b),
    "best": lambda m, p, b, f: sc.reconstruct_(m, p, sc.best, b),
    "distil_": lambda m, p, b, f: sc.distil_(m, dense(), b, steps=1),
    "permute_": lambda m, p, b, f: permute_(m, p, sc.magnitude, b),
    "decompose_": lambda m, p, b, f: decompose_(m, p, sc.sparsegpt, b, f / "adapter", rank=1),
    "pack_": lambda m, p, b, f: sc.pack_(m, "bitmap"),
    "unpack_": lambda m, p, b, f: sc.unpack_(m),
    "sensitivity": lambda m, p, b, f: sensitivity(m, [p], _loss),
    "save": lambda m, p, b, f: save(m, f / "saved"),
    "hold": lambda m, p, b, f: sc.hold(m, torch.optim.SGD(_parameters(m), lr=0.1)),
}
PRUNES = ("prune_", "prune_ wanda", "reconstruct_", "best")
READS = ("plan", "inspect", "sensitivity", "save")


# --- the law -------------------------------------------------------------------------------------


def snapshot(model: Any) -> dict[str, Any]:
    """As `everything`, even for a model that has tensors without values, or is no model."""
    if not isinstance(model, nn.Module):
        return {"tensors": {}}
    found = everything(model)
    found["tensors"] = {n: as_bytes(t) for n, t in found["tensors"].items()}
    return found


def as_bytes(tensor: Any) -> Tensor:
    """A key for the tensor's exact bits, NaN and the sign of zero included."""
    if tensor.is_meta:
        return torch.empty(0)
    if tensor.is_quantized:
        return tensor.int_repr()
    plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return plain.clone().contiguous().flatten().view(torch.uint8)


def fault(name: str, model: Any, pattern: Any, data: Any, folder: Path) -> str | None:
    """What is wrong with the verb's response to this; None if nothing is."""
    before = snapshot(model)
    weights = _weights(model)
    try:
        CALLS[name](model, pattern, data, folder)
    except ValueError as error:
        said = str(error)
        if "\n" in said.strip() and not said.startswith("the plan cannot"):
            return f"says in several lines: {said!r}"
        left = differences(before, snapshot(model))
        return f"raises ({said}) and has changed {left}" if left else None
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"
    if name in READS:
        left = differences(before, snapshot(model))
        return f"has changed {left}" if left else None
    if name not in PRUNES:
        return None
    return _pruned_wrong(name, model, pattern, weights)


def _weights(model: Any) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return {}
    return {n: p.detach().clone() for n, p in model.named_parameters() if not is_lazy(p)}


def _pruned_wrong(name: str, model: Any, pattern: Any, before: dict[str, Tensor]) -> str | None:
    """What in the model breaks the contract of pruned models."""
    sc.check(model, pattern)
    now = dict(model.named_parameters())
    planned = {f"{layer}.weight".lstrip(".") for layer in sc.plan(model, pattern).layers}
    for key, old in before.items():
        new, key = now[key].detach(), key.removeprefix("_orig_mod.").removeprefix("module.")
        if old.is_meta:
            continue
        if key not in planned:
            same = torch.equal(as_bytes(old), as_bytes(new))
        elif name.startswith("prune_"):
            kept = new != 0
            same = torch.equal(old[kept], new[kept])
        else:
            same = bool(new.isfinite().all())
        if not same:
            return f"has changed {key}"
    return None


def _models(verb: str, model: str, folder: Path) -> str | None:
    return fault(verb, MODELS[model](), "2:4", batches(), folder)


def _batches(verb: str, data: str, folder: Path) -> str | None:
    return fault(verb, pruned(), "2:4", BATCHES[data](), folder)


def _patterns(verb: str, pattern: str, folder: Path) -> str | None:
    return fault(verb, dense(), PATTERNS[pattern], batches(), folder)


WITH_DATA = ("prune_ wanda", "reconstruct_", "best", "distil_", "permute_", "decompose_")
WITH_PATTERN = (
    "plan",
    "prune_",
    "prune_ wanda",
    "reconstruct_",
    "permute_",
    "decompose_",
    "sensitivity",
)
GRIDS: Mapping[str, tuple[Any, Any, Any]] = {
    "models": (_models, tuple(CALLS), MODELS),
    "batches": (_batches, WITH_DATA, BATCHES),
    "patterns": (_patterns, WITH_PATTERN, PATTERNS),
}


def report(folder: str) -> None:
    """Try a seeded sample of each grid, or all of it if many are asked for; print what is wrong."""
    tried, wrong = 0, []
    warnings.simplefilter("ignore")
    for name, (call, verbs, others) in GRIDS.items():
        grid = [(verb, other) for verb in verbs for other in others]
        for verb, other in random.Random(name).sample(grid, min(len(grid), 12 * TRIED)):
            own = Path(folder) / str(tried)
            own.mkdir()
            tried += 1
            if why := call(verb, other, own):
                wrong.append(f"{name}, {verb}, {other}: {why}")
    print(json.dumps({"tried": tried, "wrong": wrong}))


def test_odd_inputs(tmp_path: Path) -> None:
    """In a process of its own, without the runtime type checks of the tests."""
    code = "import sys; from tests.faults.test_odd_inputs import report; report(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == [] and found["tried"] > 10 * TRIED
