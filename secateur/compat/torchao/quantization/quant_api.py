"""The names of `torchao.quantization.quant_api` that have a format here."""

from secateur.compat.torchao.configs import (
    Float8DynamicActivationFloat8SemiSparseWeightConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    float8_dynamic_activation_float8_semi_sparse_weight,
    float8_dynamic_activation_float8_weight,
    int4_weight_only,
    int8_dynamic_activation_int8_semi_sparse_weight,
    int8_dynamic_activation_int8_weight,
)
from secateur.compat.torchao.inference import quantize_

__all__ = [
    "Float8DynamicActivationFloat8SemiSparseWeightConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "float8_dynamic_activation_float8_semi_sparse_weight",
    "float8_dynamic_activation_float8_weight",
    "int4_weight_only",
    "int8_dynamic_activation_int8_semi_sparse_weight",
    "int8_dynamic_activation_int8_weight",
    "quantize_",
]
