"""N:M for export: convolutions pruned and trained, as plain checkpoints and as ONNX that runs."""

import copy
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur as sc
from tests.resnet import ResNet

onnx = pytest.importorskip("onnx", reason="needs secateur[dev]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs secateur[dev]")
pytest.importorskip("onnxscript", reason="needs secateur[dev]")

PATTERN = "2:4@pad-remainder"
PLANNED = {
    "stem": "2:4@pad-remainder@channels3",
    "stage1.conv1": PATTERN,
    "stage1.conv2": PATTERN,
    "stage2.conv1": PATTERN,
    "stage2.conv2": PATTERN,
    "stage2.shortcut": PATTERN,
    "mix": "2:4@pad-remainder@channels10",
    "fc": PATTERN,
}
# The zeros of each layer: 1 of 3 channels, 2 + 2 + 0 of 10, and half where 4 divides.
ZEROS = dict.fromkeys(PLANNED, 1 / 2) | {"stem": 1 / 3, "mix": 4 / 10}

RELOAD = """
import sys
sys.modules["secateur"] = None  # importing it is an error
import torch
from safetensors.torch import load_file
from tests.resnet import ResNet
x, expected = torch.load("expected.pt", weights_only=True)
for state in (torch.load("model.pt", weights_only=True), load_file("model.safetensors")):
    model = ResNet().eval()
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(x), expected)
"""


@dataclass(frozen=True)
class Exported:
    """A model pruned in one shot or trained with its zeros held, and its ONNX file."""

    model: ResNet
    plan: sc.Plan
    x: Tensor
    path: Path

    @property
    def initialisers(self) -> dict[str, Tensor]:
        graph = onnx.load(self.path).graph
        return {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in graph.initializer}


def trained(model: ResNet, plan: sc.Plan) -> None:
    """A few steps with momentum and weight decay, which move every weight that is not held."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    model.train()
    with sc.hold(model, optimizer):
        for _ in range(3):
            x = torch.randn(8, 3, 12, 12, generator=generator)
            target = torch.randint(5, (8,), generator=generator)
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module", params=["one-shot", "trained"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model = ResNet().eval()
    plan = sc.plan(model, PATTERN)
    sc.prune_(model, plan)
    if request.param == "trained":
        before = copy.deepcopy(model)
        trained(model, plan)
        assert not torch.equal(model.fc.weight, before.fc.weight)
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with warnings.catch_warnings():  # torch.export's own hook, which has its own type
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    return Exported(model, plan, x, path)


def test_the_plan_takes_what_can_be_pruned_and_says_why_not_the_rest(exported: Exported) -> None:
    assert {name: str(pattern) for name, pattern in exported.plan.layers.items()} == PLANNED
    assert exported.plan.skipped == {
        "depthwise": "depthwise convolution: its groups do not share inputs",
        "grouped": "grouped convolution: its groups do not share inputs",
        "up": "transposed convolution: of convolutions only Conv2d can be pruned",
    }


def test_the_zeros_are_counted_exactly_after_pruning_and_after_training(exported: Exported) -> None:
    assert sc.check(exported.model, exported.plan) == pytest.approx(ZEROS)
    left_alone = [getattr(exported.model, name).weight for name in exported.plan.skipped]
    assert all((weight != 0).all() for weight in left_alone)


def test_groups_lie_along_the_channels_that_a_runtime_pads(exported: Exported) -> None:
    """The view [out x kernel height x kernel width, in] of ao#4626, its rows filled up to m."""
    for name in PLANNED:
        weight = exported.model.get_submodule(name).weight
        rows = weight.movedim(1, -1).flatten(0, -2)
        padded = nn.functional.pad(rows, (0, -rows.shape[1] % 4)).unflatten(1, (-1, 4))
        assert (padded != 0).sum(-1).max() == 2, name


