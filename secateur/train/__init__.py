"""Training with zeros: `hold` keeps them, rules move them, `distil_` recovers what they cost."""

from secateur.train.distil import DistilReport, distil_
from secateur.train.gradual import gradual
from secateur.train.hold import Held, Rule, hold
from secateur.train.movement import Moving, movement, soft_movement
from secateur.train.steps import release

__all__ = [
    "DistilReport",
    "Held",
    "Moving",
    "Rule",
    "distil_",
    "gradual",
    "hold",
    "movement",
    "release",
    "soft_movement",
]
