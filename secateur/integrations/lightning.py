"""Zeros held under Lightning's Trainer: a callback, whose state is in Lightning's checkpoints.

It is imported by name, since Lightning takes seconds to import.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from secateur.train import Held, Rule, hold


class SecateurCallback(Callback):  # type: ignore[misc]
    """`hold` from the beginning of a Trainer's training to its end, in its checkpoints too.

    What is held is in `held`, from the first step to the next training. `rule` is as for `hold`.
    Gradients are masked at each backward, so that clipping sees the kept weights' norm.

    Raises: ValueError as `hold` when training begins, and if it resumes from a checkpoint that was
        made without this callback.
    Needs: lightning.
    """

    def __init__(self, rule: Rule | None = None) -> None:
        self.rule = rule
        self.held: Held | None = None
        self._resumed: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()  # of a training that has failed
        if trainer.global_step and self._resumed is None:
            raise ValueError(
                "training resumes from a checkpoint without the masks of its hold: begin a new "
                "training from its weights"
            )
        self.held = hold(pl_module, trainer.optimizers, self.rule)
        try:
            if self._resumed is not None:
                self.held.load_state_dict(self._resumed)
                self._resumed = None
            self.held.mask_gradients_early()
        except BaseException:
            self.held.release()
            raise

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes into each checkpoint."""
        return {} if self.held is None else {"held": self.held.state_dict(whole=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning hands back before training begins."""
        self._resumed = state_dict.get("held")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self.held is not None:
            self.held.release()
