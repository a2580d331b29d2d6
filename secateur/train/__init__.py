"""Training with zeros: `hold` keeps them, rules move them, `distil_` recovers what they cost."""

from secateur.train.gradual import gradual
from secateur.train.hold import Held, Rule, hold

__all__ = ["Held", "Rule", "gradual", "hold"]
