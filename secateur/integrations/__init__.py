"""Other libraries: one file each, the only place where that library is imported."""

import warnings
from importlib import import_module

from secateur.integrations.when_imported import when_imported


def _plug_into_transformers() -> None:
    try:
        import_module("secateur.integrations.transformers_quantizer")  # it registers itself
    except ImportError as error:
        warnings.warn(
            f"packed folders cannot be loaded by this release of transformers ({error}): "
            "pip install -U 'secateur[hf]'",
            stacklevel=2,
        )


when_imported("transformers.quantizers.auto", _plug_into_transformers)
