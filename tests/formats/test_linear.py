"""`SparseLinear`: results, errors, saving, moving, loading, and what runs."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.formats import SparseLinear, describe, empty_from, parse_format
from secateur.formats.contract import Arrangement, Implementation, Packed
from secateur.formats.format import dequantised
from secateur.formats.reference import REFERENCE, anywhere
from tests.formats.weights import (
    DYNAMIC,
    EXACT,
    FORMATS,
    QUANTISED,
    allowed_error,
    exact_linear,
    fitting_weight,
    sparse_linear,
    tokens_in,
    used_inputs,
)
from tests.toy import Toy

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")


def is_right(layer: SparseLinear, x: Tensor) -> bool:
    """Whether the layer's result is within the budget of its own dense weight."""
    weight, bias, meant = layer.weight.clone(), layer.bias, dequantised(layer.packed)
    flat = x.reshape(-1, layer.in_features)
    result = layer(x).detach()
    assert result.shape == (*x.shape[:-1], layer.out_features)
    assert result.is_contiguous()
    exact = exact_linear(used_inputs(str(layer.format), flat), meant, bias)
    error = (result.reshape(-1, layer.out_features) - exact).abs().max()
    return float(error) <= allowed_error(flat, weight, bias, meant)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (20, 24), (2, 3, 24), (2, 1, 3, 24)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_of_any_rank(format: str, shape: tuple[int, ...]) -> None:
    assert is_right(sparse_linear(format), tokens_in(*shape))
    assert is_right(sparse_linear(format, bias=False), tokens_in(*shape))


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_that_are_not_contiguous(format: str) -> None:
    layer = sparse_linear(format)
    for x in (tokens_in(24, 5).t(), tokens_in(5, 48)[:, ::2], tokens_in(3, 24, 4).transpose(1, 2)):
        assert not x.is_contiguous()
        assert is_right(layer, x)


@pytest.mark.parametrize("format", FORMATS)
def test_no_tokens(format: str) -> None:
    layer = sparse_linear(format)
    x = torch.zeros(2, 0, 24, requires_grad=True)
    result = layer(x)
    assert result.shape == (2, 0, 16)
    result.sum().backward()
    assert x.grad is not None and x.grad.shape == (2, 0, 24)


def test_an_input_of_another_dtype_is_refused() -> None:
    layer = sparse_linear("semi24")
    with pytest.raises(ValueError) as error:
        layer(tokens_in(2, 24, dtype=torch.bfloat16))
    assert str(error.value) == (
        "SparseLinear 'layer' needs float32 input, got bfloat16: "
        "cast the input, or the layer with .to(torch.bfloat16)"
    )


@pytest.mark.parametrize("shape", [(2, 23), (25,), (24, 2)], ids=str)
def test_an_input_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        sparse_linear("csr")(tokens_in(*shape))
    assert f"SparseLinear 'layer' needs input of width 24, got shape {shape}" in str(error.value)


def test_an_input_without_width_is_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"needs input of width 24, got shape \(\)"):
        sparse_linear("csr")(torch.tensor(1.0))


def test_it_is_a_linear_whose_weight_cannot_be_assigned() -> None:
    layer = sparse_linear("semi24")
    assert isinstance(layer, nn.Linear)
    for value in (nn.Parameter(torch.zeros(16, 24)), torch.zeros(16, 24)):
        with pytest.raises(ValueError, match=r"'layer' needs its weight left packed, got an ass"):
            layer.weight = value
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_weight_is_the_dense_one(format: str) -> None:
    assert torch.equal(sparse_linear(format).weight, fitting_weight(format, 16, 24))


