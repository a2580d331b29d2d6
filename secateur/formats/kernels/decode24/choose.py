"""The launch config to use: measured on this chip, or by a cost model where none was measured.

Measured launch configs come from two tables of the same form: one in the package, and one that
`secateur tune` writes beside the compiled kernels, which goes first. A table is JSON:
chip -> weight ("int4/128 4096x14336") -> largest number of tokens, or `step` -> launch config.
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
from secateur.formats.kernels.decode24.cost_model import by_cost_model
from secateur.formats.kernels.decode24.launch_configs import PORTABLE
from secateur.formats.kernels.measured import Entries, Table, add, chip, own_file, read

PACKAGED = Path(__file__).parent / "tuned.json"
STEP = "step"  # the key of launch configs that were measured within a decode step
CONFIGS = Entries("launch configs", LaunchConfig.parse, "delete it and run `secateur tune`")


def own_table() -> Path:
    """The file of launch configs measured on this machine."""
    return own_file("decode24.json")


def choose(case: Case, device: torch.device, in_step: bool = False) -> LaunchConfig:
    """The launch config for this case on this device.

    `in_step` is for a launch among others of a decode step, for which a table can have another one,
    measured in that company under `STEP` in place of a number of tokens.
    """
    for path in _places():
        measured = _table(path).get(chip(device), {}).get(case.weight, {})
        for key in (STEP, str(case.tokens)) if in_step else (str(case.tokens),):
            if key in measured:
                return LaunchConfig.parse(measured[key])
    capability = torch.cuda.get_device_capability(device)
    if capability < CLUSTERS_FROM:
        return PORTABLE
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return by_cost_model(case, count, warpgroups=capability == WARPGROUPS_ON)


def remember(path: Path, chip_name: str, case: Case, config: LaunchConfig) -> None:
    """Store this launch config for the case in the table of the file, beside all that it had.

    The file appears whole or stays as it was. A layer that has run already keeps its config until
    the process ends.

    Raises: OSError if the file cannot be written; ValueError if it holds something else.
    """
    add(path, CONFIGS, (chip_name, case.weight, str(case.widest.tokens)), str(config))
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
    return read(path, CONFIGS)