def test_onnx_runtime_gives_the_outputs_of_the_model(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: exported.x.numpy()})
    with torch.no_grad():
        exact = copy.deepcopy(exported.model).double()(exported.x.double()).numpy()
        ours = exported.model(exported.x).numpy()
    # A BatchNorm folded into its convolution rounds every weight once more; sums have <= 144 terms.
    budget = 2 * np.abs(ours - exact).max() + 4 * np.finfo(np.float32).eps * np.abs(exact).max()
    assert np.abs(found - exact).max() <= budget
    assert np.abs(exact).max() > 0.1


def test_the_file_holds_the_same_exact_zeros(exported: Exported) -> None:
    """The weights in a stock model hold the plan, with a zero wherever the model has one."""
    found, stock = exported.initialisers, ResNet()
    for name in PLANNED:
        weight = exported.model.get_submodule(name).weight
        assert torch.equal(found[f"{name}.weight"] == 0, weight == 0), name
    for name in ("stem", "stage2.shortcut", "mix", "fc"):  # no BatchNorm to be folded in
        weight = exported.model.get_submodule(name).weight
        assert torch.equal(found[f"{name}.weight"], weight), name
    stock.load_state_dict(found, strict=False)
    assert sc.check(stock, exported.plan) == pytest.approx(ZEROS)


@pytest.mark.parametrize("exported", ["trained"], indirect=True)
def test_a_process_without_this_library_loads_the_checkpoints(
    exported: Exported, tmp_path: Path
) -> None:
    state = exported.model.state_dict()
    stock = ResNet().state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in stock.items()
    }
    torch.save(state, tmp_path / "model.pt")
    save_file(state, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.save((exported.x, exported.model(exported.x)), tmp_path / "expected.pt")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{RELOAD}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["depthwise", "grouped", "up"])
def test_what_cannot_be_pruned_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be pruned: .* convolution: "):
        sc.plan(ResNet(), PATTERN, layers=["fc", name])


def test_without_a_remainder_every_misfit_is_named_with_the_remedy() -> None:
    skipped = sc.plan(ResNet(), "2:4").skipped
    assert "2:4 needs in_channels of at least 4, got 3" in skipped["stem"]
    assert "2:4 needs in_channels divisible by 4, got 10" in skipped["mix"]
    with pytest.raises(ValueError) as error:  # where they are asked for
        sc.plan(ResNet(), "2:4", layers=["stem", "mix", "fc"])
    assert "2 of 3 layers cannot have their pattern" in str(error.value)
    assert "stem: 2:4 needs in_channels of at least 4, got 3" in str(error.value)
    assert "mix: 2:4 needs in_channels divisible by 4, got 10" in str(error.value)
    assert "'2:4@pad-remainder' to count them as a group filled up" in str(error.value)


def test_the_first_group_that_breaks_the_pattern_is_named(exported: Exported) -> None:
    model = copy.deepcopy(exported.model)
    with torch.no_grad():
        model.mix.weight[3, 4:8, 0, 1] = 1  # position 1 of the kernel: columns 10..19
        model.fc.weight[2, 8:] = 1
    with pytest.raises(ValueError) as error:
        sc.check(model, exported.plan)
    assert "2 of 8 layers break the plan" in str(error.value)
    assert "mix (2:4@pad-remainder@channels10) has 1 groups" in str(error.value)
    assert "first columns 14..17 of row 3, keeping 4" in str(error.value)
    assert "first columns 8..11 of row 2, keeping 4" in str(error.value)


@pytest.mark.parametrize("wide", [10, 12])
def test_formats_pack_what_their_groups_hold_and_refuse_a_remainder(wide: int) -> None:
    model = nn.Sequential(nn.Linear(wide, 8))
    sc.prune_(model, PATTERN)
    if wide % 4 == 0:
        sc.pack_(model, "semi24")
        assert isinstance(model[0], sc.SparseLinear)
    else:
        with pytest.raises(ValueError, match="semi24 needs in_features that is a multiple of 4"):
            sc.pack_(model, "semi24")
