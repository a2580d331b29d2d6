"""The state of a training run on disk, from which the same run resumes bit for bit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.disk.checkpoint import RunFolder

# What AdamW keeps of a parameter; its step count is a tensor too.
MOMENTS = ("exp_avg", "exp_avg_sq", "step")

STEPS = r"step-\d{8,}\.safetensors"


class TrainingState:
    """A folder with the parameters and AdamW moments of the last step that was saved."""

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self._folder = RunFolder(folder, fingerprint, STEPS)
        self._file, self.losses, self.seconds = "", list[float](), 0.0
        try:
            for file in self._folder.files()[-1:]:
                description = self._folder.description(file)
                self.losses = [float(loss) for loss in description["losses"]]
                self.seconds = float(description["seconds"])
                self._file = file
        except BaseException:
            self._folder.close()
            raise

    def __enter__(self) -> "TrainingState":
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.close()

    def restore(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Restore the parameters and moments, if a step has been saved."""
        if not self._file:
            return
        state = self._folder.tensors(self._file)
        for name, parameter in parameters.items():
            parameter.data.copy_(state[f"parameter/{name}"])
            if f"step/{name}" in state:
                optimizer.state[parameter] = {
                    # AdamW counts steps on the CPU, and keeps moments on the parameter's device
                    key: value if key == "step" else value.to(parameter.device)
                    for key in MOMENTS
                    for value in [state[f"{key}/{name}"]]
                }

    def keep(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: Sequence[float],
        seconds: float,
    ) -> None:
        """Save this step in place of the one before; a kill leaves one of the two."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"parameter/{name}"] = parameter
            tensors |= {
                f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()
            }
        self._file = f"step-{len(losses):08}.safetensors"
        self._folder.write(self._file, tensors, {"losses": list(losses), "seconds": seconds})
        for file in self._folder.files():
            if file != self._file:
                self._folder.remove(file)