@pytest.mark.parametrize("format", FORMATS)
def test_training_reaches_the_bias_and_an_adapter_but_no_packed_tensor(format: str) -> None:
    layer = sparse_linear(format)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        down, up = nn.Linear(24, 2, bias=False), nn.Linear(2, 16, bias=False)
        model = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
    x, target = tokens_in(8, 24), tokens_in(8, 16, seed=5)
    weight = layer.weight.clone()
    parameters = [*model.parameters(), *down.parameters(), *up.parameters(), *layer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    losses = []
    for _ in range(30):
        hidden = model(x)
        loss = (layer(hidden) + up(down(hidden)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("format", FORMATS)
def test_the_input_gradient_is_that_of_the_dense_layer(format: str) -> None:
    layer = sparse_linear(format)
    x, up = tokens_in(2, 3, 24), tokens_in(2, 3, 16, seed=6)
    grads = []
    for run in (layer, lambda x: nn.functional.linear(x, layer.weight.clone(), layer.bias)):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(run(leaf), (leaf, layer.bias), up))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-5)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_copies_are_equal_and_separate(format: str) -> None:
    layer, x = sparse_linear(format), tokens_in(5, 24)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        other._buffers["values"].zero_()
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_state_dict_restores_it(format: str, tmp_path: Path) -> None:
    layer, x = sparse_linear(format, seed=0), tokens_in(5, 24)
    state = layer.state_dict()
    assert list(state) == ["bias", *layer.packed.tensors]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    save_file(state, tmp_path / "layer.safetensors")
    for saved in (
        state,
        torch.load(buffer, weights_only=True),
        load_file(tmp_path / "layer.safetensors"),
    ):
        other = empty_from(describe(layer))
        assert other.load_state_dict(saved).missing_keys == []
        assert torch.equal(other(x), layer(x))
        assert other.dispatch == layer.dispatch


def test_loading_rebuilds_the_arrangement() -> None:
    """Same sizes, other positions: a stale arrangement would scatter to the wrong rows."""
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    first[0:4] = 1.0
    second[4:8] = 2.0
    layer, other = (
        SparseLinear(parse_format("block:4x4").pack(weight)) for weight in (first, second)
    )
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(torch.eye(8)), second.t())
    layer = SparseLinear(parse_format("block:4x4").pack(first))
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(torch.eye(8)), second.t())


def spoilt(layer: SparseLinear, key: str) -> dict[str, object]:
    """What may stand in the place of one tensor of a layer and is none of its kind."""
    right = layer.state_dict()[key]
    found: dict[str, object] = {
        "longer": torch.cat((right, right[:1])),
        "flat": right.flatten()[None, None],
        "a scalar": right.flatten()[0].clone(),
        "empty": right[:0],
        "complex": right.to(torch.complex64),
        "bool": right.bool(),
        "sparse": right.to_sparse(),
        "no data": right.to("meta"),
        "no tensor": right.tolist(),
    }
    if not right.is_floating_point():
        found["float"] = right.float()
        found["wide"] = right.long()
    elif key != "bias":
        found["bits"] = right.to(torch.int32)
    if key in ("crow_indices", "col_indices"):
        found |= {f"{n} in place of one": _with_first(right, n) for n in (-1, 2**30, -(2**31))}
    if key == "crow_indices":
        found["falling"] = right.flip(0)
        found["equal"] = torch.full_like(right, int(right[-1]))
        found["past int32"] = _wrapping(right)
    if key == "metadata" and "semi48" in str(layer.format):
        found["three columns"], found["five columns"] = right & right - 1, right | right + 1
    elif key == "metadata":
        found["one column twice"] = right & 0b11001100 | (right & 0b11001100) >> 2
        found["falling"] = (right & 0b11001100) >> 2 | (right & 0b00110011) << 2
    if key == "bitmask":
        found["other counts"] = ~right
    if key == "scales":
        found |= {str(x): torch.full_like(right, x) for x in (float("nan"), float("inf"))}
    if key == "values" and "int8" in str(layer.format):
        found["no code"] = torch.full_like(right, -128)
    if key == "values" and "int4" in str(layer.format):
        found["no code"] = torch.full_like(right, 0x88)
    if key == "values" and "fp8" in str(layer.format):
        found["no code"] = torch.full_like(right, 0x7F)
    return found


