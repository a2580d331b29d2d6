"""vLLM's plug-in for packed folders: a quantization config and the method of its linear layers.

vLLM finds it in its entry-point group `vllm.general_plugins` and calls `register` in each of its
processes. The stored tensors of 2:4 formats are row-major, so vLLM's own loaders put siblings
(q, k, v; gate, up) below one another and cut them among processes; afterwards one `SparseLinear`
takes the place of what was loaded.

The hooks are those of vLLM 0.33.0. It has not been run inside vLLM on a GPU: signatures, shapes and
the rules of the loaders are tested against `tests/integrations/vllm_contract.json`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from secateur.formats import SparseLinear, empty_from
from secateur.formats.contract import Format, Packed
from secateur.formats.pack import QUANT_METHOD
from secateur.integrations.packed_config import Description, require_readable

AGAIN = "copy the folder again, or save the model again"
DENSE = "write it with `secateur export --to dense` for vLLM"

# More columns than any group has, as a factor.
MANY = 128


class SecateurConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a folder that `sc.save` packed."""

    def __init__(self, packed: Mapping[str, Description]) -> None:
        super().__init__()
        self.packed = dict(packed)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """8.0, though kernels of the library's own need 9.0: below, the reference runs."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file: it is a part of config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SecateurConfig":
        """The config, checked.

        Raises: ValueError for another version, what is damaged, or a folder by `save_pretrained`.
        """
        packed, weights = config.get("packed"), config.get("weights")
        require_readable(config.get("version"), weights, packed)
        if weights is None:
            raise ValueError(
                "vLLM reads packed folders that sc.save wrote, this one is by save_pretrained: "
                "import secateur, load it with transformers, and call sc.save"
            )
        assert isinstance(packed, dict)
        for name, description in packed.items():
            try:
                empty_from(description, name)
            except ValueError as error:
                raise ValueError(f"config.json, packed layer {name!r}: {error}") from error
        return cls(packed)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take vLLM's names of the layers in place of the folder's."""
        self.packed = hf_to_vllm_mapper.apply_dict(self.packed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of this layer: ours if it is packed, vLLM's own else.

        Raises: ValueError where vLLM has one layer of several that are not packed alike, or what is
            packed is no linear layer of vLLM's.
        """
        parent, dot, own = prefix.rpartition(".")
        names = [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(own, [own])]
        found = {name: self.packed[name] for name in names if name in self.packed}
        if not isinstance(layer, LinearBase):
            inside = [name for name in self.packed if f"{name}.".startswith(f"{prefix}.")]
            if inside:
                raise ValueError(
                    f"layer {inside[0]!r} is packed, and vLLM runs it as a {type(layer).__name__}, "
                    f"which takes dense weights alone: {DENSE}, or pack the model without it"
                )
            return None
        if not found:
            return UnquantizedLinearMethod()
        dense = [name for name in names if name not in found]
        kinds = {(entry["format"], entry["dtype"]): name for name, entry in found.items()}
        if dense or len(kinds) > 1:
            pair = [*dense[:1], *kinds.values()][:2]
            raise ValueError(
                f"vLLM runs {pair[0]!r} and {pair[1]!r} as one layer, and they are not packed "
                f"alike: pack both in one format, or neither, or {DENSE}"
            )
        return SecateurLinearMethod(found, prefix)


@register_weight_loader_v2_supported_method
class SecateurLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The linear method of a packed layer, or of several siblings that vLLM runs as one.

    `parts` are their descriptions, all of one format and dtype.
    """

    def __init__(self, parts: Mapping[str, Description], name: str) -> None:
        self.parts, self.name = parts, name
        empty = empty_from(dict(next(iter(parts.values()))))
        self.format, self.dtype = empty.format, empty.dtype

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Any = None,
        **ignored: Any,
    ) -> None:
        """Give the layer the stored tensors of this process's part, for vLLM's loaders to fill.

        Raises: ValueError for another width or dtype than that of the folder, or a part that is
            none of the stored tensors.
        """
        for name, description in self.parts.items():
            if description["in_features"] != input_size:
                raise ValueError(
                    f"config.json has a packed layer {name!r} of {description['in_features']} "
                    f"columns, vLLM has one of {input_size}: {AGAIN}"
                )
        if params_dtype != self.dtype:
            dtype = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"layer {self.name!r} is packed in {dtype}, vLLM runs the model in "
                f"{str(params_dtype).removeprefix('torch.')}: give vLLM --dtype {dtype}"
            )
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        kinds = _parameters(self.format, self.dtype, columns, input_size, self.name)
        # Zeros are no metadata, so that what no file has is noticed.
        empty = self.format.empty((rows, columns), rows, self.dtype)
        for name, tensor in empty.tensors.items():
            # On the device that vLLM has chosen, which is torch's default there.
            data = torch.zeros_like(tensor, device=torch.get_default_device())
            dims = {"output_dim": 0} | ({"input_dim": 1} if kinds[name] else {})
            kind = ModelWeightParameter if kinds[name] else ChannelQuantScaleParameter
            layer.register_parameter(name, kind(data=data, weight_loader=weight_loader, **dims))
        layer.secateur_shape = (rows, columns)  # type: ignore[assignment]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put the packed layer in the place of what was loaded, arranged for what runs here.

        Raises: ValueError if the tensors are none that packing makes, or some were not loaded.
        """
        names = self.format.tensors
        tensors: dict[str, Tensor] = {name: getattr(layer, name).data for name in names}
        shape: Any = layer.secateur_shape
        packed = Packed(self.format, shape, self.dtype, tensors)
        if (problem := self.format.why_broken(packed)) is not None:
            raise ValueError(f"packed layer {self.name!r}: {problem}: {AGAIN}")
        for name in names:
            delattr(layer, name)
        layer.packed = SparseLinear(packed, None, self.name)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` times the transposed weight, plus the bias."""
        packed: Any = layer.packed
        made: Tensor = packed(x)
        return made if bias is None else made + bias


