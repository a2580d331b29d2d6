"""Text from a language model: the loop, and what runs its steps."""

from secateur.llm.generate import generate
from secateur.llm.steps import ModelSteps, Steps, steps_of

__all__ = ["ModelSteps", "Steps", "generate", "steps_of"]
