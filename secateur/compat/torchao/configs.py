"""The layouts and configurations of `quantize_` and `sparsify_`, as formats and patterns."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.formats import Format
from secateur.formats.block import Blocks
from secateur.formats.quantised import Quantised
from secateur.formats.semi24 import Semi24
from secateur.patterns import NM, Fp8, Int4, Int8, Pattern, Unstructured

TWO_OF_FOUR = NM(2, 4)
ANY = Unstructured(0.0)  # asks for no zeros, only for an ordinary, finite weight
MARLIN_GROUP = 128  # inputs that share a scale, in Marlin and in `semi24_int4`
PER_OUTPUT = (None, -1)  # the group sizes that stand for one scale for all inputs of an output


@dataclass(frozen=True)
class PlainLayout:
    """Every weight is stored."""


@dataclass(frozen=True)
class SemiSparseLayout:
    """2:4, in 8-bit codes or 16-bit values."""


@dataclass(frozen=True)
class CutlassSemiSparseLayout:
    """2:4, in float8."""


@dataclass(frozen=True)
class MarlinSparseLayout:
    """2:4, in 4-bit codes."""


@dataclass(frozen=True)
class BlockSparseLayout:
    """Whole blocks of weights, kept or zero."""

    blocksize: int | tuple[int, int] = 64


@dataclass(frozen=True)
class SemiSparseWeightConfig:
    """2:4 weights, stored exactly: the format `semi24`.

    Raises: ValueError for an `alg_id`: the kernel's algorithm is searched for each layer here.
    """

    alg_id: int = 0
    format: ClassVar[Format] = Semi24()
    pattern: ClassVar[Pattern] = TWO_OF_FOUR

    def __post_init__(self) -> None:
        if self.alg_id:
            raise ValueError(
                f"semi_sparse_weight takes no alg_id, got {self.alg_id}: leave it out, the "
                "algorithm is searched for each layer when it first runs"
            )


@dataclass(frozen=True)
class BlockSparseWeightConfig:
    """Blocks of weights, some of them zero, stored exactly: the format `block`.

    `blocksize` is the side of a square block, or (rows, columns), rows along the outputs.

    Raises: ValueError for a size below 1.
    """

    blocksize: int | tuple[int, int] = 64
    pattern: ClassVar[Pattern] = ANY

    def __post_init__(self) -> None:
        if min(self._sides) < 1:
            raise ValueError(
                f"block_sparse_weight needs a blocksize of at least 1, got {self.blocksize}: "
                "64, 32 or 16 are fast"
            )

    @property
    def _sides(self) -> tuple[int, int]:
        size = self.blocksize
        return (size, size) if isinstance(size, int) else size

    @property
    def format(self) -> Format:
        return Blocks(*self._sides)


@dataclass(frozen=True)
class Int4WeightOnlyConfig:
    """2:4 weights rounded to 4 bits: the format `semi24_int4`.

    One scale for every 128 inputs of an output, or with a `group_size` of -1 for all of them.

    Raises: ValueError without `layout=MarlinSparseLayout()`, and for another group_size.
    """

    group_size: int | None = MARLIN_GROUP
    layout: object = None
    pattern: ClassVar[Pattern] = TWO_OF_FOUR

    def __post_init__(self) -> None:
        if not isinstance(self.layout, MarlinSparseLayout):
            raise ValueError(
                f"int4_weight_only needs layout=MarlinSparseLayout(), got {_shown(self.layout)}: "
                "4-bit weights are stored 2:4 here, torchao itself has those of dense weights"
            )
        if self.group_size != MARLIN_GROUP and self.group_size not in PER_OUTPUT:
            raise ValueError(
                f"int4_weight_only needs a group_size of {MARLIN_GROUP}, or -1 for one scale per "
                f"output, got {self.group_size}: choose one of them"
            )

    @property
    def format(self) -> Format:
        group_size = None if self.group_size in PER_OUTPUT else self.group_size
        return Quantised(Int4(group_size), TWO_OF_FOUR)


@dataclass(frozen=True)
class Int8DynamicActivationInt8WeightConfig:
    """Weights and inputs rounded to 8 bits: `semi24_int8_dynamic` for 2:4, else `int8_dynamic`.

    Raises: ValueError for a layout that is neither `SemiSparseLayout()` nor `PlainLayout()`.
    """

    layout: object = PlainLayout()

    def __post_init__(self) -> None:
        if not isinstance(self.layout, (PlainLayout, SemiSparseLayout)):
            raise ValueError(
                "int8_dynamic_activation_int8_weight needs layout=SemiSparseLayout() or "
                f"PlainLayout(), got {_shown(self.layout)}: no kernel here has 8-bit weights in "
                "another; block_sparse_weight() stores blocks unrounded"
            )

    @property
    def _is_sparse(self) -> bool:
        return isinstance(self.layout, SemiSparseLayout)

    @property
    def format(self) -> Format:
        return Quantised(Int8(), TWO_OF_FOUR if self._is_sparse else None, rounds_inputs=True)

    @property
    def pattern(self) -> Pattern:
        return TWO_OF_FOUR if self._is_sparse else ANY


@dataclass(frozen=True)
class Float8DynamicActivationFloat8SemiSparseWeightConfig:
    """2:4 weights and inputs rounded to float8: the format `semi24_fp8_dynamic`.

    Raises: ValueError for a layout that is not `CutlassSemiSparseLayout()`.
    """

    layout: object = CutlassSemiSparseLayout()
    format: ClassVar[Format] = Quantised(Fp8(), TWO_OF_FOUR, rounds_inputs=True)
    pattern: ClassVar[Pattern] = TWO_OF_FOUR

    def __post_init__(self) -> None:
        if not isinstance(self.layout, CutlassSemiSparseLayout):
            raise ValueError(
                "float8_dynamic_activation_float8_semi_sparse_weight needs "
                f"layout=CutlassSemiSparseLayout(), got {_shown(self.layout)}: leave it out"
            )


@dataclass(frozen=True)
class Float8DynamicActivationFloat8WeightConfig:
    """Weights and inputs rounded to float8, a scale for each output and token: `fp8_dynamic`."""

    format: ClassVar[Format] = Quantised(Fp8(), rounds_inputs=True)
    pattern: ClassVar[Pattern] = ANY


Config = (
    SemiSparseWeightConfig
    | BlockSparseWeightConfig
    | Int4WeightOnlyConfig
    | Int8DynamicActivationInt8WeightConfig
    | Float8DynamicActivationFloat8SemiSparseWeightConfig
    | Float8DynamicActivationFloat8WeightConfig
)

# The older spellings, called like functions.
semi_sparse_weight = SemiSparseWeightConfig
block_sparse_weight = BlockSparseWeightConfig
int4_weight_only = Int4WeightOnlyConfig
int8_dynamic_activation_int8_weight = Int8DynamicActivationInt8WeightConfig
float8_dynamic_activation_float8_weight = Float8DynamicActivationFloat8WeightConfig
float8_dynamic_activation_float8_semi_sparse_weight = (
    Float8DynamicActivationFloat8SemiSparseWeightConfig
)


def int8_dynamic_activation_int8_semi_sparse_weight() -> Int8DynamicActivationInt8WeightConfig:
    """2:4 weights and inputs rounded to 8 bits: the format `semi24_int8_dynamic`."""
    return Int8DynamicActivationInt8WeightConfig(layout=SemiSparseLayout())


def _shown(layout: object) -> str:
    return "none" if layout is None else repr(layout)
