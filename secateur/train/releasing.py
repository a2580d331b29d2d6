"""What ends a rule of training: `release()`, or leaving the `with` block."""

from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Releasing:
    """What hooks into an optimizer until `release()`, or until a `with` block is left."""

    def release(self) -> None:
        raise NotImplementedError

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
