"""The verbs that change a model's weights; one that raises has changed nothing."""

from secateur.prune.decompose import decompose_
from secateur.prune.factorise import as_pairs_, factorise_
from secateur.prune.permute import permute_
from secateur.prune.shrink import shrink_
from secateur.prune.verbs import check, prune_, reconstruct_

__all__ = [
    "as_pairs_",
    "check",
    "decompose_",
    "factorise_",
    "permute_",
    "prune_",
    "reconstruct_",
    "shrink_",
]
