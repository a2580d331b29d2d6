"""The names of `torchao.quantization` that have a format here, all from its `quant_api`."""

from secateur.compat.torchao.quantization import quant_api
from secateur.compat.torchao.quantization.quant_api import *  # noqa: F403  # all of __all__

__all__ = quant_api.__all__
