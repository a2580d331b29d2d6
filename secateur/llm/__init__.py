"""Text from a language model: the loop, and what runs its steps."""

from secateur.llm.custom_generate import custom_generate
from secateur.llm.generate import generate
from secateur.llm.steps import ModelSteps, Steps, steps_of

__all__ = ["ModelSteps", "Steps", "custom_generate", "generate", "steps_of"]
