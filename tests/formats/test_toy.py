"""A format of one's own, all of it in this file, through every verb; nothing else knows it."""

import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

import secateur as sc
from secateur.accelerate.verb import _accelerate
from secateur.core.undo import Undo
from secateur.formats import Format, SparseLinear, describe, empty_from, parse_format
from secateur.formats.contract import Implementation, Packed, dense_shape
from secateur.formats.kernels.timing import Timing
from secateur.formats.op import register
from secateur.formats.reference import REFERENCE, anywhere

ROOT = Path(__file__).parents[2]


def kept_rows(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Multiplies by the rows that are stored, and leaves the bias where there are none."""
    result = x.new_zeros(len(x), packed.shape[0])
    result[:, packed["rows"].long()] = dense_linear(x, packed["values"])
    return result if bias is None else result + bias


@dataclass(frozen=True)
class Rows(Format):
    """The rows that are not all zero, and which they are."""

    name = "rows"
    tensors = ("values", "rows")
    implementations = (Implementation("kept", kept_rows, anywhere), REFERENCE)
    is_exact = True

    def why_not(self, weight: Tensor) -> str | None:
        return "no row is zero" if bool((weight != 0).any(1).all()) else None

    def density(self, weight: Tensor) -> float:
        return float((weight != 0).any(1).float().mean())

    def pack(self, weight: Tensor) -> Packed:
        shape = dense_shape(weight)
        keep = (weight != 0).any(1)
        tensors = {"values": weight[keep], "rows": keep.nonzero()[:, 0].int()}
        return Packed(self, shape, weight.dtype, tensors)

    def unpack(self, packed: Packed) -> Tensor:
        dense = packed["values"].new_zeros(packed.shape)
        dense[packed["rows"].long()] = packed["values"]
        return dense

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        values = torch.zeros(stored, shape[1], dtype=dtype)
        tensors = {"values": values, "rows": torch.arange(stored).int()}
        return Packed(self, shape, dtype, tensors)

    def why_broken(self, packed: Packed) -> str | None:
        rows = packed["rows"]
        inside = bool(((rows >= 0) & (rows < packed.shape[0])).all())
        return None if inside else "rows are none of the weight's"


ROWS = Rows()


def model_of_rows() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    for layer in (model[0], model[2]):
        layer.weight.data[::2] = 0
    return model


def packed_model() -> tuple[nn.Sequential, Tensor, Tensor]:
    """The model, an input and what the dense model makes of it."""
    model, x = model_of_rows(), torch.randn(5, 24)
    y = model(x).detach()
    sc.pack_(model, ROWS)
    return model, x, y


def test_it_is_a_format() -> None:
    assert isinstance(ROWS, Format)
    assert parse_format(ROWS) is ROWS and parse_format("rows", (ROWS,)) is ROWS
    with pytest.raises(ValueError, match="unknown format 'rows'"):
        parse_format("rows")


def test_it_is_packed_and_unpacked() -> None:
    model, x, y = packed_model()
    assert isinstance(model[0], SparseLinear) and model[0].dispatch == "kept"
    assert torch.allclose(model(x), y, atol=1e-6)
    weight = model_of_rows()[0].weight
    assert torch.equal(model[0].weight, weight)
    sc.unpack_(model)
    assert torch.equal(model[0].weight, weight)


def test_gradients_reach_the_input_and_the_bias() -> None:
    model, x, _ = packed_model()
    dense, grads = model_of_rows(), []
    for one in (model, dense):
        grads.append(torch.autograd.grad(one(x).square().sum(), (one[0].bias, one[2].bias)))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_it_is_measured_and_chosen_by_value() -> None:
    model = model_of_rows()

    def clock(variants: Mapping[str, object], device: torch.device) -> dict[str, Timing]:
        times = {name: 1.0 if name == "rows kept" else 10.0 for name in variants}
        return {name: Timing(us, us, us, rounds=20) for name, us in times.items()}

    report = _accelerate(Undo(), model, (1, 16), (ROWS, "csr"), None, False, clock)
    assert [layer.format for layer in report.layers] == ["rows", "rows"]
    assert "rows kept" in str(report)


def test_a_state_dict_fills_a_layer_that_was_described() -> None:
    model, x, _ = packed_model()
    layer = model[0]
    other = empty_from(describe(layer), "0", (ROWS,))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and other.format == ROWS
    damaged = layer.state_dict() | {"rows": torch.full((16,), 99, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match="rows are none of the weight's"):
        other.load_state_dict(damaged)


def test_it_is_saved_and_loaded_where_it_is_handed_in(tmp_path: Path) -> None:
    model, x, _ = packed_model()
    sc.save(model, tmp_path / "saved")
    loaded = sc.load(tmp_path / "saved", model_of_rows(), formats=(ROWS,))
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="unknown format 'rows'"):
        sc.load(tmp_path / "saved", model_of_rows())


def test_it_is_copied_and_pickled(tmp_path: Path) -> None:
    model, x, _ = packed_model()
    torch.save(model, tmp_path / "model.pt")
    for other in (deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(x), model(x)) and other[0].format == ROWS


def test_a_name_is_of_one_kind_of_format() -> None:
    @dataclass(frozen=True)
    class Other(Rows):  # type: ignore[misc]
        tensors = ("values",)  # type: ignore[assignment]

    register(ROWS)
    with pytest.raises(ValueError, match="'rows' belongs to Rows"):
        register(Other())
    assert isinstance(sc.pack_(model_of_rows(), ROWS).layers[0][1], str)


def check_compiled() -> None:
    model, x, _ = packed_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    program = torch.export.export(model.eval(), (x,))
    assert torch.equal(program.module()(x), model(x))


def test_it_is_compiled_and_exported_in_a_plain_process() -> None:
    """Dynamo and the runtime checks of shapes do not mix; see test_compile.py."""
    code = "from tests.formats.test_toy import check_compiled; check_compiled()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
