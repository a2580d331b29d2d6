"""Writes down what of vLLM the plug-in relies on, from its wheel, which is not imported.

`python -m tests.integrations.record_vllm vllm-VERSION.whl`, by hand for a new release: what changes
in `vllm_contract.json` is what to look at. Signatures are recorded, and no code.
"""

import ast
import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

CONTRACT = Path(__file__).with_name("vllm_contract.json")

# The classes and functions that are recorded, by module.
RECORDED: dict[str, tuple[str, ...]] = {
    "vllm.plugins": ("load_general_plugins",),
    "vllm.model_executor.layers.quantization": ("register_quantization_config",),
    "vllm.model_executor.layers.quantization.base_config": (
        "QuantizeMethodBase", "QuantizationConfig",
    ),
    "vllm.model_executor.layers.linear": (
        "LinearMethodBase", "UnquantizedLinearMethod", "LinearBase", "ReplicatedLinear",
        "ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear",
        "RowParallelLinear", "register_weight_loader_v2_supported_method",
    ),
    "vllm.model_executor.parameter": (
        "BasevLLMParameter", "_ColumnvLLMParameter", "RowvLLMParameter", "ModelWeightParameter",
        "GroupQuantScaleParameter", "ChannelQuantScaleParameter",
    ),
    "vllm.model_executor.models.utils": ("WeightsMapper",),
}  # fmt: skip


def recorded(wheel: Path) -> dict[str, Any]:
    """The version, and of each module its file's hash and the signatures in it."""
    found: dict[str, Any] = {"version": wheel.name.split("-")[1], "modules": {}}
    with zipfile.ZipFile(wheel) as files:
        for module, names in RECORDED.items():
            path = module.replace(".", "/")
            path = f"{path}.py" if f"{path}.py" in files.namelist() else f"{path}/__init__.py"
            source = files.read(path)
            tree = ast.parse(source)
            nodes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
            found["modules"][module] = {
                "sha256": hashlib.sha256(source).hexdigest(),
                "constants": _constants(tree),
                "definitions": {name: _definition(nodes[name]) for name in names},
            }
    return found


def _constants(tree: ast.Module) -> dict[str, str]:
    """Names of text that the module sets."""
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def _definition(node: ast.ClassDef | ast.FunctionDef) -> dict[str, Any]:
    if isinstance(node, ast.FunctionDef):
        return {"arguments": _arguments(node)}
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "abstract": [n for n, m in methods.items() if "abstractmethod" in _decorators(m)],
        "methods": {n: _arguments(m) for n, m in methods.items()},
        # What a layer calls its method with, which may be more than the base class names.
        "create_weights_given": sorted(
            {
                keyword.arg
                for method in methods.values()
                for call in ast.walk(method)
                if isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "create_weights"
                for keyword in call.keywords
                if keyword.arg is not None
            }
        ),
    }


def _arguments(node: ast.FunctionDef) -> list[str]:
    """The names of the arguments, with stars where they have them."""
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [argument.arg for argument in given.kwonlyargs]
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])


def _decorators(node: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


if __name__ == "__main__":
    CONTRACT.write_text(json.dumps(recorded(Path(sys.argv[1])), indent=1) + "\n")
