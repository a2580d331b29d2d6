"""Other libraries' ways to run a layer with few tokens, to measure the decode kernels beside.

Dense cuBLAS, cuSPARSELt and tinygemm come with torch. Sparse-Marlin does not: a shared library with
its launcher, and beside it `sparse_marlin_packer.py`, are named on the command line.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.cold import Candidate, Run, Tuned, chain, error_of_one, in_turns, product

CUBLAS = "cublas bf16"
CUBLAS_FP16 = "cublas fp16"
CUSPARSELT = "cusparselt searched"
CUSPARSELT_SHIPPED = "cusparselt alg 0"
TINYGEMM = "tinygemm int4"
SPARSE_MARLIN = "sparse-marlin int4"

GROUP = 128  # weights that share a scale, in both int4 peers
WRONG = 0.02  # relative error above which a result counts as wrong; bf16 rounding is 0.002
CUSPARSELT_ROWS = 16  # fewer tokens have to be padded
INNER_K_TILES = 8
MOST_ALGORITHMS = 128
MOST_REFUSALS = 4  # refused ids in a row that end the search
QUICK_COPIES = 8

Setting = tuple[int, int, int]  # algorithm, split_k, split_k_mode
SPLITS = tuple((count, mode) for count in (2, 4, 8) for mode in (1, 2))


def cublas(weight: Tensor, x: Tensor, name: str) -> Candidate:
    """`torch.nn.functional.linear`, in the dtype of the weight."""

    def make() -> Run:
        copy = weight.clone()
        return lambda x: torch.nn.functional.linear(x, copy)

    return Candidate(name, weight.nbytes, make, x, product(x, weight), baseline=name)


def cusparselt(weight: Tensor, x: Tensor) -> list[Candidate]:
    """The algorithm that torch ships, 0, and the fastest right one; both on the same copies."""
    compressed, exact = torch._cslt_compress(weight), product(x, weight)

    def make() -> Run:
        copy = compressed.clone()

        def run(x: Tensor, setting: Setting = (0, 1, -1)) -> Tensor:
            algorithm, split_k, mode = setting
            return torch._cslt_sparse_mm(
                *(copy, x.t()),
                transpose_result=True,
                alg_id=algorithm,
                split_k=split_k,
                split_k_mode=mode,
            )

        return run

    found: dict[int, tuple[Setting, str]] = {}

    def tune(runs: Sequence[Run], x: Tensor, exact: Tensor) -> Tuned:
        if len(x) not in found:
            found[len(x)] = fastest(runs, x, exact)
        setting, note = found[len(x)]
        return [partial(run, setting=setting) for run in runs], note

    shared = partial(
        Candidate,
        nbytes=compressed.nbytes,
        make=make,
        x=x,
        exact=exact,
        baseline=CUBLAS,
        rows=CUSPARSELT_ROWS,
    )
    return [shared(CUSPARSELT_SHIPPED), shared(CUSPARSELT, tune=tune)]


def fastest(runs: Sequence[Run], x: Tensor, exact: Tensor) -> tuple[Setting, str]:
    """The fastest setting with a right result, and how many were tried.

    Every algorithm by its number, since the library's own search times warm weights and can return
    wrong ones; then the two fastest with their sums split.

    Raises: RuntimeError if no setting is right.
    """
    us, refused = dict[Setting, float](), 0
    for algorithm in range(MOST_ALGORITHMS):
        measured = _quick(runs, x, exact, (algorithm, 1, -1))
        refused = 0 if measured is not None else refused + 1
        if refused == MOST_REFUSALS:
            break
        if measured is not None:
            us[algorithm, 1, -1] = measured
    for algorithm, _, _ in sorted(us, key=us.__getitem__)[:2]:
        for split_k, mode in SPLITS:
            measured = _quick(runs, x, exact, (algorithm, split_k, mode))
            if measured is not None:
                us[algorithm, split_k, mode] = measured
    wrong = sum(value == torch.inf for value in us.values())
    if wrong == len(us):
        raise RuntimeError(f"no algorithm is right: {wrong} are wrong, all others refused")
    best = min(us, key=us.__getitem__)
    split = f" split_k {best[1]} mode {best[2]}" if best[1] > 1 else ""
    return best, f"algorithm {best[0]}{split} of {len(us)} tried, {wrong} wrong"


def _quick(runs: Sequence[Run], x: Tensor, exact: Tensor, setting: Setting) -> float | None:
    """Microseconds over a few copies; infinite if the result is wrong, None if it is refused."""
    bound = [partial(run, setting=setting) for run in runs[:QUICK_COPIES]]
    try:
        if not error_of_one(bound[0], x, exact) <= WRONG:  # also for nan
            return torch.inf
        timed = chain(bound, x, len(bound))
    except RuntimeError:
        return None
    return in_turns({"": timed}, x.device, rounds=3)[""].median_us


def tinygemm(weight: Tensor, x: Tensor) -> Candidate:
    """Dense int4 in groups of 128, as torch has it."""
    codes, scales = quantised(weight)
    exact = product(x, dequantised(codes, scales))
    packed = torch.ops.aten._convert_weight_to_int4pack(joined(codes), INNER_K_TILES)
    table = scales_and_zeros(scales)

    def make() -> Run:
        own, own_table = packed.clone(), table.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, own, GROUP, own_table)

    return Candidate(TINYGEMM, packed.nbytes + table.nbytes, make, x, exact, CUBLAS)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 1..15, where 8 is zero, and bf16 scales [out, groups]: symmetric, by the largest."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(2) / 7).clamp(min=1e-6).bfloat16()
    codes = (groups / scales.float().unsqueeze(2)).round_().clamp_(-7, 7).add_(8)
    return codes.flatten(1).to(torch.uint8), scales


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """The weight that codes and scales stand for, exact in float32."""
    groups = (codes.float() - 8).unflatten(1, (-1, GROUP))
    return (groups * scales.float().unsqueeze(2)).flatten(1)


def joined(codes: Tensor) -> Tensor:
    """Two codes a byte, the even column in the high half: what torch's packing takes on a GPU."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def scales_and_zeros(scales: Tensor) -> Tensor:
    """[groups, out, 2]: a weight is (code - 8) * scale + zero."""
    return torch.stack((scales, torch.zeros_like(scales)), dim=2).transpose(0, 1).contiguous()


