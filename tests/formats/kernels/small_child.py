"""The child of a search among a few of the real library's algorithms.

One of them loses the CUDA context where `TRAP` says so. A call of the library can take a third of a
second of its host's time, so that a whole search is too long for a test.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.formats.kernels import cusparselt_child, cusparselt_search
from secateur.formats.kernels.launch import load, prepare
from secateur.formats.kernels.nvrtc import Source

TRAP = 'extern "C" __global__ void trap() { __trap(); }\n'


def trap(folder: str) -> None:
    path = Path(folder) / "trap.cu"
    path.write_text(TRAP)
    kernel = load(Source(str(path), "trap"), (), torch.device("cuda", torch.cuda.current_device()))
    prepare(kernel, 1, 1, 32, 0, False, "")(torch.cuda.current_stream().cuda_stream)


def main(uuid: str) -> None:
    cusparselt_search.MOST_ALGORITHMS = 3
    cusparselt_search.SPLIT_BEST = 0
    cusparselt_search.MOST_COPIES = cusparselt_search.CHECKS = 1
    told = json.loads(os.environ.get("TRAP", '{"algorithm": -1}'))
    real = torch._cslt_sparse_mm

    def sparse_mm(*arguments: Any, **options: Any) -> Tensor:
        if options["alg_id"] == told["algorithm"]:
            if told["way"] == "trap":
                trap(told["folder"])
            else:
                torch._assert_async(torch.zeros(1, device="cuda"))
        return real(*arguments, **options)

    torch._cslt_sparse_mm = sparse_mm
    cusparselt_child.main(uuid)
