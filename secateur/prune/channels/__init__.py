"""Physically smaller layers: which channels can go, and taking them out of all that use them.

`follow` runs the model once and finds its units: channels that can only go together. `least` and
`dropped` turn scores or masks into a choice of units, `removable` says which of them can go and why
the others stay, and `remove_` takes them out of a model in which they are zero.
"""

from secateur.prune.channels.channels import Channels, Followed, Removed, follow
from secateur.prune.channels.choose import all_but_one, dropped, isolated, least
from secateur.prune.channels.constants import removable, zeroed
from secateur.prune.channels.restore import as_it_was, with_tensors
from secateur.prune.channels.shrink import remove_

__all__ = [
    "Channels",
    "Followed",
    "Removed",
    "all_but_one",
    "as_it_was",
    "dropped",
    "follow",
    "isolated",
    "least",
    "removable",
    "remove_",
    "with_tensors",
    "zeroed",
]
