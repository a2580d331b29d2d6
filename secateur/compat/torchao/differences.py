"""How each moved name differs from the old one, in a sentence; `docs/migrate.md` says more."""

SAME = "the same"

DIFFERENCES = {
    "BaseScheduler": "refuses a sparsifier that is not prepared; loaded states are copies",
    "BaseSparsifier": "unknown names are errors with the closest ones; loaded states are copies; "
    "prepare twice is an error",
    "BaseStructuredSparsifier": "channels follow from the exported graph: residuals and norms are "
    "understood, prune changes the model and returns it; what cannot go is named by prepare",
    "BlockSparseWeightConfig": "any device; a weight without a zero block is an error",
    "CubicSL": "levels may fall; before, they stayed at the first",
    "FPGMPruner": "as BaseStructuredSparsifier",
    "FakeSparsity": "masks have the weight's dtype, 0 or 1; zeros are +0.0",
    "FakeStructuredSparsity": "hides channels of any dimension; the sparsifier has its mask",
    "Float8DynamicActivationFloat8SemiSparseWeightConfig": "the weight has to be 2:4, it was "
    "zeroed silently or misread",
    "Int4WeightOnlyConfig": "only with layout=MarlinSparseLayout(); the weight has to be 2:4, it "
    "was zeroed silently; any dtype of 16 or 32 bits",
    "Int8DynamicActivationInt8WeightConfig": "with SemiSparseLayout() the weight has to be 2:4, it "
    "was zeroed silently",
    "LSTMSaliencyPruner": "as BaseStructuredSparsifier; units go from all layers of a module",
    "LambdaSL": "its state has no functions in it",
    "NearlyDiagonalSparsifier": "impossible widths are errors at once",
    "PerChannelNormObserver": "norm is the norm; it was its square",
    "SaliencyPruner": "as BaseStructuredSparsifier",
    "SemiSparseActivationLinear": "dense emulation on any device: the same zeros, no faster",
    "SemiSparseLinear": "dense emulation on any device: the same zeros, no faster; mode and "
    "bias=False are kept",
    "SemiSparseWeightConfig": "the weight is verified to be 2:4; takes no alg_id",
    "SupermaskLinear": "starts from the weight's magnitudes instead of random scores; exact "
    "counts; scores learn by block x gradient",
    "WandaSparsifier": "scores and rows as in the paper; a second step chooses anew",
    "WeightNormSparsifier": "keeps 16-bit dtypes; equal norms keep the lower index; Conv2d works",
    "apply_fake_sparsity": "returns the model; layers that cannot be 2:4 are named",
    "create_block_sparse_tensor": "the share of zero blocks is exact; any device",
    "create_semi_structured_tensor": "any device",
    "mask_creator": "groups never cross rows; ties go to the first",
    "quantize_": "returns the model; changes nothing if a layer does not fit; packs into "
    "SparseLinear instead of a tensor subclass",
    "semi_structured_sparsify": "returns a dense tensor with zeros; one algorithm",
    "sparsify_": "returns the model; changes nothing if a layer does not fit; packs into "
    "SparseLinear instead of a tensor subclass; takes functions again",
    "swap_linear_with_semi_sparse_linear": "unknown names are errors with the closest ones",
    "swap_semi_sparse_linear_with_linear": "keeps training mode, hooks and shared layers",
}
# Older spelling -> the name that it has now.
SPELLINGS = {
    "block_sparse_weight": "BlockSparseWeightConfig",
    "float8_dynamic_activation_float8_semi_sparse_weight": (
        "Float8DynamicActivationFloat8SemiSparseWeightConfig"
    ),
    "int4_weight_only": "Int4WeightOnlyConfig",
    "int8_dynamic_activation_int8_semi_sparse_weight": "Int8DynamicActivationInt8WeightConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
    "semi_sparse_weight": "SemiSparseWeightConfig",
}


def difference(name: str) -> str:
    """How a name differs from the old one, or that it does not."""
    return DIFFERENCES.get(SPELLINGS.get(name, name), SAME)