def _parameters(
    format: Format, dtype: torch.dtype, columns: int, all_columns: int, layer: str
) -> dict[str, bool]:
    """For each stored tensor, whether it has columns, which are cut with those of the weight.

    Raises: ValueError if this format's tensors are not row-major, or this cut is within a group.
    """
    one, whole, many = (
        _widths(format, dtype, n, layer) for n in (columns, all_columns, columns * MANY)
    )
    cut = {name: many[name] > 1 for name in one}
    parts = all_columns // columns
    for name, width in one.items():
        aligned = whole[name] == width * parts and many[name] == width * MANY
        if parts > 1 and cut[name] and not aligned:
            raise ValueError(
                f"{layer!r} has {all_columns} columns, which {format} cannot cut into {parts}: "
                f"{columns} are no whole groups of its {name}: give vLLM a smaller "
                "--tensor-parallel-size"
            )
    return cut


def _widths(format: Format, dtype: torch.dtype, columns: int, layer: str) -> dict[str, int]:
    """The widths of the stored tensors of a weight with so many columns.

    Raises: ValueError if they are no rows, one for each row of the weight.
    """
    try:
        tensors = format.empty((1, columns), 1, dtype).tensors
    except ValueError:  # blocks of several rows
        tensors = {}
    if not tensors or any(t.dim() != 2 or t.shape[0] != 1 for t in tensors.values()):
        raise ValueError(
            f"{layer!r} is packed in {format}, which vLLM's loaders cannot cut into rows: pack it "
            f"in a 2:4 format, or {DENSE}"
        )
    return {name: tensor.shape[1] for name, tensor in tensors.items()}


def register() -> None:
    """Make the plug-in known to vLLM; again is as good as once."""
    register_quantization_config(QUANT_METHOD)(SecateurConfig)
