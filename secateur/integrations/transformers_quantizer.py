"""transformers' quantizer plug-in: `from_pretrained` of a packed folder, and `save_pretrained`.

It registers itself when it is imported, which happens as soon as transformers' own registry has
been. A folder that `sc.save` wrote has its weights in a file that only this plug-in looks for.
`save_pretrained` writes under the stock name instead, and so that a loader without the plug-in
stops: the values of a packed layer are stored under the name of its dense weight, in one dimension,
which no dense weight has.

The hooks are those of transformers 5.15 to 5.24, which have been renamed in between: two of them do
the same here.
"""

import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
from secateur.formats.experts import SparseExperts, open_experts_
from secateur.formats.pack import QUANT_METHOD, swap
from secateur.integrations.packed_config import VERSION, require_readable

AGAIN = "copy the folder again, or save the model again"
FLAG = "_is_hf_initialized"  # transformers sets it on each tensor that it has read


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed model: a description of each packed layer.

    `weights` is the file that has them, of a folder that `sc.save` wrote; it belongs to that folder
    and is not written with a model.
    """

    def __init__(
        self,
        packed: Any,
        version: object = VERSION,
        weights: object = None,
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
        return config

    def update_dtype(self, dtype: Any) -> Any:
        """The dtype in which most layers are packed, whatever is asked for."""
        dtypes = Counter(entry.get("dtype") for entry in self.quantization_config.packed.values())
        asked = str(dtype.get("") if isinstance(dtype, dict) else dtype).removeprefix("torch.")
        stored = next((name for name, _ in dtypes.most_common(1)), asked)
        if stored != asked:
            warnings.warn(
                f"the model is packed in {stored} and is loaded so, though {asked} was asked for: "
                + (
                    f"cast it afterwards, model.to(torch.{asked})"
                    if getattr(getattr(torch, asked, None), "is_floating_point", False)
                    else "leave dtype= out"
                ),
                stacklevel=2,
            )
        return getattr(torch, stored, dtype)

    def get_new_dtype(self, converter: object, param: object, dtype: object) -> None:
        """Every tensor in the dtype in which it is stored; transformers before 5.18 does so."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **ignored: object
    ) -> None:
        """Put what transformers can read packed tensors into in the places of linear layers."""
        for file in map(Path, checkpoint_files or ()):
            if file.suffix != SUFFIX or not file.is_file():
                raise ValueError(
                    f"{file.parent} lacks its weight file {file.name}, or it is no {SUFFIX} file: "
                    f"{AGAIN}"
                )
        vars(model.config).pop("transformers_weights", None)  # that folder's, not the model's
        stored = dict[str, nn.Module]()
        packed, prefix = self.quantization_config.packed, f"{model.base_model_prefix}."
        with all_or_nothing() as undo:
            others = [name.removeprefix(prefix) for name in packed]
            open_experts_(model, undo, [*packed, *others, *map(prefix.__add__, others)])
        places, whole = _places(model), type(model).__name__ in (model.config.architectures or ())
        for name, description in packed.items():
            if (place := places.get(name)) is not None:
                renamed = self.quantization_config.weights is None
                stored[place] = _Stored(model, place, dict(description), renamed)
            elif whole:  # a model of another class may lack the head
                raise ValueError(
                    f"config.json has a packed layer {name!r}, {type(model).__name__} has no "
                    f"linear layer of this name: {AGAIN}"
                )
        with all_or_nothing() as undo:
            swap(model, stored, undo)

    def _process_model_after_weight_loading(self, model: Any, **ignored: object) -> Any:
        """Make the packed layers of what was read, arranged for what runs here."""
        stored = {name: m for name, m in model.named_modules() if isinstance(m, _Stored)}
        layers = {name: module.layer(name) for name, module in stored.items()}
        with all_or_nothing() as undo:
            swap(model, layers, undo)
        for name, module in stored.items():
            if (hook := getattr(module, "_hf_hook", None)) is not None:  # of several devices
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(layers[name], hook)
        return model

    # --- saving ------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, Any]:
        """The tensors by the names and shapes in which they are stored, without adapters."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers writes the adapters alone
        if inside := [n for n, m in model.named_modules() if isinstance(m, SparseExperts)]:
            raise ValueError(
                f"save_pretrained would convert the packed experts of {inside[0]} as it does a "
                "dense stack: write the model with sc.save(model, folder), whose folders "
                "from_pretrained reads, or call unpack_(model) first"
            )
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
            _untie(model, packed, undo)
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


def _places(model: Any) -> dict[str, str]:
    """Where the linear layers are, by the names that they may have in a folder.

    A model with a head holds one without under a prefix; either may be in the folder of the other.
    """
    prefix = f"{model.base_model_prefix}."
    own = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    others = {name.removeprefix(prefix): name for name in own}
    others |= {prefix + name: name for name in own}
    return others | {name: name for name in own}


def _untie(model: Any, packed: Collection[str], undo: Undo) -> None:
    """Take packed layers out of what transformers ties: they have no weight to assign."""
    tied, names = model.all_tied_weights_keys, {f"{name}.weight" for name in packed}
    kept = {key: other for key, other in tied.items() if not names & {key, other}}
    if len(kept) < len(tied):
        _set(model, "all_tied_weights_keys", kept, undo)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            _set(config, "tie_word_embeddings", False, undo)


class _Stored(nn.Module):
    """The tensors of a packed layer while transformers reads them, by their names in the files.

    It stands in the place of the linear layer of that name, and has no data yet. What `renamed`
    says is whether `save_pretrained` has given the values the name of the weight.
    """

    def __init__(
        self, model: nn.Module, place: str, description: dict[str, Any], renamed: bool
    ) -> None:
        super().__init__()
        dense: Any = model.get_submodule(place)
        try:
            empty = empty_from(description, place)
        except ValueError as error:
            raise ValueError(f"config.json, packed layer {place!r}: {error}") from error
        if empty.shape != (dense.out_features, dense.in_features):
            raise ValueError(
                f"config.json has a packed layer {place!r} of {empty.out_features} x "
                f"{empty.in_features}, {type(model).__name__} has one of {dense.out_features} x "
                f"{dense.in_features}: {AGAIN}"
            )
        self.description = description
        self.register_parameter("bias", empty.bias)
        # A model draws the weights of some layers from outside; those with the flag it leaves.
        self.weight = torch.empty(0, dtype=empty.dtype, device="meta")
        setattr(self.weight, FLAG, True)
        self.files: dict[str, str] = {}
        for name, tensor in empty.packed.tensors.items():
            self.files[name] = file = "weight" if renamed and name == "values" else name
            if file == "weight":
                del self.weight
                tensor = tensor.flatten()
            self.register_buffer(file, tensor)
        self.to("meta")

    def layer(self, name: str) -> SparseLinear:
        """The packed layer, of the tensors that have been read.

        Raises: ValueError if one was not read, or is none that belongs there.
        """
        read = {key: getattr(self, file) for key, file in self.files.items()}
        if self.bias is not None:
            read["bias"] = self.bias
        if any(tensor.is_meta for tensor in read.values()):
            raise ValueError(
                f"packed layer {name!r} was offloaded, and packed layers are not: give device_map "
                "devices with room for it"
            )
        if lacking := [key for key, tensor in read.items() if not getattr(tensor, FLAG, False)]:
            raise ValueError(
                f"packed layer {name!r} lacks its {lacking[0]} in the weight files: {AGAIN}"
            )
        layer = empty_from(self.description, name)
        try:
            read["values"] = read["values"].view(layer.packed["values"].shape)
            layer.load_state_dict(read, assign=True)
        except RuntimeError as error:  # torch's own, for whatever is wrong with a checkpoint
            said = " ".join(str(error).split())
            raise ValueError(f"packed layer {name!r}: {said}: {AGAIN}") from error
        return layer.train(self.training)


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
