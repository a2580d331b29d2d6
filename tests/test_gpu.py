"""The front half on a GPU finds what it finds on the CPU."""

import copy
import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.accelerate import verb
from secateur.accelerate.doctor import doctor
from secateur.core import graphs
from tests.models import ConvNet, Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

FIGURES = re.compile(r"\b\d\.\d+(?:e-\d+)?")


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


@pytest.mark.parametrize("grid", [None, sc.Int4(16)], ids=repr)
def test_trained_in_graphs_as_by_launches(grid, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense, batches = Decoder().cuda(), tokens("cuda") * 4
    captured, held_out = graphs.captured, []

    def counted(run, stream):
        replay = captured(run, stream)
        done.append(1)
        return replay

    monkeypatch.setattr(graphs, "captured", counted)
    for may in (True, False):
        done: list[int] = []
        monkeypatch.setattr(graphs, "can_capture", lambda device, may=may: may)
        model = copy.deepcopy(dense)
        report = sc.reconstruct_(model, "2:4", replace(sc.thorough, grid=grid), batches)
        sc.check(model, "2:4")
        held_out.append([float(x) for row in report.layers for x in FIGURES.findall(row.note)])
        assert len(done) >= (5 if may else 0) and bool(done) == may
    assert held_out[0] == pytest.approx(held_out[1], rel=0.02) and len(held_out[0]) > 6


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
    model = torch.nn.Sequential(torch.nn.Linear(256, 256)).cuda()  # no kernel takes float32
    sc.prune_(model, sc.plan(model, "2:4"))
    report = sc.accelerate_(model, tokens=(1,))
    assert type(model[0]) is torch.nn.Linear
    assert "no layer is faster sparse on this device" in str(report)


def halves(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    model = torch.nn.Sequential(*layers).to("cuda", dtype)
    sc.prune_(model, sc.plan(model, "2:4"))
    return model.requires_grad_(False)


def test_accelerate_measures_and_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "MOST_SPREAD", float("inf"))  # kept, however busy this machine is
    model = halves(512, 1024, 512)
    dense = copy.deepcopy(model)
    report = sc.accelerate_(model, tokens=(1, 16, 256))
    for layer in report.layers:
        for found in layer.measured:
            times = dict(found.microseconds)
            assert all(us > 0 for us in times.values()) and "dense" in times
            assert not found.remembered
    for tokens in (1, 5, 16, 100, 256, 1000):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        wanted = dense(x)
        off = float((model(x) - wanted).abs().max() / wanted.abs().max())
        assert off < 2**-6
    again = sc.accelerate_(copy.deepcopy(dense), tokens=(1, 16, 256))
    assert all(found.remembered for layer in again.layers for found in layer.measured)
    assert [layer.table for layer in again.layers] == [layer.table for layer in report.layers]


def test_an_accelerated_model_is_captured() -> None:
    model = halves(512, 1024, 512)
    wanted_of = copy.deepcopy(model)
    sc.accelerate_(model, tokens=(1, 16))
    if any(isinstance(layer, sc.SparseLinear) for layer in model):
        sc.warmup(model, tokens=(16,))
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(x)
    x.copy_(torch.randn(16, 512, device="cuda", dtype=torch.bfloat16))
    graph.replay()
    wanted = wanted_of(x)
    assert float((result - wanted).abs().max() / wanted.abs().max()) < 2**-6


@pytest.mark.parametrize("format", ["semi24_int8_dynamic", "semi24_fp8_dynamic"])
def test_dynamic_formats_are_admitted_by_their_own_reference(format: str) -> None:
    model = halves(512, 1024)
    report = sc.accelerate_(
        model, tokens=(16, 512), formats=[format, format.removeprefix("semi24_")]
    )
    (layer,) = report.layers
    assert not [reason for reason in layer.dropped if "wrong" in reason]
    assert report.dense_formats == (format.removeprefix("semi24_"),)


def test_the_doctor_asks_kernels_at_few_and_many_tokens() -> None:
    found = {entry.capability: entry.detail for entry in doctor()}
    if torch.cuda.get_device_capability() >= (8, 0):
        decode = found["semi24 decode"]
        assert decode.startswith("cuda, at 1 token in bfloat16, float16; at 4096 tokens not: ")
        assert found["semi24 dense"] == "cuda, at 1 and 4096 tokens in bfloat16, float16"
