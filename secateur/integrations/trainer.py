"""Zeros held under transformers' Trainer: a callback, and the file in its checkpoints.

It is imported by name, since transformers takes seconds to import.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.core.disk.data_files import parse_json
from secateur.core.disk.tensor_files import load_file, read_metadata, save_file
from secateur.train import Held, Rule, hold

FILE = "secateur-held.safetensors"
ENTRY = "secateur"  # in its metadata: all of the state but the masks, as JSON


class SecateurCallback(TrainerCallback):  # type: ignore[misc]
    """`hold` from the beginning of a Trainer's training to its end, in its checkpoints too.

    What is held is in `held`, from the first step to the next training. A training that resumes
    from a checkpoint goes on with the masks that lie there, in `secateur-held.safetensors`.

    `rule` is as for `hold`. `resume_from` is the checkpoint's folder where that is not the one of
    its step in `output_dir`.

    The Trainer clips gradients before it calls any callback, so they are masked at each backward:
    the norm is that of the kept weights' gradients.

    Raises: ValueError as `hold` when training begins, and if it resumes from a checkpoint that has
        no such file.
    Needs: `secateur[hf]` and accelerate.
    """

    def __init__(self, rule: Rule | None = None, resume_from: str | Path | None = None) -> None:
        self.rule, self.resume_from = rule, resume_from
        self.held: Held | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **ignored: Any,
    ) -> None:
        if self.held is not None:  # of a training that has failed
            self.held.release()
        self.held = hold(model, optimizer, self.rule)
        try:
            if state.global_step:
                folder = self.resume_from or _folder(args, state)
                self.held.load_state_dict(read_state(Path(folder) / FILE))
            self.held.mask_gradients_early()
        except BaseException:
            self.held.release()
            raise

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **ignored: Any,
    ) -> None:
        if self.held is not None:
            found = self.held.state_dict(whole=True)  # every process has a part in this
            if args.should_save:
                write_state(found, _folder(args, state) / FILE)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **ignored: Any,
    ) -> None:
        if self.held is not None:
            self.held.release()


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write the state of a hold: its masks as they are, the rest as JSON in the metadata.

    Raises:
        ValueError: if the rule remembers what is no plain data.
        OSError: if it cannot be written.
    """
    rest = {key: value for key, value in state.items() if key != "masks"}
    try:
        entry = json.dumps(rest)
    except TypeError as error:
        raise ValueError(
            f"the state of a rule goes into a file as plain data, numbers, strings and lists: "
            f"{error}"
        ) from error
    masks = {f"mask/{name}": mask.contiguous() for name, mask in state["masks"].items()}
    save_file(masks, path, {ENTRY: entry})


def read_state(path: Path) -> dict[str, Any]:
    """The state of a hold from a file that `write_state` has written.

    Raises: ValueError if there is no such file, or it has something else in it.
    """
    if not path.is_file():
        raise ValueError(
            f"training resumes from a checkpoint without the masks of its hold, {path}: pass "
            "SecateurCallback(resume_from=folder), or begin a new training from its weights"
        )
    entry = read_metadata(path).get(ENTRY)
    if entry is None:
        raise ValueError(f"{path} has no state of a hold: use the file that the callback wrote")
    masks = {name.removeprefix("mask/"): mask for name, mask in load_file(path).items()}
    return {**parse_json(entry, f"the metadata of {path}"), "masks": masks}


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer saves this step, and has resumed from, unless it was told otherwise."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
