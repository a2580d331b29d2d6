"""Tables of what was measured on this machine, as JSON files beside the compiled kernels.

A table has three levels above its entries, such as chip -> weight -> largest number of tokens.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.core.disk.atomic import write_whole
from secateur.core.disk.data_files import read_json
from secateur.formats.kernels.cubins import folder

Table = dict[str, dict[str, dict[str, str]]]


@dataclass(frozen=True)
class Entries:
    """What the entries of a table are called, and how one is read.

    `parse` raises ValueError for a text that is none; `remedy` says what to do about such a file.
    """

    title: str
    parse: Callable[[str], object]
    remedy: str

    def damaged(self, path: Path, error: Exception) -> ValueError:
        """The error for a file that holds no such table."""
        return ValueError(
            f"{path} needs to be a table of {self.title}, got: {error}: {self.remedy}"
        )


def integers(text: str, count: int, title: str) -> list[int]:
    """The numbers of an entry that are written with commas between them.

    Raises: ValueError unless the text has this many integers.
    """
    numbers = [int(word) for word in text.split(",")]
    if len(numbers) != count:
        raise ValueError(f"{title} needs {count} numbers, got {text!r}")
    return numbers


def own_file(name: str) -> Path:
    """The file of this name beside the compiled kernels.

    Raises: RuntimeError where `folder` does, for a user without a home.
    """
    return folder().parent / name


def chip(device: torch.device) -> str:
    """The chip that a measurement holds for: `NVIDIA H200, 132 SMs`."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.multi_processor_count} SMs"


def read(path: Path, entries: Entries) -> Table:
    """The table in a file, empty where there is none that can be read.

    Raises: ValueError if the file is no such table; it names the file.
    """
    try:
        table = read_json(path)
    except OSError:
        return {}
    except ValueError as error:
        raise entries.damaged(path, error) from None
    try:
        for second in table.values():
            for third in second.values():
                for text in third.values():
                    if not isinstance(text, str):
                        raise ValueError(f"{text!r} is no text")
                    entries.parse(text)
    except (ValueError, AttributeError) as error:
        raise entries.damaged(path, error) from error
    return table


def add(path: Path, entries: Entries, place: tuple[str, str, str], text: str) -> None:
    """Add the entry to the table in the file, beside all that it has.

    The file appears whole or stays as it was. Of two processes that add at once, one entry may be
    lost, and is measured again.

    Raises: OSError if the file cannot be written; ValueError if it holds something else.
    """
    table = read(path, entries)
    first, second, third = place
    table.setdefault(first, {}).setdefault(second, {})[third] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(table, indent=1, sort_keys=True) + "\n")
