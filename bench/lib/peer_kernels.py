"""Other libraries' ways to run a layer to measure ours beside.

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

from bench.lib.cold import Candidate, Run, Tuned, product
from secateur.formats.kernels.cusparselt import SearchCase, Setting, case_of
from secateur.formats.kernels.cusparselt_search import SearchResult
from secateur.formats.kernels.cusparselt_settings import search_isolated

CUBLAS = "cublas bf16"
CUBLAS_FP16 = "cublas fp16"
CUSPARSELT = "cusparselt searched"
CUSPARSELT_SHIPPED = "cusparselt alg 0"
TINYGEMM = "tinygemm int4"
SPARSE_MARLIN = "sparse-marlin int4"

GROUP = 128  # weights that share a scale, in both int4 peers
CUSPARSELT_ROWS = 16  # fewer tokens have to be padded
INNER_K_TILES = 8
SHIPPED = Setting(0)


def cublas(weight: Tensor, x: Tensor, name: str, bias: Tensor | None = None) -> Candidate:
    """`torch.nn.functional.linear`, in the dtype of the weight."""

    def make() -> Run:
        copy = weight.clone()
        return lambda x: torch.nn.functional.linear(x, copy, bias)

    exact = partial(product, weight=weight, bias=bias)
    return Candidate(name, weight.nbytes, make, x, exact, baseline=name)


def cusparselt(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> list[Candidate]:
    """The algorithm that torch ships, 0, and the fastest right one; both on the same copies.

    The search is that of `secateur.formats.kernels.cusparselt_search`, since the library's own
    times warm weights and can return wrong algorithms. It is made anew here, whatever is
    remembered.
    """
    blob, out = torch._cslt_compress(weight), len(weight)

    def make() -> Run:
        copy = blob.clone()

        def run(x: Tensor, setting: Setting = SHIPPED) -> Tensor:
            result: Tensor = torch._cslt_sparse_mm(
                *(copy, x.t()),
                bias=bias,
                transpose_result=True,
                alg_id=setting.algorithm,
                split_k=setting.split_k,
                split_k_mode=setting.split_k_mode,
            )
            return result

        return run

    found: dict[SearchCase, SearchResult] = {}

    def tune(runs: Sequence[Run], x: Tensor) -> Tuned:
        case = case_of(x, out, bias)
        if case not in found:
            found[case] = search_isolated(case, x.device)
        setting = found[case].setting
        return [partial(run, setting=setting) for run in runs], described(found[case])

    shared = partial(
        Candidate,
        nbytes=blob.nbytes,
        make=make,
        x=x,
        exact=partial(product, weight=weight, bias=bias),
        baseline=CUBLAS,
        rows=CUSPARSELT_ROWS,
    )
    return [shared(CUSPARSELT_SHIPPED), shared(CUSPARSELT, tune=tune)]


def described(found: SearchResult) -> str:
    """`algorithm 5 split_k 8 mode 1; 1 setting wrong, 9 refused`."""
    best = found.setting
    split = f" split_k {best.split_k} mode {best.split_k_mode}" if best.split_k > 1 else ""
    wrong = sum(reason.startswith("wrong by") for reason in found.dropped.values())
    refused = len(found.dropped) - wrong
    settings = "setting" if wrong == 1 else "settings"
    return f"algorithm {best.algorithm}{split}; {wrong} {settings} wrong, {refused} refused"


def tinygemm(weight: Tensor, x: Tensor) -> Candidate:
    """Dense int4 in groups of 128, as torch has it."""
    codes, scales = quantised(weight)
    exact = partial(product, weight=dequantised(codes, scales))
    packed = torch.ops.aten._convert_weight_to_int4pack(joined(codes), INNER_K_TILES)
    table = scales_and_zeros(scales)

    def make() -> Run:
        own, own_table = packed.clone(), table.clone()

        def run(x: Tensor) -> Tensor:
            result: Tensor = torch.ops.aten._weight_int4pack_mm(x, own, GROUP, own_table)
            return result

        return run

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

    nbytes, exact = sum(tensor.nbytes for tensor in packed), partial(product, weight=dense)
    return Candidate(SPARSE_MARLIN, nbytes, make, x.half(), exact, CUBLAS_FP16)


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