def _with_first(right: Tensor, number: int) -> Tensor:
    changed = right.clone()
    changed[len(right) // 2] = number
    return changed


def _wrapping(right: Tensor) -> Tensor:
    """Rises by less than 2^31 each time, if differences are taken in 32 bits, around the end."""
    changed = right.clone()
    changed[1:4] = torch.tensor([2**31 - 1, -(2**31), -1], dtype=torch.int32)
    return changed


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [False, True])
def test_a_refused_state_dict_leaves_the_layer_as_it_was(
    format: str, strict: bool, assign: bool
) -> None:
    layer, x = sparse_linear(format), tokens_in(5, 24)
    before, dispatch, expected = copy.deepcopy(layer.state_dict()), layer.dispatch, layer(x)
    other = sparse_linear(format, seed=0)
    with torch.no_grad():
        other.bias += 1
    for key in before:
        for what, tensor in spoilt(layer, key).items():
            state = other.state_dict() | {key: tensor}
            with pytest.raises(RuntimeError, match=f"SparseLinear 'layer' cannot use .*{key}"):
                layer.load_state_dict(state, strict=strict, assign=assign)
            assert layer.dispatch == dispatch
            for name, own in layer.state_dict().items():
                assert torch.equal(own, before[name]) and own.dtype == before[name].dtype
            assert torch.equal(layer(x), expected), what
    layer.load_state_dict(other.state_dict(), strict=strict, assign=assign)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("format", FORMATS)
def test_half_of_a_packed_weight_is_refused(format: str) -> None:
    layer, other = sparse_linear(format), sparse_linear(format)
    with torch.no_grad():
        other.bias += 1
    before, x = copy.deepcopy(layer.state_dict()), tokens_in(5, 24)
    for key in layer.packed.tensors:
        lacking = {name: t for name, t in other.state_dict().items() if name != key}
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=rf"it has \w+ and lacks {key}, of one packed"):
                layer.load_state_dict(lacking, strict=strict)
            assert torch.equal(layer.bias, before["bias"])
    found = layer.load_state_dict({"bias": other.bias, "extra": torch.zeros(1)}, strict=False)
    assert found.missing_keys == list(layer.packed.tensors) and found.unexpected_keys == ["extra"]
    assert torch.equal(layer(x), other(x))


def test_bits_of_columns_that_a_weight_lacks_are_refused() -> None:
    weight = torch.zeros(4, 12)
    weight[:, ::4] = 1.0
    for format, key in (("bitmap", "bitmask"), ("semi24", "metadata"), ("semi24_int8", "metadata")):
        layer = SparseLinear(parse_format(format).pack(weight), None, "layer")
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        state[key][2, -1] |= 0x80
        with pytest.raises(
            RuntimeError, match=rf"{key} \w+ columns from 12 on, which the weight la"
        ):
            layer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_in_another_precision_is_cast_as_a_dense_one(
    format: str, dtype: torch.dtype
) -> None:
    layer, other = sparse_linear(format), sparse_linear(format).to(dtype)
    layer.load_state_dict(other.state_dict())
    assert layer.packed.dtype == torch.float32
    assert torch.equal(layer.weight, other.float().weight)


def test_a_dense_state_dict_is_refused_with_advice() -> None:
    model = nn.Sequential(sparse_linear("semi24"), nn.Linear(16, 2))
    dense = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 2))
    with pytest.raises(RuntimeError, match=r"holds a dense 0.weight: load it into unpack_\(model"):
        model.load_state_dict(dense.state_dict())


