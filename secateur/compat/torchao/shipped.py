"""The classes of `torch.ao.pruning` that torch still ships, so that ours are instances of them.

Once torch no longer ships them, a parametrization is a plain `nn.Module`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module as ShippedFakeSparsity
    from torch.nn import Module as ShippedFakeStructuredSparsity
else:
    try:
        from torch.ao.pruning import FakeSparsity as ShippedFakeSparsity
        from torch.ao.pruning._experimental.pruner import (
            FakeStructuredSparsity as ShippedFakeStructuredSparsity,
        )
    except ImportError:
        from torch.nn import Module as ShippedFakeSparsity
        from torch.nn import Module as ShippedFakeStructuredSparsity

__all__ = ["ShippedFakeSparsity", "ShippedFakeStructuredSparsity", "register_sparsifier"]


def register_sparsifier(kind: type) -> None:
    """Let code of torch that asks for a `torch.ao.pruning.BaseSparsifier` accept this class."""
    try:
        from torch.ao.pruning.sparsifier.base_sparsifier import BaseSparsifier
    except ImportError:
        return
    BaseSparsifier.register(kind)
