"""The state of a training run on disk, from which the same run goes on bit for bit."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.tensor_files import load_file, save_file

PROGRESS = "progress.json"

# What AdamW keeps of a parameter; its step count is a tensor too.
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class TrainingState:
    """A folder with parameters and AdamW moments in a safetensors file, `progress.json` beside it.

    `fingerprint` is plain data that says which run this is; another run's folder is refused.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._progress = self.folder / PROGRESS
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self.losses: list[float] = []
        self.seconds = 0.0
        self._file = ""
        if self._progress.exists():
            self._read()
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"checkpoint needs an empty folder or its own, {self.folder} has other files"
            )

    def restore(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Put the parameters and moments back; nothing if no step has been kept."""
        if not self._file:
            return
        state = load_file(self.folder / self._file)
        for name, parameter in parameters.items():
            parameter.data.copy_(state[f"parameter/{name}"])
            if f"step/{name}" in state:
                optimizer.state[parameter] = {
                    # AdamW counts steps on the CPU, and keeps moments beside the parameter
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
        """Keep this step in the place of the one before; a kill leaves one or the other."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"parameter/{name}"] = _on_cpu(parameter)
            tensors |= {
                f"{key}/{name}": _on_cpu(value)
                for key, value in optimizer.state.get(parameter, {}).items()
            }
        self.folder.mkdir(parents=True, exist_ok=True)
        file = f"step-{len(losses):08}.safetensors"
        save_file(tensors, self.folder / file)
        partial = self._progress.with_suffix(".partial")
        progress = {
            "fingerprint": self._fingerprint,
            "file": file,
            "losses": list(losses),
            "seconds": seconds,
        }
        partial.write_text(json.dumps(progress))
        partial.replace(self._progress)
        if self._file not in ("", file):
            (self.folder / self._file).unlink(missing_ok=True)
        self._file = file

    def _read(self) -> None:
        try:
            progress = json.loads(self._progress.read_text())
            known = progress["fingerprint"]
            self._file, self.losses = str(progress["file"]), [float(x) for x in progress["losses"]]
            self.seconds = float(progress["seconds"])
            different = [key for key, value in self._fingerprint.items() if known[key] != value]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._progress} is not a checkpoint: {error!r}") from None
        if different:
            raise ValueError(
                f"the checkpoint in {self.folder} belongs to another run, its {different[0]} "
                "differs: choose an empty folder, or repeat the call that began it"
            )
        if not (self.folder / self._file).is_file():
            raise ValueError(f"the checkpoint in {self.folder} lacks {self._file}: begin again")


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy, because safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()