def test_another_layer_s_error_is_no_error_of_this_one() -> None:
    """A load tells all its errors in one list; this layer was filled, so it must be arranged."""
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    first[0:4], second[4:8] = 1.0, 2.0
    model, other = (
        nn.Sequential(nn.Linear(3, 8), SparseLinear(parse_format("block:4x4").pack(weight)))
        for weight in (first, second)
    )
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(other.state_dict() | {"0.weight": torch.zeros(1, 1)})
    assert "size mismatch for 0.weight" in str(error.value)
    assert "cannot use the checkpoint" not in str(error.value)
    assert torch.equal(model[1](torch.eye(8)), second.t())


def test_a_mismatch_of_sizes_is_told_once() -> None:
    layer, other = sparse_linear("csr"), sparse_linear("csr", seed=7)
    assert len(layer.values) != len(other.values)
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(other.state_dict())
    assert str(error.value).count("values needs shape") == 1
    assert "size mismatch" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", EXACT)
def test_casting_is_casting_the_dense_weight(format: str, dtype: torch.dtype) -> None:
    layer = sparse_linear(format)
    dense = layer.weight.clone()
    assert layer.to(dtype) is layer
    assert torch.equal(layer.weight, dense.to(dtype))
    assert is_right(layer, tokens_in(5, 24, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", QUANTISED + DYNAMIC)
def test_casting_a_quantised_layer_casts_its_scales_alone(format: str, dtype: torch.dtype) -> None:
    layer = sparse_linear(format)
    before = {name: tensor.clone() for name, tensor in layer.packed.tensors.items()}
    assert layer.to(dtype) is layer
    after = layer.packed.tensors
    assert layer.packed.dtype == layer.weight.dtype == dtype
    assert torch.equal(after["scales"], before["scales"].to(dtype))
    for name in after.keys() - {"scales"}:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name])
    assert torch.equal(layer.weight, dequantised(layer.packed).to(dtype))
    assert is_right(layer, tokens_in(5, 24, dtype=dtype))


def test_casting_chooses_again() -> None:
    layer = sparse_linear("csr")
    assert layer.dispatch == "torch_csr"
    layer.to(torch.bfloat16)
    assert layer.dispatch == "reference"
    layer.to(torch.float32)
    assert layer.dispatch == "torch_csr"


def test_moving_nowhere_keeps_a_choice() -> None:
    layer = sparse_linear("block:4x8")
    layer.use((("cpu", 4), ("reference", None)))
    layer.to(torch.float32).to("cpu").float()
    assert layer.dispatch == "cpu<=4 reference"


@pytest.mark.parametrize("format", FORMATS)
def test_the_meta_device_and_back(format: str) -> None:
    layer, x = sparse_linear(format), tokens_in(5, 24)
    state, expected = copy.deepcopy(layer.state_dict()), layer(x)
    layer.to("meta")
    assert layer(x.to("meta")).shape == (5, 16)
    layer.to_empty(device="cpu")
    assert layer.dispatch == "reference"
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)
    layer.to("meta").load_state_dict(state, assign=True)
    assert torch.equal(layer(x), expected)


def negated(packed: Packed) -> dict[str, Tensor]:
    return {"negated": -packed["values"]}


def from_negated(packed: Packed) -> dict[str, Tensor]:
    return {"values": -packed["negated"]}


