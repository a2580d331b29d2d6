"""The names and shapes that transformers stores a model's tensors under, where they are others.

A Mixtral's file has a matrix for each expert, the model one tensor of them all. transformers' own
table of conversions says which; here it is followed for a few tensors at a time.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn


class StoredNames:
    """Which stored tensors each tensor of a transformers model is made of, and the way back.

    `sources` maps a name in the model to the names in the files; what is stored under its own name
    is not in it.
    """

    def __init__(self, model: nn.Module, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self._model: Any = model
        table = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        own = model.state_dict()
        self.sources: dict[str, list[str]] = {}
        self._converters: dict[str, Any] = {}
        self._patterns: dict[str, str] = {}
        by_pattern = {key: entry for entry in converters for key in entry.source_patterns}
        for key in sorted(stored, key=dot_natural_key):
            if key in own:
                continue
            name, pattern = rename_source_key(
                key, renamings, converters, self._model.base_model_prefix, own
            )
            if name not in own:
                continue
            if pattern is not None:
                self._converters[name] = by_pattern[pattern]
            self._patterns[key] = pattern or key
            self.sources.setdefault(name, []).append(key)

    def made_of(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The model's tensor of this name, of the stored ones that `read` gives."""
        sources = self.sources[name]
        if name not in self._converters:
            return read(sources[-1])
        converter = deepcopy(self._converters[name])
        for key in sources:
            converter.add_tensor(name, key, self._patterns[key], read(key))
        made = converter.convert(name, model=self._model, config=self._model.config)
        found = made[name]
        tensor: Tensor = found[0] if isinstance(found, list) else found
        return tensor

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These tensors of the model under the names and in the shapes of files."""
        from transformers.core_model_loading import revert_weight_conversion

        others = {name: tensor for name, tensor in tensors.items() if name in self.sources}
        same = {name: tensor for name, tensor in tensors.items() if name not in self.sources}
        return same | revert_weight_conversion(self._model, others) if others else same
