"""The codemod: imports that move, names that stay, and all other bytes as they were."""

import ast
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compat import torchao
from secateur.compat.torchao.codemod import Left, Moved, migrate_source
from secateur.compat.torchao.differences import DIFFERENCES, SPELLINGS, difference

HERE = "secateur.compat.torchao"


def migrated(source: str) -> str:
    return migrate_source(textwrap.dedent(source).encode()).source.decode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from torchao.sparsity import sparsify_", "from {}.sparsity import sparsify_"),
        ("from torch.ao.pruning import CubicSL", "from {}.prototype.sparsity import CubicSL"),
        (
            "from torch.ao.pruning.sparsifier.utils import FakeSparsity as F",
            "from {}.prototype.sparsity.sparsifier.utils import FakeSparsity as F",
        ),
        (
            "from torchao.prototype.sparsity.superblock.blocksparse import block_sparse_weight",
            "from {}.prototype.sparsity.superblock.blocksparse import block_sparse_weight",
        ),
        (
            "from torchao.sparsity.prototype.training import SemiSparseLinear",
            "from {}.sparsity.training import SemiSparseLinear",
        ),
        (
            "from torchao.sparsity.prototype.superblock.supermask import SupermaskLinear",
            "from {}.prototype.sparsity.superblock.supermask import SupermaskLinear",
        ),
        (
            "from torch.ao.pruning._experimental.pruner.FPGM_pruner import FPGMPruner",
            "from {}.prototype.sparsity.pruner.FPGM_pruner import FPGMPruner",
        ),
        ("from torchao import sparsity", "from {} import sparsity"),
        (
            "from torch.ao import pruning\npruning.LambdaSL",
            "from {}.prototype import sparsity as pruning\npruning.LambdaSL",
        ),
        (
            "import torch.ao.pruning as p\np.WeightNormSparsifier()",
            "import {}.prototype.sparsity as p\np.WeightNormSparsifier()",
        ),
        (
            "import torch, torchao.sparsity as s, os",
            "import torch\nimport {}.sparsity as s\nimport os",
        ),
        ("if 1: import torchao.sparsity as s, os", "if 1: import {}.sparsity as s; import os"),
        (
            "from torchao.sparsity import sparsify_; from torch.ao.pruning import CubicSL",
            "from {0}.sparsity import sparsify_; from {0}.prototype.sparsity import CubicSL",
        ),
        # A name that the old module had by chance, and the package has elsewhere.
        ("from torchao.sparsity.wanda import mask_creator", "from {} import mask_creator"),
    ],
)
def test_an_import_moves(old: str, new: str) -> None:
    changed = migrated(old)
    assert changed == new.format(HERE)
    exec(compile(changed, "changed", "exec"), {})


def test_what_is_not_here_stays_and_is_told() -> None:
    found = migrate_source(
        b"from torchao.sparsity.training import SemiSparseLinear, CUTLASS_TABLE as t\n"
        b"from torchao.sparsity.marlin import pack_to_marlin_24\n"
        b"from torch.ao.pruning import *\n"
        b"import torchao.sparsity\n"
        b"import torch.ao.pruning as p\n"
        b"p.ActivationSparsifier, p.CubicSL\n"
        b"torch.ao.pruning.FakeSparsity(torchao.sparsity.sparsify_)\n"
    )
    assert found.source.decode().splitlines() == [
        "from torchao.sparsity.training import CUTLASS_TABLE as t",
        f"from {HERE}.sparsity.training import SemiSparseLinear",
        "from torchao.sparsity.marlin import pack_to_marlin_24",
        "from torch.ao.pruning import *",
        "import torchao.sparsity",
        "import torch.ao.pruning as p",
        "p.ActivationSparsifier, p.CubicSL",
        "torch.ao.pruning.FakeSparsity(torchao.sparsity.sparsify_)",
    ]
    assert found.moved == (
        Moved(1, "torchao.sparsity.training", f"{HERE}.sparsity.training", ("SemiSparseLinear",)),
    )
    assert [(item.line, item.what) for item in found.left] == [
        (1, "torchao.sparsity.training.CUTLASS_TABLE"),
        (2, "torchao.sparsity.marlin.pack_to_marlin_24"),
        (3, "torch.ao.pruning.*"),
        (4, "torchao.sparsity"),
        (5, "torch.ao.pruning"),
        (7, "torch.ao.pruning.FakeSparsity"),
        (7, "torchao.sparsity.sparsify_"),
    ]
    why = [item.why for item in found.left]
    assert why[0] == f"{HERE} has no CUTLASS_TABLE"
    assert why[4] == f"{HERE}.prototype.sparsity has no ActivationSparsifier"
    assert "full name" in why[5]