def minus(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(-x[:, ::2], packed["negated"], bias)


def through(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, packed["opaque"], bias)


WHOLE = Arrangement(("negated",), negated, from_negated)
OPAQUE = Arrangement(("opaque",), lambda packed: {"opaque": packed.dense()})
MIXED = Toy(
    "mixed",
    (
        Implementation("minus", minus, anywhere, WHOLE),
        Implementation("through", through, anywhere, OPAQUE),
        Implementation("reference", REFERENCE.linear, anywhere),
    ),
)


def test_no_default_holds_a_copy_beside_the_weight() -> None:
    """Preferred and able to run, but for a table alone."""
    through, reference = MIXED.implementations[1:]
    format = Toy("opaque_first", (through, reference))
    layer = SparseLinear(format.pack(torch.zeros(6, 8)))
    assert layer.dispatch == "reference" and set(layer.held_bytes) == {"values"}
    layer.use((("through", None),))
    assert set(layer.held_bytes) == {"values", "opaque"}


@given(
    st.lists(st.lists(st.sampled_from(("minus", "through", "reference")), min_size=1), max_size=5)
)
def test_any_table_can_follow_any_other(tables: list[list[str]]) -> None:
    """The same results and the same checkpoint, and the weight once unless it is read otherwise."""
    weight = tokens_in(6, 8)
    weight[:, 1::2] = 0
    layer, x = SparseLinear(MIXED.pack(weight)), tokens_in(9, 8)
    for names in tables:
        rows = [(name, limit) for limit, name in enumerate(names[:-1], 1)]
        layer.use((*rows, (names[-1], None)))
        assert torch.allclose(layer(x), x @ weight.t(), atol=1e-5)
        assert torch.equal(layer.state_dict()["values"], weight[:, ::2])
        held = {"negated"} if "minus" in names else {"values"}
        assert set(layer.held_bytes) == held | ({"opaque"} if "through" in names else set())


def test_use_names_what_runs() -> None:
    layer, x = sparse_linear("block:4x8"), tokens_in(5, 24)
    assert layer.dispatch == "cpu" and "block_rows" in dict(layer.named_buffers())
    layer.use((("reference", None),))
    assert layer.dispatch == "reference" and list(dict(layer.named_buffers())) == [
        *layer.packed.tensors
    ]
    assert is_right(layer, x)
    layer.use((("cpu", 4), ("reference", None)))
    assert layer.dispatch == "cpu<=4 reference"
    assert "block_rows" not in layer.state_dict()
    assert is_right(layer, x) and is_right(layer, x[:2])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((), "ascending limits that end with None"),
        ((("cpu", 4),), "ascending limits that end with None"),
        ((("cpu", None), ("reference", None)), "ascending limits that end with None"),
        ((("cpu", 8), ("reference", 4), ("cpu", None)), "ascending limits"),
        ((("cpu", 0), ("reference", None)), "ascending limits"),
        ((("gpu", None),), "block:4x8 has no implementation 'gpu': it has decode, prefill, "),
    ],
)
def test_use_refuses_other_tables(table: tuple[tuple[str, int | None]], message: str) -> None:
    layer = sparse_linear("block:4x8")
    with pytest.raises(ValueError, match=message):
        layer.use(table)
    assert layer.dispatch == "cpu"


def test_use_refuses_what_cannot_run_here() -> None:
    layer = sparse_linear("csr", dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="'layer' cannot run torch_csr here: csr torch_csr needs f"
    ):
        layer.use((("torch_csr", None),))


def test_its_text_says_what_it_is() -> None:
    assert repr(sparse_linear("block:4x8")) == (
        "SparseLinear(in_features=24, out_features=16, bias=True, format=block:4x8, runs=cpu)"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_description_is_plain_data(format: str) -> None:
    description = describe(sparse_linear(format, dtype=torch.bfloat16, bias=False))
    assert description["format"] == format and description["dtype"] == "bfloat16"
    assert (description["out_features"], description["in_features"]) == (16, 24)
    assert description["bias"] is False and type(description["stored"]) is int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "semi25"}, "did you mean 'semi24'"),
        ({"stored": "16"}, "a packed layer's stored needs a int, got '16'"),
        ({"stored": True}, "a packed layer's stored needs a int, got True"),
        ({"stored": -1}, "a packed layer's stored needs a int, got -1"),
        ({"stored": 17}, "16 rows of a multiple of 4 inputs, got 17"),
        ({"dtype": "int8"}, "dtype needs to be one of float16, bfloat16, float32, float64, got"),
        ({"bias": 1}, "a packed layer's bias needs a bool, got 1"),
        ({"module": "os"}, "needs the keys format, out_features, in_features, bias, dtype, stored"),
    ],
)
def test_a_damaged_description_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        empty_from(describe(sparse_linear("semi24")) | change)
    assert message in str(error.value)


