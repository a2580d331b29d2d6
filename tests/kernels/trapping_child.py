"""The child of a search in the real library, one of whose algorithms loses the CUDA context."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.kernels import cusparselt_child
from secateur.kernels.launch import load, prepare
from secateur.kernels.nvrtc import Source

TRAP = 'extern "C" __global__ void trap() { __trap(); }\n'


def trap(folder: str) -> None:
    path = Path(folder) / "trap.cu"
    path.write_text(TRAP)
    kernel = load(Source(str(path), "trap"), (), torch.device("cuda", torch.cuda.current_device()))
    prepare(kernel, 1, 1, 32, 0, False, "")(torch.cuda.current_stream().cuda_stream)


def main(uuid: str) -> None:
    told = json.loads(os.environ["TRAP"])
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
