"""Configurations and layouts: which format each old call stands for, and which are refused."""

import pytest

from secateur.compat.torchao import (
    BlockSparseLayout,
    BlockSparseWeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    MarlinSparseLayout,
    PlainLayout,
    SemiSparseLayout,
    SemiSparseWeightConfig,
    block_sparse_weight,
    float8_dynamic_activation_float8_semi_sparse_weight,
    float8_dynamic_activation_float8_weight,
    int4_weight_only,
    int8_dynamic_activation_int8_semi_sparse_weight,
    int8_dynamic_activation_int8_weight,
    semi_sparse_weight,
)
from secateur.compat.torchao.configs import Config
from secateur.patterns import NM

FORMATS = [
    (semi_sparse_weight(), "semi24"),
    (SemiSparseWeightConfig(alg_id=0), "semi24"),
    (block_sparse_weight(), "block:64x64"),
    (block_sparse_weight(blocksize=32), "block:32x32"),
    (BlockSparseWeightConfig((16, 32)), "block:16x32"),
    (int4_weight_only(layout=MarlinSparseLayout()), "semi24_int4"),
    (Int4WeightOnlyConfig(group_size=-1, layout=MarlinSparseLayout()), "semi24_int4:channel"),
    (int4_weight_only(group_size=None, layout=MarlinSparseLayout()), "semi24_int4:channel"),
    (int8_dynamic_activation_int8_weight(), "int8_dynamic"),
    (int8_dynamic_activation_int8_weight(layout=PlainLayout()), "int8_dynamic"),
    (int8_dynamic_activation_int8_weight(layout=SemiSparseLayout()), "semi24_int8_dynamic"),
    (Int8DynamicActivationInt8WeightConfig(SemiSparseLayout()), "semi24_int8_dynamic"),
    (int8_dynamic_activation_int8_semi_sparse_weight(), "semi24_int8_dynamic"),
    (float8_dynamic_activation_float8_semi_sparse_weight(), "semi24_fp8_dynamic"),
    (float8_dynamic_activation_float8_weight(), "fp8_dynamic"),
]


@pytest.mark.parametrize(("config", "format"), FORMATS, ids=[repr(c) for c, _ in FORMATS])
def test_a_config_stands_for_a_format(config: Config, format: str) -> None:
    assert str(config.format) == format
    assert (config.pattern == NM(2, 4)) == format.startswith("semi24")


def test_configs_are_values() -> None:
    assert semi_sparse_weight() == SemiSparseWeightConfig()
    assert {block_sparse_weight(32), BlockSparseWeightConfig(32)} == {BlockSparseWeightConfig(32)}


def test_what_has_no_kernel_is_refused_with_what_has() -> None:
    with pytest.raises(ValueError, match=r"layout=MarlinSparseLayout\(\), got none: .* torchao"):
        int4_weight_only()
    with pytest.raises(ValueError, match=r"got SemiSparseLayout\(\)"):
        int4_weight_only(layout=SemiSparseLayout())
    with pytest.raises(ValueError, match=r"group_size of 128, or -1 .* got 64"):
        int4_weight_only(group_size=64, layout=MarlinSparseLayout())
    with pytest.raises(ValueError, match=r"BlockSparseLayout\(blocksize=64\).*block_sparse_weight"):
        int8_dynamic_activation_int8_weight(layout=BlockSparseLayout())
    with pytest.raises(ValueError, match=r"CutlassSemiSparseLayout\(\), got PlainLayout\(\)"):
        float8_dynamic_activation_float8_semi_sparse_weight(layout=PlainLayout())
    with pytest.raises(ValueError, match=r"no alg_id, got 3"):
        semi_sparse_weight(alg_id=3)
    with pytest.raises(ValueError, match=r"blocksize of at least 1, got \(16, 0\)"):
        block_sparse_weight((16, 0))
