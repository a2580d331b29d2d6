"""A format for each layer, measured on this machine; dense where dense wins."""

from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.training import AcceleratedTraining, accelerate_training_
from secateur.accelerate.verb import accelerate_

__all__ = ["AccelerateReport", "AcceleratedTraining", "accelerate_", "accelerate_training_"]
