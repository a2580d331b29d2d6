"""Training with zeros: `hold` keeps them, rules move or learn them, `distil_` recovers the loss."""

from secateur.train.distil import DistilReport, distil_
from secateur.train.dynamic import rigl, sparse_evolution
from secateur.train.gradual import gradual
from secateur.train.hold import Held, Move, Mover, Rule, hold
from secateur.train.learn import Learning, learn_masks_
from secateur.train.loss import WithTask
from secateur.train.movement import Moving, movement, soft_movement
from secateur.train.steps import release
from secateur.train.straight_through import Learner, SoftThreshold, StraightThrough, Supermask

__all__ = [
    "DistilReport",
    "Held",
    "Learner",
    "Learning",
    "Move",
    "Mover",
    "Moving",
    "Rule",
    "SoftThreshold",
    "StraightThrough",
    "Supermask",
    "WithTask",
    "distil_",
    "gradual",
    "hold",
    "learn_masks_",
    "movement",
    "release",
    "rigl",
    "soft_movement",
    "sparse_evolution",
]
