"""transformers' quantizer plug-in: `from_pretrained` of a packed folder, and `save_pretrained`.

It registers itself when it is imported, which happens as soon as transformers' own registry has
been. A folder that `sc.save` wrote has its weights in a file that only this plug-in looks for.
`save_pretrained` writes under the stock name instead, and so that a loader without the plug-in
stops: the values of a packed layer are stored under the name of its dense weight, in one dimension,
which no dense weight has.

The hooks are those of transformers 5.15 to 5.24, which have been renamed in between: two of them do
the same here.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.core.disk.tensor_files import SUFFIX
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.wrappers import base_name
from secateur.formats import SparseLinear, describe, empty_from, unpack_
from secateur.formats.pack import QUANT_METHOD, tell_writers
from secateur.integrations.packed_config import VERSION, Description, require_readable

AGAIN = "copy the folder again, or save the model again"
FLAG = "_is_hf_initialized"  # transformers sets it on each tensor that it has read


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed model: a description of each packed layer.

    `weights` is the file that has them, of a folder that `sc.save` wrote; it belongs to that folder
    and is not written with a model.
    """

    def __init__(
        self,
        packed: Mapping[str, Description],
        version: int = VERSION,
        weights: str | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        require_readable(version, weights, packed)
        self.quant_method, self.version = quant_method, version
        self.weights, self.packed = weights, packed

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a folder that `save_pretrained` writes."""
        packed = {name: dict(description) for name, description in self.packed.items()}
        return {"quant_method": self.quant_method, "version": self.version, "packed": packed}


class Quantizer(HfQuantizer):  # type: ignore[misc]
    """Makes the packed layers of a model that is loaded, and names their tensors when it is saved.

    A transformers model carries one as `hf_quantizer` for as long as layers of it are packed.
    """

    is_trainable = True  # adapters beside packed layers, and everything that is not packed
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    # --- loading, in the order of the calls --------------------------------------------------

    def validate_environment(self, *arguments: object, **ignored: object) -> None:
        """Refuse to pack what is loaded dense."""
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config packs no dense model: load it without, prune it, and call "
                "sc.pack_(model) or sc.accelerate_(model)"
            )

    def update_tp_plan(self, config: Any) -> Any:
        """Before 5.18: the last hook before transformers looks for the weight files."""
        return self._before_files(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Since then, the same."""
        return self._before_files(config)

    def _before_files(self, config: Any) -> Any:
        distributed = getattr(config, "distributed_config", None)
        size = getattr(distributed, "tp_size", None) or 1
        if size > 1 or getattr(distributed, "tp_plan", None):
            raise ValueError(
                f"packed layers cannot be split over devices yet, got tensor parallelism over "
                f"{size}: load the model without tp_plan and distributed_config, or sc.unpack_ it, "
                "save it and load that"
            )
        if self.quantization_config.weights is not None:
            config.transformers_weights = self.quantization_config.weights
        self._stored = getattr(config, "dtype", None)
        return config

    def update_dtype(self, dtype: Any) -> Any:
        """The dtype in which the model is stored, whatever is asked for."""
        stored = getattr(torch, self._stored) if isinstance(self._stored, str) else self._stored
        asked = dtype.get("", stored) if isinstance(dtype, dict) else dtype
        if stored is None or asked in (stored, str(stored).removeprefix("torch.")):
            return dtype if stored is None else stored
        warnings.warn(
            f"the model is packed in {stored} and is loaded so, though dtype={asked} was asked "
            f"for: cast it afterwards, model.to({asked})",
            stacklevel=2,
        )
        return stored

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **ignored: object
    ) -> None:
        """Put empty packed layers on the meta device, in the places of dense ones."""
        for file in map(Path, checkpoint_files or ()):
            if file.suffix != SUFFIX or not file.is_file():
                raise ValueError(
                    f"{file.parent} lacks its weight file {file.name}, or it is no {SUFFIX} file: "
                    f"{AGAIN}"
                )
        self._shapes: dict[str, torch.Size] = {}
        vars(model.config).pop("transformers_weights", None)  # that folder's, not the model's
        whole = type(model).__name__ in (model.config.architectures or ())
        for name, description in self.quantization_config.packed.items():
            place = _place(model, name)
            if place is not None:
                model.set_submodule(place, self._empty(model, place, dict(description)))
            elif whole:  # a model without a head, from a folder with one, has fewer layers
                raise ValueError(
                    f"config.json has a packed layer {name!r}, {type(model).__name__} has no "
                    f"linear layer of this name: {AGAIN}"
                )
        _untie(model)

    def _empty(self, model: nn.Module, place: str, description: dict[str, Any]) -> SparseLinear:
        """A layer without data that transformers fills, in the shapes in which it is stored."""
        dense: Any = model.get_submodule(place)
        try:
            layer = empty_from(description, place).to("meta")
        except ValueError as error:
            raise ValueError(f"config.json, packed layer {place!r}: {error}") from error
        if layer.shape != (dense.out_features, dense.in_features):
            raise ValueError(
                f"config.json has a packed layer {place!r} of {layer.out_features} x "
                f"{layer.in_features}, {type(model).__name__} has one of {dense.out_features} x "
                f"{dense.in_features}: {AGAIN}"
            )
        values = layer.packed["values"]
        self._shapes[place] = values.shape
        if self.quantization_config.weights is None:
            layer.values = values.flatten()
        setattr(layer, FLAG, True)  # else it is taken for an nn.Linear whose weight is drawn
        return layer

    def get_weight_conversions(self) -> list[Any]:
        """Back from the names that `save_pretrained` gives values to those of the layers."""
        if self.quantization_config.weights is not None:
            return []
        return [
            WeightRenaming(f"^{re.escape(name)}\\.weight", f"{name}.values")
            for name in self.quantization_config.packed
        ]

    def _process_model_after_weight_loading(self, model: Any, **ignored: object) -> Any:
        """Check what was read, arrange it for what runs here, and remember what is packed."""
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                _fill(name, module, self._shapes[name])
        with all_or_nothing() as undo:
            tell_writers(model, undo)
        return model

    # --- saving ------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, Any]:
        """The tensors by the names and shapes in which they are stored, without adapters."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers writes the adapters alone
        packed = _packed(model)
        self.quantization_config.packed = {n: describe(layer) for n, layer in packed.items()}
        named = ((base_name(model, name), tensor) for name, tensor in model.state_dict().items())
        state = {name: tensor for name, tensor in named if name is not None}
        for name in packed:
            state[f"{name}.weight"] = state.pop(f"{name}.values").flatten()
        return state, {}

    # --- a model in memory -------------------------------------------------------------------

    @classmethod
    def carry(cls, model: Any, undo: Undo) -> None:
        """Have a transformers model carry a quantizer if layers of it are packed, else none."""
        packed = {name: describe(layer) for name, layer in _packed(model).items()}
        for name in ("is_quantized", "quantization_method"):  # which forbid to cast the model
            _set(model, name, None, undo)
        if packed:
            config = PackedConfig(packed)
            _set(model, "hf_quantizer", cls(config), undo)
            _set(model.config, "quantization_config", config, undo)
        elif isinstance(getattr(model, "hf_quantizer", None), cls):
            _set(model, "hf_quantizer", None, undo)
            _set(model.config, "quantization_config", None, undo)
        for module in model.modules():  # attention then asks the config for a dtype, no weight
            if module is model or hasattr(type(module), "save_pretrained"):
                _set(module.config, "_is_quantized", True if packed else None, undo)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_(model)
        return model if dtype is None else model.to(dtype)


def _set(owner: Any, name: str, value: object, undo: Undo) -> None:
    """Set an attribute of this object, or remove it for None; put back if the verb raises."""
    own = vars(owner)
    if name in own:
        undo.call(setattr, owner, name, own[name])
    else:
        undo.call(own.pop, name, None)
    if value is not None:
        setattr(owner, name, value)
    else:
        own.pop(name, None)


def _packed(model: nn.Module) -> dict[str, SparseLinear]:
    """The packed layers by their names without adapters."""
    named = ((base_name(model, name), module) for name, module in model.named_modules())
    return {n: m for n, m in named if isinstance(m, SparseLinear) and n is not None}


def _place(model: Any, name: str) -> str | None:
    """Where the layer of that name is: a model with a head holds one without under a prefix."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    for place in (name, name.removeprefix(prefix), prefix + name):
        if isinstance(modules.get(place), nn.Linear):
            return place
    return None


