"""secateur finds sparse weights and makes them fast.

The front half (`plan`, `prune_`, `reconstruct_`, `check`, `hold`) leaves an ordinary dense model
with exact zeros in ordinary parameters; the back half (`accelerate_`, `pack_`) reads nothing else.
`shrink_` makes a model physically smaller instead.
"""

from secateur.accelerate import accelerate_
from secateur.allocation import sensitivity
from secateur.core.version import VERSION
from secateur.criteria import magnitude, ria, wanda
from secateur.files import load, save
from secateur.formats import SparseLinear, pack_, unpack_, warmup
from secateur.llm import generate
from secateur.model import evaluate as evaluate  # sc.evaluate.perplexity and the like
from secateur.model.plan import Plan, plan, read_plan
from secateur.patterns import NM, Block, Channel, Fp8, Int4, Int8, Unstructured
from secateur.prune import check, prune_, reconstruct_, shrink_
from secateur.reconstruct import alps, best, blockwise, refit, sparsegpt, swap, thorough
from secateur.train import distil_, gradual, hold

__version__ = VERSION

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Fp8",
    "Int4",
    "Int8",
    "Plan",
    "SparseLinear",
    "Unstructured",
    "accelerate_",
    "alps",
    "best",
    "blockwise",
    "check",
    "distil_",
    "generate",
    "gradual",
    "hold",
    "load",
    "magnitude",
    "pack_",
    "plan",
    "prune_",
    "read_plan",
    "reconstruct_",
    "refit",
    "ria",
    "save",
    "sensitivity",
    "shrink_",
    "sparsegpt",
    "swap",
    "thorough",
    "unpack_",
    "wanda",
    "warmup",
]
