"""Training with zeros: `hold` keeps them, rules move them, `distil_` recovers what they cost."""

from secateur.train.distil import DistilReport, distil_
from secateur.train.gradual import gradual
from secateur.train.hold import HeldMasks, Rule, hold
from secateur.train.movement import Moving, movement, soft_movement

__all__ = [
    "DistilReport",
    "HeldMasks",
    "Moving",
    "Rule",
    "distil_",
    "gradual",
    "hold",
    "movement",
    "soft_movement",
]
