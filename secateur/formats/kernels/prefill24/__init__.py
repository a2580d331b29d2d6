"""Kernels for 2:4 weights of 8-bit codes and inputs rounded to such, at many tokens on Hopper."""

from secateur.formats.kernels.prefill24.arrange import arrange, restore
from secateur.formats.kernels.prefill24.multiply import ACTIVATIONS, linear, why_not

__all__ = ["ACTIVATIONS", "arrange", "linear", "restore", "why_not"]
