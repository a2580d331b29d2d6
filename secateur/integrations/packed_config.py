"""What the `config.json` of a packed folder says about its layers, as transformers reads it."""

import re
from collections.abc import Mapping
from typing import Any

from secateur.core.disk.tensor_files import SUFFIX, is_plain_name
from secateur.formats.pack import QUANT_METHOD

VERSION = 1  # of the packed form in a transformers folder

# The weights of a folder that `sc.save` wrote, or their index. The name alone keeps a file from
# being any other of the folder, or one elsewhere.
WEIGHTS = re.compile(rf"model\.secateur[\w-]*{re.escape(SUFFIX)}(\.index\.json)?")

Description = Mapping[str, int | str | bool]


def packed_config(packed: Mapping[str, Description], weights: str) -> dict[str, Any]:
    """The `quantization_config`: a description of each packed layer, and the file with weights."""
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "weights": weights,
        "packed": {name: dict(description) for name, description in packed.items()},
    }


def require_readable(version: object, weights: object, packed: object) -> None:
    """Check what a `quantization_config` says, but for the descriptions themselves.

    Raises:
        ValueError: for another version of the packed form, a file that may not be named, or what
            maps no names to descriptions.
    """
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise ValueError(
            f"config.json has version {version!r} of secateur's packed form, this secateur reads "
            f"version {VERSION}: {'pip install -U secateur' if newer else 'save the model again'}"
        )
    if weights is not None and not (
        isinstance(weights, str) and is_plain_name(weights) and WEIGHTS.fullmatch(weights)
    ):
        raise ValueError(
            f"config.json names the weight file {weights!r}, which is none that sc.save writes: "
            "copy the folder again, or save the model again"
        )
    if not isinstance(packed, dict) or not all(
        isinstance(name, str) and isinstance(entry, dict) for name, entry in packed.items()
    ):
        raise ValueError(
            "config.json needs a description of each packed layer under quantization_config, "
            f"got {type(packed).__name__}: copy the folder again, or save the model again"
        )
