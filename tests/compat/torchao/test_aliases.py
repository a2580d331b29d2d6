"""The old import paths: what is below each, and that nothing but re-exports is."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from secateur.compat import torchao

ROOT = Path(torchao.__file__).parent
FOLDERS = ("sparsity", "prototype", "quantization")
FILES = sorted(
    [ROOT / "dtypes.py", *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py"))]
)

# As they stood in torchao and torch.ao.pruning, below the new prefix.
OLD = {
    "sparsity": "WandaSparsifier PerChannelNormObserver apply_fake_sparsity sparsify_ "
    "semi_sparse_weight SupermaskLinear int8_dynamic_activation_int8_semi_sparse_weight",
    "sparsity.sparse_api": "sparsify_ semi_sparse_weight SemiSparseWeightConfig "
    "block_sparse_weight BlockSparseWeightConfig apply_fake_sparsity",
    "sparsity.utils": "create_block_sparse_tensor create_semi_structured_tensor mask_creator "
    "PerChannelNormObserver",
    "sparsity.wanda": "WandaSparsifier",
    "sparsity.supermask": "SupermaskLinear",
    "sparsity.training": "SemiSparseLinear SemiSparseActivationLinear "
    "swap_linear_with_semi_sparse_linear swap_semi_sparse_linear_with_linear",
    "sparsity.training.autograd": "semi_structured_sparsify",
    "prototype.sparsity": "BaseScheduler CubicSL LambdaSL BaseSparsifier FakeSparsity "
    "NearlyDiagonalSparsifier WeightNormSparsifier fqn_to_module module_to_fqn "
    "get_arg_info_from_tensor_fqn",
    "prototype.sparsity.sparsifier.base_sparsifier": "BaseSparsifier",
    "prototype.sparsity.sparsifier.weight_norm_sparsifier": "WeightNormSparsifier",
    "prototype.sparsity.sparsifier.nearly_diagonal_sparsifier": "NearlyDiagonalSparsifier",
    "prototype.sparsity.sparsifier.utils": "FakeSparsity module_contains_param swap_module "
    "module_to_fqn fqn_to_module get_arg_info_from_tensor_fqn",
    "prototype.sparsity.pruner": "BaseStructuredSparsifier SaliencyPruner LSTMSaliencyPruner "
    "FPGMPruner FakeStructuredSparsity",
    "prototype.sparsity.pruner.base_structured_sparsifier": "BaseStructuredSparsifier",
    "prototype.sparsity.pruner.saliency_pruner": "SaliencyPruner",
    "prototype.sparsity.pruner.lstm_saliency_pruner": "LSTMSaliencyPruner",
    "prototype.sparsity.pruner.FPGM_pruner": "FPGMPruner",
    "prototype.sparsity.pruner.parametrization": "FakeStructuredSparsity",
    "prototype.sparsity.scheduler.base_scheduler": "BaseScheduler",
    "prototype.sparsity.scheduler.cubic_scheduler": "CubicSL",
    "prototype.sparsity.scheduler.lambda_scheduler": "LambdaSL",
    "prototype.sparsity.superblock.blocksparse": "block_sparse_weight",
    "prototype.sparsity.superblock.supermask": "SupermaskLinear",
    "quantization": "quantize_ int4_weight_only int8_dynamic_activation_int8_weight",
    "quantization.quant_api": "quantize_ int4_weight_only int8_dynamic_activation_int8_weight "
    "Int4WeightOnlyConfig Int8DynamicActivationInt8WeightConfig",
    "dtypes": "MarlinSparseLayout SemiSparseLayout PlainLayout",
}


@pytest.mark.parametrize("path", OLD)
def test_an_old_path_has_its_names_and_they_are_the_same_objects(path: str) -> None:
    module = importlib.import_module(f"secateur.compat.torchao.{path}")
    for name in OLD[path].split():
        assert name in module.__all__
        assert vars(module)[name] is vars(torchao)[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_an_alias_only_re_exports(file: Path) -> None:
    docstring, *rest = ast.parse(file.read_text()).body
    assert isinstance(docstring, ast.Expr)
    for node in rest:
        if isinstance(node, ast.Assign):
            assert node is rest[-1] and ast.unparse(node.targets) == "__all__"
        else:
            assert isinstance(node, ast.ImportFrom) and node.level == 0
            assert all(alias.asname is None for alias in node.names)
    module = importlib.import_module(module_of(file))
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    listed = list(getattr(module, "__all__", ()))
    assert len(set(listed)) == len(listed) and set(listed) == public <= set(torchao.__all__)
    assert all(vars(module)[name] is vars(torchao)[name] for name in listed)


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join((torchao.__name__, *parts)).removesuffix(".__init__")


def test_every_name_is_on_an_old_path() -> None:
    listed = set[str]()
    for file in FILES:
        listed |= set(getattr(importlib.import_module(module_of(file)), "__all__", ()))
    assert listed == set(torchao.__all__)
