"""Which cut to launch: measured on this chip, or by a rule for what was not measured.

Measured cuts come from two tables of the same form: one in the package, and one that
`secateur tune` writes beside the compiled kernels, which goes first. A table is JSON:
chip -> weight ("int4/128 4096x14336") -> largest number of tokens -> cut.
"""

import json
import uuid
from functools import cache
from pathlib import Path

import torch

from secateur.formats.decode24.config import CLUSTERS_FROM, WARPGROUPS_ON, Case, Config
from secateur.formats.decode24.cuts import PORTABLE
from secateur.formats.decode24.rule import by_rule
from secateur.kernels.cubins import folder

Table = dict[str, dict[str, dict[str, str]]]

PACKAGED = Path(__file__).parent / "tuned.json"


def own_table() -> Path:
    """The file of cuts measured on this machine."""
    return folder().parent / "decode24.json"


def chip(device: torch.device) -> str:
    """What a measured cut holds for: `NVIDIA H200, 132 SMs`."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.multi_processor_count} SMs"


def choose(case: Case, device: torch.device) -> Config:
    """The cut for this case on this device."""
    for path in _places():
        found = _table(path).get(chip(device), {}).get(case.weight, {}).get(str(case.tokens))
        if found is not None:
            return Config.parse(found)
    capability = torch.cuda.get_device_capability(device)
    if capability < CLUSTERS_FROM:
        return PORTABLE
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return by_rule(case, count, warpgroups=capability == WARPGROUPS_ON)


def remember(path: Path, chip_name: str, case: Case, config: Config) -> None:
    """Nothing; the table in the file now has this cut for the case, beside all that it had.

    The file appears whole or stays as it was. A layer that has run already keeps its cut until the
    process ends.

    Raises: OSError if the file cannot be written; ValueError if it holds something else.
    """
    table = _read(path)
    weights = table.setdefault(chip_name, {})
    weights.setdefault(case.weight, {})[str(case.widest.tokens)] = str(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
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
    return _read(path)


def _read(path: Path) -> Table:
    """The table in a file, empty where there is none that can be read.

    Raises: ValueError if the file is no such table; it names the file.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return {}
    try:
        table = json.loads(data)
        for weights in table.values():
            for cuts in weights.values():
                for cut in cuts.values():
                    Config.parse(str(cut))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} needs to be a table of cuts, got: {error}: delete it and run `secateur tune`"
        ) from error
    return table  # type: ignore[no-any-return]
