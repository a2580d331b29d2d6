"""secateur finds sparse weights and makes them fast.

The front half (`plan`, `prune_`, `reconstruct_`, `check`, `hold`) leaves an ordinary dense model
with exact zeros in ordinary parameters; the back half (`accelerate_`, `pack_`) reads nothing else.
"""

from secateur.criteria import magnitude, random, wanda
from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.plan import Plan, plan, read_plan
from secateur.prune import check, prune_, reconstruct_
from secateur.reconstruct import sparsegpt
from secateur.train import gradual, hold

__version__ = "0.1.0.dev0"

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Plan",
    "Unstructured",
    "check",
    "gradual",
    "hold",
    "magnitude",
    "plan",
    "prune_",
    "random",
    "read_plan",
    "reconstruct_",
    "sparsegpt",
    "wanda",
]