def sparse_marlin(weight: Tensor, x: Tensor, library: Path) -> Candidate:
    """int4 in groups of 128 and 2:4, in fp16, from the shared library of that project."""
    if not weight.is_cuda:
        raise ValueError("Sparse-Marlin needs a GPU")
    launch = ctypes.CDLL(str(library)).sparse_marlin_mul_2_4
    pointer, number = ctypes.c_void_p, ctypes.c_int
    launch.argtypes = [pointer] * 5 + [number] * 3 + [pointer] + [number] * 2 + [pointer]
    packer = _module(library.with_name("sparse_marlin_packer.py"))
    *packed, dense = packer.pack(weight.half())
    out, width = weight.shape

    def make() -> Run:
        values, metadata, scales = (tensor.clone() for tensor in packed)
        locks = torch.zeros(out // 128 * 16, dtype=torch.int32, device=weight.device)

        def run(x: Tensor) -> Tensor:
            result = x.new_empty(len(x), out)
            inputs = (x, values, metadata, result, scales)
            stream = torch.cuda.current_stream(x.device).cuda_stream
            sizes = (out, len(x), width, locks.data_ptr(), GROUP, x.device.index, stream)
            failed = launch(*(tensor.data_ptr() for tensor in inputs), *sizes)
            if failed:
                raise RuntimeError(f"Sparse-Marlin's launch failed with {failed}")
            return result

        return run

    half, nbytes = x.half(), sum(tensor.nbytes for tensor in packed)
    return Candidate(SPARSE_MARLIN, nbytes, make, half, product(half, dense), CUBLAS_FP16)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ValueError(f"{path} is no Python file: it has to lie beside the library")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peers(
    dense: Tensor, sparse: Tensor, x: Tensor, library: Path | None
) -> Iterator[tuple[str, Callable[[], list[Candidate]]]]:
    """The name and the maker of each peer; a maker raises where its peer cannot run."""
    yield CUBLAS, lambda: [cublas(dense, x, CUBLAS)]
    yield CUBLAS_FP16, lambda: [cublas(dense.half(), x.half(), CUBLAS_FP16)]
    yield CUSPARSELT, lambda: cusparselt(sparse, x)
    yield TINYGEMM, lambda: [tinygemm(dense, x)]
    if library is not None:
        yield SPARSE_MARLIN, lambda: [sparse_marlin(sparse, x, library)]