def _untie(model: Any) -> None:
    """Take packed layers out of what transformers ties: they have no weight to assign."""
    names = {f"{name}.weight" for name, _ in _packed(model).items()}
    tied = model.all_tied_weights_keys
    if apart := [key for key, other in tied.items() if names & {key, other}]:
        for key in apart:
            del tied[key]
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _fill(name: str, layer: SparseLinear, shape: torch.Size) -> None:
    """Check the tensors that were read into the layer, and arrange them."""
    tensors = {key: getattr(layer, key) for key in layer.format.tensors}
    read = tensors if layer.bias is None else {**tensors, "bias": layer.bias}
    if lacking := [key for key, tensor in read.items() if not getattr(tensor, FLAG, False)]:
        raise ValueError(
            f"packed layer {name!r} lacks its {lacking[0]} in the weight files: {AGAIN}"
        )
    if any(tensor.is_meta for tensor in read.values()):
        raise ValueError(
            f"packed layer {name!r} was offloaded, and packed layers are not: give device_map "
            "devices with room for it"
        )
    try:
        layer.values = tensors["values"] = tensors["values"].view(shape)
        layer.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # torch's own, for whatever is wrong with a checkpoint
        said = " ".join(str(error).split())
        raise ValueError(f"packed layer {name!r}: {said}") from error


def _register() -> None:
    """Make the plug-in known to transformers.

    Raises:
        ValueError: if another package has registered one of this name.
    """
    other = AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD)
    if other is None:
        register_quantization_config(QUANT_METHOD)(PackedConfig)
        register_quantizer(QUANT_METHOD)(Quantizer)
    elif other.__module__ != __name__:
        raise ValueError(
            f"transformers has a quantizer named {QUANT_METHOD!r} already, by {other.__module__}: "
            "uninstall that package, or do not import it beside secateur"
        )


_register()
