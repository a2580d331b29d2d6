"""Modules in vLLM's place, made of what `vllm_contract.json` records, and the rules of its loaders.

The rules are restated here, from vLLM's parameter.py and linear.py: which rows and columns of a
stored tensor a process takes. No code of vLLM's is used.
"""

import abc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.integrations.record_vllm import CONTRACT

RECORD = json.loads(CONTRACT.read_text())
OUTSIDE = {"ABC": abc.ABC, "PluggableLayer": nn.Module, "Parameter": nn.Parameter}


class Rows(nn.Parameter):
    """A parameter that is cut in rows: ChannelQuantScaleParameter."""

    def __new__(cls, data: Tensor, **given: Any) -> "Rows":
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, weight_loader: Any, output_dim: int) -> None:
        assert output_dim == 0
        self.weight_loader = weight_loader

    def take(self, loaded: Tensor, part: int, offset: int, size: int) -> None:
        """Rows of the part of this number, to the rows from the offset on."""
        self.data[offset : offset + size] = loaded[part * size : (part + 1) * size]

    def take_columns(self, loaded: Tensor, rank: int) -> None:
        """All of it, as it has no columns that are cut."""
        assert self.data.shape == loaded.shape
        self.data.copy_(loaded)


class RowsAndColumns(Rows):
    """A parameter that is cut both ways: ModelWeightParameter."""

    def __init__(self, data: Tensor, weight_loader: Any, output_dim: int, input_dim: int) -> None:
        super().__init__(data, weight_loader, output_dim)
        assert input_dim == 1

    def take_columns(self, loaded: Tensor, rank: int) -> None:
        """The columns of this process, as many as the parameter has."""
        width = self.data.shape[1]
        self.data.copy_(loaded[:, rank * width : (rank + 1) * width])


@dataclass
class Registered:
    """What has been registered."""

    configs: dict[str, type] = field(default_factory=dict)
    second_loader: list[str] = field(default_factory=list)

    def config(self, name: str) -> Callable[[type], type]:
        """`register_quantization_config`."""
        return lambda found: self.configs.setdefault(name, found)

    def method(self, found: type) -> type:
        """`register_weight_loader_v2_supported_method`."""
        self.second_loader.append(found.__name__)
        return found


@contextmanager
def vllm_in_place() -> Iterator[Registered]:
    """vLLM's modules as they are recorded, importable until the end."""
    registered, made = Registered(), dict(OUTSIDE)
    modules = dict[str, ModuleType]()
    for name, module in RECORD["modules"].items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            package = ".".join(parts[:i])
            modules.setdefault(package, ModuleType(package)).__path__ = []  # type: ignore[attr-defined]
        for what, definition in module["definitions"].items():
            if "methods" in definition:
                made[what] = _class(what, definition, made)
                setattr(modules[name], what, made[what])
    linear = modules["vllm.model_executor.layers.linear"]
    linear.register_weight_loader_v2_supported_method = registered.method  # type: ignore[attr-defined]
    quantization = modules["vllm.model_executor.layers.quantization"]
    quantization.register_quantization_config = registered.config  # type: ignore[attr-defined]
    parameter: Any = modules["vllm.model_executor.parameter"]
    parameter.ModelWeightParameter = RowsAndColumns
    parameter.ChannelQuantScaleParameter = Rows
    assert "vllm" not in sys.modules, "the real one is not to be tested so"
    sys.modules.update(modules)
    try:
        yield registered
    finally:
        for name in [*modules, "secateur.integrations.vllm_plugin"]:
            sys.modules.pop(name, None)


def _class(name: str, definition: dict[str, Any], made: dict[str, Any]) -> type:
    """A class with the recorded methods, which do nothing; abstract ones are abstract."""

    def nothing(*given: object, **named: object) -> None:
        raise NotImplementedError(name)

    methods = {
        method: abc.abstractmethod(_copy(nothing)) if method in definition["abstract"] else nothing
        for method in definition["methods"]
        if not method.startswith("__")
    }
    if name == "QuantizationConfig":
        methods["__init__"] = lambda self: setattr(self, "packed_modules_mapping", {})
    bases = tuple(made[base] for base in definition["bases"]) or (object,)
    return type(bases[0])(name, bases, methods)


def _copy(function: Any) -> Any:
    return lambda *given, **named: function(*given, **named)


@dataclass(frozen=True)
class Process:
    """One of the processes of a tensor-parallel group, as vLLM's layers see it."""

    rank: int
    size: int

    def columns(self, method: Any, layer: nn.Module, whole: dict[str, Tensor]) -> None:
        """ColumnParallelLinear: a part of the rows, which are columns of its A."""
        rows = len(whole["values"])
        self._create(method, layer, [rows // self.size], whole["in"], whole["in"])
        for name, parameter in layer.named_parameters():
            parameter.take(whole[name], self.rank, 0, rows // self.size)

    def merged(self, method: Any, layer: nn.Module, wholes: list[dict[str, Tensor]]) -> None:
        """MergedColumnParallelLinear: a part of each sibling's rows, one below the other."""
        sizes = [len(whole["values"]) // self.size for whole in wholes]
        self._create(method, layer, sizes, wholes[0]["in"], wholes[0]["in"])
        for i, whole in enumerate(wholes):
            for name, parameter in layer.named_parameters():
                parameter.take(whole[name], self.rank, sum(sizes[:i]), sizes[i])

    def qkv(
        self, method: Any, layer: nn.Module, wholes: list[dict[str, Tensor]], kv_heads: int
    ) -> None:
        """QKVParallelLinear: keys and values are on several processes if there are few heads."""
        replicas = max(1, self.size // kv_heads)
        split = [self.size, self.size // replicas, self.size // replicas]
        sizes = [len(whole["values"]) // n for whole, n in zip(wholes, split, strict=True)]
        self._create(method, layer, sizes, wholes[0]["in"], wholes[0]["in"])
        for i, whole in enumerate(wholes):
            part = self.rank if i == 0 else self.rank // replicas
            for name, parameter in layer.named_parameters():
                parameter.take(whole[name], part, sum(sizes[:i]), sizes[i])

    def rows(self, method: Any, layer: nn.Module, whole: dict[str, Tensor]) -> None:
        """RowParallelLinear: a part of the columns, which are rows of its A."""
        rows, columns = len(whole["values"]), int(whole["in"])
        self._create(method, layer, [rows], columns // self.size, columns)
        for name, parameter in layer.named_parameters():
            parameter.take_columns(whole[name], self.rank)

    def _create(
        self, method: Any, layer: nn.Module, sizes: list[int], columns: Any, all_columns: Any
    ) -> None:
        method.create_weights(
            layer=layer, input_size_per_partition=int(columns), output_partition_sizes=sizes,
            input_size=int(all_columns), output_size=sum(sizes) * self.size,
            params_dtype=torch.bfloat16, weight_loader=object(),
        )  # fmt: skip
