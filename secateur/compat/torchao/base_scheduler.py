"""The base class of schedulers, which set each group's level for the sparsifier's next step."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from secateur.compat.torchao.base_sparsifier import BaseSparsifier

T = TypeVar("T")


class BaseScheduler:
    """Sparsity levels that change with the epoch, by a subclass's `get_sl`.

    `base_sl` holds the groups' levels at construction, where a schedule should end. `last_epoch` is
    the epoch whose levels are in force; construction steps once, to epoch 0.

    Raises:
        TypeError: if it is not given a sparsifier of this package, or the class has no `get_sl`.
        ValueError: if the sparsifier is not prepared, or its groups have no sparsity level.
    """

    def __init__(
        self, sparsifier: BaseSparsifier, last_epoch: int = -1, verbose: bool = False
    ) -> None:
        if not isinstance(sparsifier, BaseSparsifier):
            raise TypeError(
                f"{type(self).__name__} needs a sparsifier of secateur.compat.torchao, got a "
                f"{type(sparsifier).__module__}.{type(sparsifier).__name__}: import it from there"
            )
        if type(self).get_sl is BaseScheduler.get_sl:
            raise TypeError(f"{type(self).__name__} needs a method get_sl(self) -> list of levels")
        if not sparsifier.groups:
            raise ValueError(
                f"{type(self).__name__} needs a prepared sparsifier: call prepare(model, config) "
                "first"
            )
        for group in sparsifier.groups:
            if "sparsity_level" not in group:
                raise ValueError(
                    f"{type(self).__name__} needs groups with a sparsity_level, "
                    f"{group['tensor_fqn']} has none: give one in the config"
                )
        self.sparsifier = sparsifier
        self.base_sl = [float(group["sparsity_level"]) for group in sparsifier.groups]
        self.last_epoch = last_epoch
        self.verbose = verbose
        self._step_count = 0
        self._get_sl_called_within_step = False
        self._last_sl: list[float] = []
        self.step()

    def get_sl(self) -> list[float]:
        """The level of each group at `last_epoch`."""
        raise NotImplementedError

    def get_last_sl(self) -> list[float]:
        """The levels that the last step wrote."""
        return list(self._last_sl)

    def step(self, epoch: int | None = None) -> None:
        """Advance by one epoch: write the levels and let the sparsifier update its masks.

        `epoch` is only used in what is printed.

        Raises:
            ValueError: before anything is changed, if there is not one level for each group.
        """
        if self._step_count == 1 and self.sparsifier.step_count == 0:
            warnings.warn(
                f"{type(self).__name__}.step() comes before the first sparsifier.step(): call the "
                "sparsifier first, or it skips the first level",
                UserWarning,
                stacklevel=2,
            )
        self.last_epoch += 1
        self._get_sl_called_within_step = True
        try:
            levels = self.get_sl()
            groups = self.sparsifier.groups
            if len(levels) != len(groups):
                raise ValueError(
                    f"{type(self).__name__} needs a level for each of the {len(groups)} groups, "
                    f"got {len(levels)}: make a new scheduler after prepare"
                )
        except BaseException:
            self.last_epoch -= 1
            raise
        finally:
            self._get_sl_called_within_step = False
        self._step_count += 1
        for i, (group, level) in enumerate(zip(groups, levels, strict=True)):
            group["sparsity_level"] = level
            self.print_sl(self.verbose, i, level, epoch)
        self._last_sl = list(levels)
        self.sparsifier.enable_mask_update = True

    def _make_sure_a_list(self, var: T | Sequence[T], name: str = "the setting") -> list[T]:
        """A value for each group: the same for all, or one from a list with a value for each.

        Raises:
            ValueError: if a list has another length.
        """
        # The constructor refuses anything but a sparsifier later.
        n = len(self.sparsifier.groups) if isinstance(self.sparsifier, BaseSparsifier) else 1
        if not isinstance(var, (list, tuple)):
            return [var] * n  # type: ignore[list-item]  # a Sequence that is one value: none here
        if len(var) != n:
            raise ValueError(
                f"{name} needs a value for each of the {n} groups, got {len(var)}: give one for "
                "all of them, or a list as long as sparsifier.groups"
            )
        return list(var)

    def print_sl(self, is_verbose: bool, group: int, sl: float, epoch: int | None = None) -> None:
        """Print the level of a group, if asked to."""
        if is_verbose:
            at = "" if epoch is None else f"epoch {epoch}: "
            print(f"{at}sparsity level of group {group} is {sl:.4e}")

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that changes: all but the sparsifier and functions."""
        return {
            key: copy.deepcopy(value)
            for key, value in vars(self).items()
            if key != "sparsifier" and not _is_code(value)
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume where another scheduler stopped; load the sparsifier's state as well."""
        vars(self).update(copy.deepcopy(dict(state_dict)))

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.state_dict().items())
        return f"{type(self).__name__}({settings})"


def _is_code(value: Any) -> bool:
    """Whether this is a function or a list with one in it, not data."""
    return callable(value) or (isinstance(value, list) and any(callable(v) for v in value))
