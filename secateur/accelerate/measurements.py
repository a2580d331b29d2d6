"""What `accelerate_` measured on this machine, kept on disk so that it is measured once.

The file is `measured.json` beside the compiled kernels: device and versions -> layer -> number of
tokens -> the microseconds of each candidate, and why others were not among them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite

import torch

from secateur.accelerate.candidates import DENSE
from secateur.core.disk.data_files import parse_json
from secateur.core.processor import processor
from secateur.core.version import VERSION
from secateur.formats.kernels.cubins import warn_unkept
from secateur.formats.kernels.measured import Entries, add, chip, own_file, read

FILE = "measured.json"


@dataclass(frozen=True)
class Measurement:
    """One layer at one number of tokens: the median microseconds of each candidate.

    `cannot` is what implementations said that cannot run here, by candidate, `dropped` why others
    have no time: out of memory, a library's error, a wrong result. `steady` is whether the machine
    was quiet enough for the times to be kept.
    """

    microseconds: Mapping[str, float]
    cannot: Mapping[str, str]
    dropped: tuple[str, ...]
    remembered: bool = False
    steady: bool = True


def parse(text: str) -> Measurement:
    """The measurement that `store` wrote.

    Raises: ValueError if the text is none.
    """
    entry = parse_json(text, "a measurement")
    try:
        times = dict(entry["microseconds"])
        cannot, dropped = dict(entry["cannot"]), tuple(entry["dropped"])
        right = (
            DENSE in times
            and all(type(us) is float and isfinite(us) and us > 0 for us in times.values())
            and all(type(reason) is str for reason in (*cannot.values(), *dropped))
        )
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"a measurement needs times and reasons, got {text!r}")
    return Measurement(times, cannot, dropped, remembered=True)


ENTRIES = Entries("measurements", parse, "delete it, and accelerate_ measures again")


def lookup(device: torch.device, layer: str, tokens: int) -> Measurement | None:
    """What was measured for such a layer on such a device with these versions, if anything.

    Raises: ValueError if the file is damaged; it names the file.
    """
    try:
        table = read(own_file(FILE), ENTRIES)
    except RuntimeError:  # a user without a home
        return None
    text = table.get(place(device), {}).get(layer, {}).get(str(tokens))
    return None if text is None else parse(text)


def store(device: torch.device, layer: str, tokens: int, found: Measurement) -> None:
    """Store the measurement in this machine's file; warn once if it cannot be written.

    Raises: ValueError if the file is damaged; it names the file.
    """
    entry = asdict(found)
    del entry["remembered"], entry["steady"]
    entry["microseconds"] = {name: float(us) for name, us in found.microseconds.items()}
    try:
        add(own_file(FILE), ENTRIES, (place(device), layer, str(tokens)), json.dumps(entry))
    except OSError as error:
        warn_unkept("measurements", error.strerror or str(error), "measures")
    except RuntimeError as error:  # a user without a home
        warn_unkept("measurements", str(error), "measures")


def place(device: torch.device) -> str:
    """What a time holds for: the device (a processor with its threads in use) and the versions."""
    if device.type == "cuda":
        where = chip(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        where = f"{processor()}, {capability}, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, secateur {VERSION}"
