"""Schedulers: sparsity levels given by a function of the epoch, or along a cubic curve."""

from collections.abc import Callable, Sequence
from numbers import Real

from secateur.compat.torchao.base_scheduler import BaseScheduler
from secateur.compat.torchao.base_sparsifier import BaseSparsifier
from secateur.compat.torchao.names import in_short


class LambdaSL(BaseScheduler):
    """The final level times `sl_lambda(epoch)`, one function for all groups or one for each.

    The product is passed on unchanged, even above 1. `state_dict` has no functions.

    Raises:
        ValueError: if there is not one function for each group.
    """

    def __init__(
        self,
        sparsifier: BaseSparsifier,
        sl_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.sparsifier = sparsifier
        self.sl_lambdas = self._make_sure_a_list(sl_lambda, "sl_lambda")
        for function in self.sl_lambdas:
            if not callable(function):
                raise ValueError(
                    f"LambdaSL needs functions of the epoch, got {in_short(function)}: write "
                    "lambda epoch: min(epoch / 10, 1) to reach the level after ten"
                )
        super().__init__(sparsifier, last_epoch, verbose)

    def get_sl(self) -> list[float]:
        return [
            base * function(self.last_epoch)
            for base, function in zip(self.base_sl, self.sl_lambdas, strict=True)
        ]


class CubicSL(BaseScheduler):
    """s_f + (s_0 - s_f) (1 - (t - t_0) / (n dt))^3 from t_0 on, s_f after n dt steps.

    s_0 is `init_sl`, s_f the group's own level, t_0 `init_t`, n `total_t`, dt `delta_t`; each is
    one number for all groups or one for each. The level changes at every step: `delta_t` makes the
    schedule longer, not coarser. It may fall as well as rise. Before t_0 it is s_0, or 0 if
    `initially_zero`.

    Source: Zhu and Gupta, arXiv:1710.01878, eq. 1.
    Raises:
        ValueError: if there is not one number for each group, or n dt is not positive.
    """

    def __init__(
        self,
        sparsifier: BaseSparsifier,
        init_sl: float | Sequence[float] = 0.0,
        init_t: int | Sequence[int] = 0,
        delta_t: int | Sequence[int] = 10,
        total_t: int | Sequence[int] = 100,
        initially_zero: bool | Sequence[bool] = False,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.sparsifier = sparsifier
        self.init_sl = self._make_sure_a_list(init_sl, "init_sl")
        self.init_t = self._make_sure_a_list(init_t, "init_t")
        self.delta_t = self._make_sure_a_list(delta_t, "delta_t")
        self.total_t = self._make_sure_a_list(total_t, "total_t")
        self.initially_zero = self._make_sure_a_list(initially_zero, "initially_zero")
        for name in ("init_sl", "init_t", "delta_t", "total_t"):
            for value in vars(self)[name]:
                if not isinstance(value, Real):
                    raise ValueError(f"CubicSL needs {name} to be a number, got {in_short(value)}")
        for delta, total in zip(self.delta_t, self.total_t, strict=True):
            if delta <= 0 or total <= 0:
                raise ValueError(
                    f"CubicSL needs delta_t and total_t above 0, got {delta} and {total}: the "
                    "schedule is over after their product"
                )
        super().__init__(sparsifier, last_epoch, verbose)

    def get_sl(self) -> list[float]:
        settings = zip(
            self.init_sl,
            self.base_sl,
            self.init_t,
            self.delta_t,
            self.total_t,
            self.initially_zero,
            strict=True,
        )
        return [
            self.sparsity_compute_fn(s_0, s_f, self.last_epoch, *rest)
            for s_0, s_f, *rest in settings
        ]

    @staticmethod
    def sparsity_compute_fn(
        s_0: float, s_f: float, t: int, t_0: int, dt: int, n: int, initially_zero: bool = False
    ) -> float:
        """The level at step t."""
        # Not `schedules.cubic`, whose sparsities are below 1: a level may be 1.
        if t < t_0:
            return 0.0 if initially_zero else s_0
        left = max(1 - (t - t_0) / (n * dt), 0.0)
        return s_f + (s_0 - s_f) * left**3
