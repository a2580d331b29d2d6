"""The kernels for a CPU: every body is right, what is missing is said, threads change no bit."""

import ast
import ctypes
import hashlib
import platform
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.formats import parse_format
from secateur.formats import simd as on_cpu
from secateur.formats.contract import Implementation, Packed
from secateur.formats.kernels import simd
from tests.formats.weights import allowed_error, exact_linear, fitting_weight, tokens_in

BUILT = simd._loaded()[1] is None
needs_library = pytest.mark.skipif(not BUILT, reason=f"no library: {simd._loaded()[1]}")
BODIES = simd.bodies()
HOOK = Path(__file__).parents[3] / "hatch_build.py"
FORMATS = ("semi24", "semi24_int4", "semi24_int4:channel", "semi24_int8", "semi24_fp8", "block:8x4")
ROUNDED = "semi24_int8_dynamic"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementation(format: str) -> Implementation:
    return next(one for one in parse_format(format).implementations if one.name == "simd")


def right(packed: Packed, weight: Tensor, x: Tensor, bias: Tensor | None) -> bool:
    run = implementation(str(packed.format))
    result = run.linear(x, run.arranged(packed), bias)
    meant = packed.format.unpack(packed)
    error = float((result - exact_linear(x, meant, bias)).abs().max())
    return error <= allowed_error(x, weight, bias, meant)


@needs_library
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_every_body_is_right(body: str, format: str, data: st.DataObject) -> None:
    """Odd sizes and tails: rows by 8 or any, inputs by 4, tokens on both sides of the crossing."""
    rows = (
        8 * data.draw(st.integers(1, 9), label="rows")
        if "block" in format
        else data.draw(st.integers(1, 70), label="rows")
    )
    width = 4 * data.draw(st.integers(1, 90), label="groups")
    tokens = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 11, 25, 47, 48, 50]), label="tokens")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    weight = fitting_weight(format, rows, width, dtype)
    packed = parse_format(format).pack(weight)
    bias = tokens_in(rows, dtype=dtype, seed=3) if data.draw(st.booleans(), label="bias") else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(simd.CHOICE, body)
        assert right(packed, weight, tokens_in(tokens, width, dtype=dtype), bias)


@needs_library
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 4), (4, 1), (16, 16), (33, 5), (64, 64), (100, 8), (128, 32)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 2, 5, 7, 13, 31])
def test_any_block_is_right(
    monkeypatch: pytest.MonkeyPatch, body: str, rows: int, cols: int, tokens: int
) -> None:
    monkeypatch.setenv(simd.CHOICE, body)
    weight = fitting_weight(f"block:{rows}x{cols}", 3 * rows, 5 * cols)
    weight[rows : 2 * rows] = 0  # a row of blocks without a block
    packed = parse_format(f"block:{rows}x{cols}").pack(weight)
    assert right(packed, weight, tokens_in(tokens, 5 * cols), tokens_in(3 * rows, seed=3))


