"""The prefill kernel for 16-bit inputs: `x @ W.T` for a 2:4 weight at many tokens, on Hopper.

It reads the decode kernel's units, so that a layer holds one weight for any number of tokens.
`kernel.cu` tells how it works.
"""

from secateur.formats.kernels.prefill16.multiply import multiply, why_not
from secateur.formats.kernels.prefill24.multiply import ACTIVATIONS

__all__ = ["ACTIVATIONS", "multiply", "why_not"]
