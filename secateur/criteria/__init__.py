"""Criteria: functions `(weight, statistic...) -> score`; the larger score is kept.

The parameter names after `weight` say which statistics a criterion needs (`secateur.statistics`).
"""

from secateur.criteria.magnitude import magnitude, magnitude_l2
from secateur.criteria.random import random
from secateur.criteria.wanda import wanda

__all__ = ["magnitude", "magnitude_l2", "random", "wanda"]
