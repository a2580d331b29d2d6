"""Out-of-memory errors that say what the memory was for, and what needs less of it."""

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a failed allocation, which on a CPU torch raises as a RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def room_for(layers: Sequence[str], what: str, remedy: str) -> Iterator[None]:
    """Report an allocation that fails in the block in one line: the layers, `what`, the remedy.

    Raises:
        MemoryError: if one fails; on a GPU torch.OutOfMemoryError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error.__cause__, (RuntimeError, MemoryError)):
            raise  # another error, or one that says this already
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        kind = torch.OutOfMemoryError if on_gpu else MemoryError
        more = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
        raise kind(
            f"layer {layers[0]}{more}: not enough memory for {what}{_asked(error)}: {remedy}"
        ) from error


def _asked(error: BaseException) -> str:
    """The size of the failed allocation, as words for the message; empty if it is not known."""
    if found := re.search(r"tried to allocate (\d+) bytes", str(error), re.IGNORECASE):
        return f", which took {int(found[1]) / 1e9:.1f} GB more"
    if found := re.search(r"Tried to allocate ([\d.]+ [KMGT]iB)", str(error)):
        return f", which took {found[1]} more"
    return ""