@needs_library
@pytest.mark.parametrize("body", BODIES)
@given(data=st.data())
def test_inputs_that_are_rounded_give_the_definition_s_bits(body: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40), label="rows")
    width = 4 * data.draw(st.integers(1, 90), label="groups")
    tokens = data.draw(st.integers(0, 9), label="tokens")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    packed = parse_format(ROUNDED).pack(fitting_weight(ROUNDED, rows, width, dtype))
    bias = tokens_in(rows, dtype=dtype, seed=3) if data.draw(st.booleans(), label="bias") else None
    x = tokens_in(tokens, width, dtype=dtype)
    odd = st.sampled_from([0.0, 1e-40, 6e-8, 3e4, float("inf"), float("nan")])
    for token in x[1::3]:  # some zeros, or tiny, or large, or not finite
        token[data.draw(st.sampled_from([0, width // 2]), label="at") :] = data.draw(odd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(simd.CHOICE, body)
        result = implementation(ROUNDED).linear(x, packed, bias)
    exact = packed.format.implementations[-1].linear(x, packed, bias)
    assert torch.equal(result.nan_to_num(nan=7e3), exact.nan_to_num(nan=7e3))


@needs_library
def test_sums_of_the_largest_codes_are_exact_up_to_the_most_inputs() -> None:
    packed = parse_format(ROUNDED).pack(torch.zeros(2, simd.MOST_INPUTS))
    packed["values"].fill_(127)
    packed["scales"].fill_(1)
    run, x = implementation(ROUNDED), torch.full((1, simd.MOST_INPUTS), 127.0)
    assert run.why_not(packed, 1) is None
    sums = 127**2 * (simd.MOST_INPUTS // 2)
    assert 2**31 - 2 * 127**2 < sums < 2**31
    assert run.linear(x, packed, None).tolist() == [[float(torch.tensor(float(sums)))] * 2]
    wider = parse_format(ROUNDED).pack(torch.zeros(1, simd.MOST_INPUTS + 4))
    words = f"semi24_int8_dynamic simd needs at most {simd.MOST_INPUTS} inputs, got"
    assert str(run.why_not(wider, 1)).startswith(words)


@needs_library
@pytest.mark.parametrize("body", BODIES)
def test_the_body_that_is_named_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.setenv(simd.CHOICE, body)
    assert simd.body() == body
    function = simd._function("two_of_four")
    library, _ = simd._loaded()
    address = ctypes.cast(getattr(library, f"two_of_four_{body}"), ctypes.c_void_p).value
    assert ctypes.cast(function, ctypes.c_void_p).value == address


@pytest.fixture
def another_processor() -> Iterator[None]:
    """What this one can is asked once a process; this test asks again, and so does the next."""
    yield
    simd.bodies.cache_clear()


@pytest.mark.usefixtures("another_processor")
def test_the_best_body_runs_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(simd.CHOICE, raising=False)
    simd.bodies.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": 1, "fma3": 1, "f16c": 1})
    assert simd.bodies() == ("avx2", "scalar") and simd.body() == "avx2"
    simd.bodies.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert simd.bodies() == ("scalar",) and simd.body() == "scalar"
    monkeypatch.setenv(simd.CHOICE, "avx512")
    words = "SECATEUR_CPU_BODY needs one of scalar or none on this processor, got 'avx512'"
    with pytest.raises(ValueError, match=words):
        implementation("semi24").why_not(parse_format("semi24").pack(torch.zeros(4, 8)), 1)


@needs_library
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-40, 3e38])
def test_extreme_inputs_are_no_less_right(
    monkeypatch: pytest.MonkeyPatch, body: str, value: float
) -> None:
    """Where a kept weight meets it; what meets zeros alone does not count, as in every kernel."""
    monkeypatch.setenv(simd.CHOICE, body)
    weight = fitting_weight("semi24", 8, 32)
    x = torch.full((2, 32), value)
    run = implementation("semi24")
    packed = parse_format("semi24").pack(weight)
    result = run.linear(x, packed, None)
    for row, kept in zip(result.t(), weight, strict=True):
        exact = (x[0].double() * kept.double())[kept != 0].sum()
        if abs(value) == 1e-40:
            assert torch.allclose(row.double(), exact, rtol=1e-5, atol=1e-44)
        else:
            alone = (x[0] * kept)[kept != 0]
            assert bool((row.isnan() == alone.sum().isnan()).all()) or bool(row.isinf().all())


@needs_library
def test_inputs_that_are_not_contiguous_and_values_anywhere_in_memory() -> None:
    weight = fitting_weight("semi24", 12, 40)
    packed = parse_format("semi24").pack(weight)
    loose = torch.empty(packed["values"].numel() * 4 + 1, dtype=torch.uint8)[1:]
    values = loose.numpy().view("float32")  # an address that no float has
    odd = torch.from_numpy(values).view(packed["values"].shape)
    odd.copy_(packed["values"])
    assert odd.data_ptr() % 4
    x = tokens_in(40, 6).t()
    moved = replace(packed, tensors={**packed.tensors, "values": odd})
    assert not x.is_contiguous() and right(moved, weight, x, None)


@needs_library
@pytest.mark.parametrize("format", [*FORMATS, ROUNDED])
def test_threads_and_callers_beside_each_other_change_no_bit(format: str) -> None:
    weight = fitting_weight(format, 256, 512)
    run, packed = implementation(format), parse_format(format).pack(weight)
    arranged, x = run.arranged(packed), tokens_in(5, 512)
    alone = run.linear(x, arranged, None)
    found: list[Tensor] = []

    def work() -> None:
        torch.set_num_threads(2)
        found.extend(run.linear(x, arranged, None) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(1)
    assert len(found) == 20 and all(torch.equal(one, alone) for one in found)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dense_weight_is_the_stored_one_bit_for_bit(dtype: torch.dtype) -> None:
    weight = fitting_weight("semi24", 9, 36, dtype)
    packed = parse_format("semi24").pack(weight)
    parts = packed["values"], packed["metadata"], on_cpu.stored_floats(packed)
    assert torch.equal(simd.dense_two_of_four((9, 36), *parts), weight)


# ---- the library itself -------------------------------------------------------------------------


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_asks_for_memcpy_and_memset_alone() -> None:
    command = ["nm", "-D", "--undefined-only", str(simd.FOLDER / simd.LIBRARY)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    strong = [line.split()[-1] for line in printed.splitlines() if " U " in line]
    assert {name.partition("@")[0] for name in strong} <= {"memcpy", "memset"}
    versions = [name.rpartition("GLIBC_")[2] for name in strong if "GLIBC_" in name]
    assert all(tuple(map(int, version.split("."))) <= (2, 28) for version in versions)


def built_with(name: str) -> Any:
    """What the build hook says of how bodies are compiled."""
    if not HOOK.exists():
        pytest.skip("the build hook is beside the sources, which are not here")
    assigned = [node for node in ast.parse(HOOK.read_text()).body if isinstance(node, ast.Assign)]
    texts = {ast.unparse(node.targets[0]): node.value for node in assigned}
    return ast.literal_eval(texts[name])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="ThreadSanitizer is tried on x86_64")
@pytest.mark.parametrize("body", BODIES)
def test_threads_and_callers_race_nowhere(tmp_path: Path, body: str) -> None:
    """ThreadSanitizer watches the kernels alone: torch, which was not compiled so, is not there."""
    watched = ["g++", "-fsanitize=thread"]
    (tmp_path / "nothing.cpp").write_text("int main() {}")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    nothing = [*watched, str(tmp_path / "nothing.cpp"), "-o", str(tmp_path / "nothing")]
    if subprocess.run(nothing, capture_output=True, check=False).returncode:
        pytest.skip("needs libtsan, which this g++ does not find")
    if subprocess.run([str(tmp_path / "nothing")], capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer does not start here, as where addresses are too random")
    flags = (*built_with("FLAGS").split(), *built_with("X86_BODIES")[body].split(), "-O1", "-g")
    names = (f"-DBODY={body}", f"-DBODY_{body.upper()}", '-DSOURCES=""', f"-I{simd.FOLDER}")
    program, source = str(tmp_path / "races"), str(Path(__file__).parent / "simd_races.cpp")
    subprocess.run([*watched, *flags, *names, source, "-o", program], check=True)
    clean = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "", "")
    racing = subprocess.run([program, "overlapping"], capture_output=True, text=True, check=False)
    assert racing.returncode != 0 and "WARNING: ThreadSanitizer: data race" in racing.stderr


def test_what_is_not_there_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    simd._warn.cache_clear()
    monkeypatch.delenv(simd.CHOICE, raising=False)
    monkeypatch.setattr(simd, "_loaded", lambda: (None, "they were not compiled: install again"))
    packed = parse_format("semi24").pack(torch.zeros(4, 8))
    with pytest.warns(UserWarning, match="slower on this CPU than they could be: they were not"):
        assert (
            implementation("semi24").why_not(packed, 1) == "they were not compiled: install again"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation("semi24").why_not(packed, 1) is not None
    simd._warn.cache_clear()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda at: (at / simd.LIBRARY).unlink(), "were not compiled into this installation"),
        (lambda at: (at / simd.LIBRARY).write_bytes(b"\x7fELF, not"), "cannot be loaded"),
        (lambda at: (at / "vectors.h").write_text("// another"), "compiled from other sources"),
        (lambda at: None, "None"),
    ],
    ids=["absent", "broken", "old", "whole"],
)
@needs_library
def test_a_library_that_does_not_fit_is_refused_with_a_remedy(
    tmp_path: Path, spoil: object, said: str
) -> None:
    folder = tmp_path / "simd"
    shutil.copytree(simd.FOLDER, folder)
    spoil(folder)  # type: ignore[operator]
    library, problem = simd.load(folder)
    assert said in str(problem) and (library is None) == (said != "None")
    if problem is not None:
        assert "install secateur again where a C++ compiler is" in problem


def test_the_hash_is_the_build_hook_s() -> None:
    if not HOOK.exists():
        pytest.skip("the build hook is beside the sources, which are not here")
    texts = b"".join((simd.FOLDER / name).read_bytes() for name in ("kernels.cpp", "vectors.h"))
    assert simd.hash_of(simd.FOLDER) == hashlib.sha256(texts).hexdigest()[:16]
    assert '("kernels.cpp", "vectors.h")' in HOOK.read_text()
