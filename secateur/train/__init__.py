"""Training with zeros: `hold` keeps them, rules move them, `distil_` recovers what they cost."""

from secateur.train.distil import DistilReport, distil_
from secateur.train.gradual import gradual
from secateur.train.hold import Held, Rule, hold

__all__ = ["DistilReport", "Held", "Rule", "distil_", "gradual", "hold"]
