"""Training with zeros: `hold` keeps them, rules move them, `distil_` recovers what they cost."""

from secateur.train.distil import DistilReport, distil_
from secateur.train.dynamic import rigl, sparse_evolution
from secateur.train.gradual import gradual
from secateur.train.hold import Held, Move, Mover, Rule, hold
from secateur.train.movement import Moving, movement, soft_movement
from secateur.train.steps import release

__all__ = [
    "DistilReport",
    "Held",
    "Move",
    "Mover",
    "Moving",
    "Rule",
    "distil_",
    "gradual",
    "hold",
    "movement",
    "release",
    "rigl",
    "soft_movement",
    "sparse_evolution",
]
