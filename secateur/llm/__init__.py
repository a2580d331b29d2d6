"""Text from a language model: the loop, and what runs its steps."""

from secateur.llm.custom_generate import custom_generate
from secateur.llm.generate import generate
from secateur.llm.kernel_steps import KernelSteps, steps_of
from secateur.llm.steps import ModelSteps, Steps

__all__ = ["KernelSteps", "ModelSteps", "Steps", "custom_generate", "generate", "steps_of"]
