"""Which cut to launch: measured on this chip, or by a rule for what was not measured.

Measured cuts come from two tables of the same form: one in the package, and one that
`secateur tune` writes beside the compiled kernels, which goes first. A table is JSON:
chip -> weight ("int4/128 4096x14336") -> largest number of tokens -> cut.
"""

from functools import cache
from pathlib import Path

import torch

from secateur.formats.kernels.decode24.config import (
    CLUSTERS_FROM,
    WARPGROUPS_ON,
    Case,
    LaunchConfig,
)
from secateur.formats.kernels.decode24.cuts import PORTABLE
from secateur.formats.kernels.decode24.rule import by_rule
from secateur.formats.kernels.measured import Entries, Table, add, chip, own_file, read

PACKAGED = Path(__file__).parent / "tuned.json"
CUTS = Entries("cuts", LaunchConfig.parse, "delete it and run `secateur tune`")


def own_table() -> Path:
    """The file of cuts measured on this machine."""
    return own_file("decode24.json")


def choose(case: Case, device: torch.device) -> LaunchConfig:
    """The cut for this case on this device."""
    for path in _places():
        found = _table(path).get(chip(device), {}).get(case.weight, {}).get(str(case.tokens))
        if found is not None:
            return LaunchConfig.parse(found)
    capability = torch.cuda.get_device_capability(device)
    if capability < CLUSTERS_FROM:
        return PORTABLE
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return by_rule(case, count, warpgroups=capability == WARPGROUPS_ON)


def remember(path: Path, chip_name: str, case: Case, config: LaunchConfig) -> None:
    """Nothing; the table in the file now has this cut for the case, beside all that it had.

    The file appears whole or stays as it was. A layer that has run already keeps its cut until the
    process ends.

    Raises: OSError if the file cannot be written; ValueError if it holds something else.
    """
    add(path, CUTS, (chip_name, case.weight, str(case.widest.tokens)), str(config))
    _table.cache_clear()


def _places() -> tuple[Path, ...]:
    """The files to look in, in order; a user without a home has only the packaged one."""
    try:
        return own_table(), PACKAGED
    except RuntimeError:
        return (PACKAGED,)


@cache
def _table(path: Path) -> Table:
    """The table in a file, read once in a process."""
    return read(path, CUTS)
