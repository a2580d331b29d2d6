"""Criteria: functions `(weight, statistic...) -> score`; the largest scores are kept.

The names of the parameters after `weight` say which statistics a criterion needs
(`secateur.model.statistics`).
"""

from secateur.criteria.fisher import fisher
from secateur.criteria.magnitude import magnitude, magnitude_l2
from secateur.criteria.random import random
from secateur.criteria.ria import ria
from secateur.criteria.snip import snip
from secateur.criteria.taylor import taylor
from secateur.criteria.wanda import wanda
from secateur.criteria.wanda_regional import wanda_regional

__all__ = [
    "fisher",
    "magnitude",
    "magnitude_l2",
    "random",
    "ria",
    "snip",
    "taylor",
    "wanda",
    "wanda_regional",
]
