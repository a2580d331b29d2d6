"""The presets: the ways to reconstruct that lose least, under short names."""

from secateur.reconstruct.alps import alps
from secateur.reconstruct.blockwise import blockwise

best = blockwise(alps)
"""`sc.blockwise(sc.alps)` under a short name: what loses least without retraining.

`sc.reconstruct_(model, plan, sc.best, batches)`. Before it starts, a line on stderr says about how
long it takes and how much memory: `secateur.reconstruct.estimate`. Where that is too much,
`sc.alps` alone is the next best.
"""

thorough = blockwise(alps, distil=4)
"""`sc.best`, and then the kept weights of the whole model trained together: what loses least.

`sc.reconstruct_(model, plan, sc.thorough, batches)`, for models small enough that the device holds
two copies in float32 and three times the planned weights. Before it starts, it says what it takes,
as `sc.best` does.
"""