def test_nbytes_are_those_of_what_is_held() -> None:
    """The row of each block in the place of where each row of blocks starts."""
    layer = sparse_linear("block:4x8")
    stored = sum(tensor.nbytes for tensor in layer.packed.tensors.values())
    blocks, row_blocks = len(layer.packed["values"]), 16 // 4
    assert layer.dispatch == "cpu" and layer.stored_bytes == stored
    assert layer.nbytes == stored + 4 * blocks - 4 * (row_blocks + 1)
    layer.use((("reference", None),))
    assert layer.nbytes == stored
    layer.use((("cpu", 4), ("reference", None)))
    assert set(layer.held_bytes) == {"values", "col_indices", "block_rows"}
    layer.register_buffer("other", torch.zeros(100))
    assert layer.nbytes == stored + 4 * blocks - 4 * (row_blocks + 1)


# --- autocast ------------------------------------------------------------------------------------


def dense_of(layer: SparseLinear) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, dtype=layer.packed.dtype)
    dense.weight = nn.Parameter(layer.weight.clone())
    dense.bias = copy.deepcopy(layer.bias)
    return dense


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("given", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("lower", HALVES, ids=str)
@pytest.mark.parametrize("own", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_under_autocast_it_is_the_linear_that_it_stands_for(
    format: str, own: torch.dtype, lower: torch.dtype, given: torch.dtype
) -> None:
    """Whatever the weight is stored in and the input comes in: dtypes, results and gradients."""
    layer = sparse_linear(format, dtype=own)
    dense, x = dense_of(layer), tokens_in(5, 24, dtype=given)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=lower):
        found, expected = layer(one), dense(other)
        assert torch.equal(layer(input=x), found), "called by keyword"
    assert found.dtype == expected.dtype == lower
    flat = used_inputs(format, x.float())
    exact = exact_linear(flat, layer.weight.float(), layer.bias)
    eps = max(torch.finfo(d).eps for d in {own, lower, given})
    magnitude = flat.abs() @ layer.weight.float().abs().T + layer.bias.abs().float()
    rounding = 0.1 if format in DYNAMIC else 0.0  # of inputs of another dtype, to other codes
    assert bool(((found - exact).abs() <= (4 * eps + rounding) * magnitude).all())
    found.sum().backward()
    expected.sum().backward()
    assert one.grad is not None and other.grad is not None and one.grad.dtype == other.grad.dtype
    torch.testing.assert_close(one.grad, other.grad, rtol=4 * eps, atol=16 * eps)
    assert layer.bias.grad.dtype == dense.bias.grad.dtype == own
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=4 * eps, atol=0)


@pytest.mark.parametrize("format", EXACT)
def test_autocast_leaves_float64_alone(format: str) -> None:
    layer, x = sparse_linear(format, dtype=torch.float64), tokens_in(5, 24, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), dense_of(layer)(x)) or is_right(layer, x)
        assert layer(x).dtype == torch.float64
        with pytest.raises(ValueError, match="needs float64 input, got float32"):
            layer(x.float())


def test_a_joined_activation_is_applied_under_autocast() -> None:
    layer, x = sparse_linear("semi24"), tokens_in(5, 24)
    plain = copy.deepcopy(layer)
    layer.activation = "relu"
    for own in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = layer.to(own)(x)
            assert torch.equal(result, plain.to(own)(x).relu())
            assert result.dtype == torch.bfloat16


def test_outside_of_a_disabled_autocast_nothing_is_cast() -> None:
    layer = sparse_linear("csr")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autocast("cpu", enabled=False),
        pytest.raises(ValueError, match="needs float32 input, got bfloat16"),
    ):
        layer(tokens_in(5, 24, dtype=torch.bfloat16))
