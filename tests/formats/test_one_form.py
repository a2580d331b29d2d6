"""A layer that holds its weight as a kernel reads it, once: all that a user can call still works.

The decode kernel is said to run here. Nothing calls it: above its tokens the reference runs.
"""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from secateur.formats import SparseLinear, pack_, unpack_
from secateur.formats.kernels import decode24
from secateur.formats.linear import describe, empty_from
from tests.formats.weights import fitting_weight, tokens_in

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")

FORMATS = (
    *("semi24", "semi24_int4", "semi24_int4:channel", "semi24_int8", "semi24_fp8"),
    *("int4", "int4:channel", "int8"),
)
SHAPE = (32, 320)  # two units of 128 columns and half of one
MOST = 64


@pytest.fixture(autouse=True)
def decode(monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(
        shape: tuple[int, int], dtype: torch.dtype, device: torch.device, tokens: int
    ) -> str | None:
        able = dtype.itemsize == 2 and device.type == "cpu" and tokens <= MOST
        return None if able else "it runs at most 64 tokens, in 16 bits, here"

    monkeypatch.setattr(decode24, "why_not", why_not)


def packed(format: str, dtype: torch.dtype = torch.bfloat16) -> SparseLinear:
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype))
    model[0].weight.data.copy_(fitting_weight(format, *SHAPE, dtype))
    model[0].bias.data.copy_(tokens_in(SHAPE[0], seed=3))
    pack_(model, format)
    return model[0]  # type: ignore[return-value]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return list(found) == list(wanted) and all(
        found[name].dtype == t.dtype and torch.equal(bits(found[name]), bits(t))
        for name, t in wanted.items()
    )


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_holds_the_weight_once(format: str, dtype: torch.dtype) -> None:
    layer = packed(format, dtype)
    assert layer.dispatch == "decode<=64 reference"
    assert set(layer.held_bytes) <= {"units", "scales"} and "units" in layer.held_bytes
    padding = 384 / 320  # half a unit is filled with zeros
    assert layer.nbytes <= padding * layer.stored_bytes
    assert not dict(layer.named_buffers()).keys() & {"values", "metadata"}


def test_what_is_stored_is_what_was_packed(format: str) -> None:
    """Whatever asks for it: `packed`, `state_dict`, files, `weight`."""
    layer = packed(format)
    weight = fitting_weight(format, *SHAPE, torch.bfloat16)
    wanted = dict(layer.format.pack(weight).tensors)
    assert same(dict(layer.packed.tensors), wanted)
    state = layer.state_dict()
    assert list(state) == ["bias", *wanted]
    assert same({name: state[name] for name in wanted}, wanted)
    assert torch.equal(layer.weight, layer.format.pack(weight).dense())
    assert layer.stored_bytes == sum(tensor.nbytes for tensor in wanted.values())


def test_files_and_dicts_fill_another(format: str, tmp_path: Path) -> None:
    layer = packed(format)
    x = tokens_in(MOST + 1, SHAPE[1], dtype=torch.bfloat16)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    for state in (
        layer.state_dict(),
        load_file(tmp_path / "layer.safetensors"),
        torch.load(buffer, weights_only=True),
    ):
        other = empty_from(describe(layer))
        assert other.load_state_dict(state).missing_keys == []
        assert other.dispatch == layer.dispatch and other.held_bytes == layer.held_bytes
        assert torch.equal(other(x), layer(x))
        layer.load_state_dict(state, assign=True)
        assert layer.held_bytes == other.held_bytes and torch.equal(other(x), layer(x))


def test_copies_hold_as_much_and_are_separate(format: str) -> None:
    layer = packed(format)
    x = tokens_in(MOST + 1, SHAPE[1], dtype=torch.bfloat16)
    expected = layer(x)
    layer.use((("decode", 8), ("reference", None)))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.dispatch == "decode<=8 reference"
        assert other.held_bytes == layer.held_bytes and torch.equal(other(x), expected)
        other.get_buffer("units").zero_()
        assert torch.equal(layer(x), expected)


def test_a_pickle_holds_what_is_stored_and_loads_where_no_kernel_runs(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = packed(format)
    wanted, text = dict(layer.packed.tensors), pickle.dumps(layer)
    monkeypatch.setattr(decode24, "why_not", lambda *case: "there is no GPU")
    other = pickle.loads(text)
    assert other.dispatch == "reference" and set(other.held_bytes) == set(wanted)
    assert same(dict(other.packed.tensors), wanted)


def test_a_cast_is_that_of_what_is_stored(format: str) -> None:
    layer, plain = packed(format), packed(format)
    plain.use((("reference", None),))
    assert not same(dict(plain.held.tensors), dict(layer.held.tensors))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        layer.to(dtype)
        plain.to(dtype)
        assert layer.dtype == layer.packed.dtype == dtype == plain.dtype
        assert ("units" in layer.held_bytes) == (dtype.itemsize == 2)
        assert same(dict(layer.packed.tensors), dict(plain.packed.tensors))


def test_a_move_that_moves_nothing_leaves_the_memory_alone(format: str) -> None:
    """A captured graph reads it there."""
    layer = packed(format)
    before = layer.get_buffer("units").data_ptr()
    layer.to("cpu").to(torch.bfloat16).cpu().train().eval()
    assert layer.get_buffer("units").data_ptr() == before


def test_by_way_of_the_meta_device(format: str) -> None:
    layer = packed(format)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    held = layer.held_bytes
    layer.to("meta")
    assert "units" not in layer.held_bytes
    layer.to_empty(device="cpu").load_state_dict(state)
    assert layer.held_bytes == held and same(layer.state_dict(), state)


def test_a_damaged_checkpoint_leaves_it_as_it_was(format: str) -> None:
    layer = packed(format)
    held = {name: tensor.clone() for name, tensor in layer.held.tensors.items()}
    state = dict(layer.state_dict())
    if "metadata" in state:
        name, damage, told = "metadata", 0, "are not two ascending"
    else:
        name, damage, told = "values", -128, "hold the code -"  # -8 in 4 bits
    state[name] = torch.full_like(state[name].view(torch.int8), damage).view(state[name].dtype)
    with pytest.raises(RuntimeError, match=told):
        layer.load_state_dict(state)
    assert same(dict(layer.held.tensors), held) and layer.dispatch == "decode<=64 reference"


def test_gradients_are_those_of_the_dense_layer(format: str) -> None:
    layer = packed(format)
    x = tokens_in(MOST + 1, SHAPE[1], dtype=torch.bfloat16).requires_grad_()
    up = tokens_in(MOST + 1, SHAPE[0], dtype=torch.bfloat16, seed=5)
    x_grad, bias_grad = torch.autograd.grad(layer(x), (x, layer.bias), up)
    assert torch.equal(x_grad, up @ layer.weight) and torch.equal(bias_grad, up.sum(0))


def test_under_autocast_to_another_type(format: str) -> None:
    layer, plain = packed(format), packed(format)
    plain.use((("reference", None),))
    x = tokens_in(MOST + 1, SHAPE[1])
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(layer(x), plain(x))


def test_unpacked_it_is_the_dense_layer(format: str, tmp_path: Path) -> None:
    layer = packed(format)
    model = nn.Sequential(layer)
    weight = layer.packed.dense()
    sc.save(model, tmp_path / "folder")
    again = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], dtype=torch.bfloat16))
    sc.load(tmp_path / "folder", again)
    assert again[0].held_bytes == layer.held_bytes  # type: ignore[union-attr]
    unpack_(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, weight)
