"""The front half on a GPU: what it finds there is what it finds on the CPU."""

import copy

import pytest
import torch
from torch import Tensor

import secateur as sc
from tests.models import ConvNet, Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def tokens(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (4, 12), generator=generator).to(device) for _ in range(4)]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured:0.6@layer", "block:4x4@0.5"])
def test_masks_are_those_of_the_cpu(pattern: str) -> None:
    torch.manual_seed(0)
    score = torch.randint(50, (64, 128)).float()
    value = sc.plan(torch.nn.Linear(128, 64), pattern, layers=[torch.nn.Linear]).layers[""]
    assert torch.equal(value.mask(score.cuda()).cpu(), value.mask(score))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("verb", "method"), [(sc.prune_, sc.wanda), (sc.reconstruct_, sc.sparsegpt)]
)
def test_prunes_as_on_the_cpu(verb, method, offload: bool) -> None:
    torch.manual_seed(0)
    on_cpu = Decoder()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    reports = [
        verb(m, sc.plan(m, "2:4"), method, tokens("cpu"), offload=offload) for m in (on_cpu, on_gpu)
    ]
    sc.check(on_gpu, "2:4")
    for one, other in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        same = (one != 0) == (other.cpu() != 0)
        assert same.float().mean() > 0.98  # sums in another order decide near-ties otherwise
    if method is sc.sparsegpt:
        for one, other in zip(*(r.layers for r in reports), strict=True):
            assert one.error == pytest.approx(other.error, rel=0.05)


def test_convolutions_too() -> None:
    torch.manual_seed(0)
    model = ConvNet().cuda()
    plan = sc.plan(model, "2:4")
    sc.reconstruct_(model, plan, sc.sparsegpt, [torch.randn(2, 4, 10, 10)])
    sc.check(model, plan)


def test_zeros_are_held_by_a_fused_optimizer() -> None:
    model = Decoder().cuda()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with sc.hold(model, optimizer):
        for _ in range(3):
            model(tokens("cuda")[0]).square().mean().backward()
            optimizer.step()
    sc.check(model, plan)


@pytest.mark.parametrize(
    ("pattern", "format"),
    [
        ("2:4", "semi24"),
        ("block:16x16@0.5", "block:16x16"),
        ("unstructured:0.9", "csr"),
        ("unstructured:0.9", "bitmap"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_give_the_pruned_models_answers(
    pattern: str, format: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    model = model.to("cuda", dtype)
    sc.prune_(model, sc.plan(model, pattern))
    x = torch.randn(5, 64, device="cuda", dtype=dtype)
    expected = model(x)
    sc.pack_(model, format)
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    sc.unpack_(model)
    assert torch.equal(model(x), expected)


def test_without_a_kernel_nothing_is_swapped_and_the_reason_is_said() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256)).cuda()  # float32: no kernel takes it
    sc.prune_(model, sc.plan(model, "2:4"))
    report = sc.accelerate_(model, tokens=(1,))
    assert type(model[0]) is torch.nn.Linear
    assert "no layer is faster sparse on this device" in str(report)