def test_quantization_moves_with_a_sparse_layout_only() -> None:
    plain = "from torchao.quantization import quantize_, int8_weight_only\n"
    assert migrated(plain) == plain
    assert migrate_source(plain.encode()).left == ()
    sparse = migrate_source(f"{plain}from torchao.dtypes import SemiSparseLayout\n".encode())
    assert sparse.source.decode() == (
        "from torchao.quantization import int8_weight_only\n"
        f"from {HERE}.quantization import quantize_\n"
        f"from {HERE}.dtypes import SemiSparseLayout\n"
    )
    what = "torchao.quantization.int8_weight_only"
    assert sparse.left == (Left(1, what, f"{HERE} has no int8_weight_only"),)


def test_all_else_stays_as_it_was() -> None:
    source = (
        "\ufeff# ä comment of torchao.sparsity\r\n"
        "x = 'ö'; from torchao.sparsity import (  # why\r\n"
        "    sparsify_,  # this\r\n"
        ")\r\n"
        "def f():\r\n"
        "\tfrom torch . ao.pruning import CubicSL, Nothing # and that\r\n"
    ).encode()
    changed = migrate_source(source).source.decode()
    assert changed == (
        "\ufeff# ä comment of torchao.sparsity\r\n"
        f"x = 'ö'; from {HERE}.sparsity import (  # why\r\n"
        "    sparsify_,  # this\r\n"
        ")\r\n"
        "def f():\r\n"
        "\tfrom torch.ao.pruning import Nothing\r\n"
        f"\tfrom {HERE}.prototype.sparsity import CubicSL # and that\r\n"
    )


def test_a_second_run_changes_nothing() -> None:
    once = migrate_source(b"from torchao.sparsity import sparsify_, nothing\n").source
    again = migrate_source(once)
    assert again.source == once and again.moved == ()


@pytest.mark.parametrize("source", [b"def (:\n", b"x = '\xe4'\n", b"a\x00b", b"  print 1\n"])
def test_what_cannot_be_parsed_is_refused(source: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be parsed"):
        migrate_source(source)


LINES = st.sampled_from(
    [
        "from torchao.sparsity import sparsify_",
        "from torchao.sparsity import sparsify_, gone",
        "import torchao.sparsity.utils as u, os",
        "import os; from torch.ao.pruning import CubicSL, gone; x = 'ü'",
        "from torchao.sparsity import (\n    sparsify_,\n    gone,\n)",
        "x = 'ö'",
        "if 1:\n    from torchao.sparsity.training import SemiSparseLinear, gone",
    ]
)


@settings(max_examples=50, deadline=None)
@given(st.lists(LINES, max_size=6))
def test_only_imports_change_and_every_name_is_still_imported(lines: list[str]) -> None:
    before = "\n".join(lines)
    after = migrate_source(before.encode()).source.decode()

    def rest(source: str) -> list[str]:
        nodes = ast.walk(ast.parse(source))
        return [ast.dump(node) for node in nodes if isinstance(node, ast.Assign)]

    def names(source: str) -> set[str]:
        nodes = ast.walk(ast.parse(source))
        imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        return {alias.asname or alias.name for node in imports for alias in node.names}

    assert rest(before) == rest(after) and names(before) == names(after)


def test_differences_are_of_names_that_there_are() -> None:
    assert set(DIFFERENCES) | set(SPELLINGS) | set(SPELLINGS.values()) <= set(torchao.__all__)
    for old, new in SPELLINGS.items():
        assert vars(torchao)[old] is vars(torchao)[new] or callable(vars(torchao)[old])
    assert difference("semi_sparse_weight") == DIFFERENCES["SemiSparseWeightConfig"]
    assert difference("module_to_fqn") == "the same"
