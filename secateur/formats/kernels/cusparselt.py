"""cuSPARSELt: products with a 2:4 weight at many tokens, by one of the library's algorithms.

It has some dozens for a product, known by number; `cusparselt_search` finds the fastest that is
right, in a child process, and `cusparselt_settings` remembers it. No other module calls
`torch._cslt_compress` and `torch._cslt_sparse_mm`.
"""

from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from secateur.formats.kernels.gpu import why_no_gpu, why_no_multiple, why_not_capability
from secateur.formats.kernels.launch import readable
from secateur.formats.kernels.measured import integers

# Weights are given in whole steps along both sides, tokens are padded to them with zeros.
# Source: torch.sparse.SparseSemiStructuredTensorCUSPARSELT, which also takes 8 or 16 tokens.
STEPS = {torch.bfloat16: 16, torch.float16: 16, torch.int8: 32}
CAPABILITY = (8, 0)

LARGEST_BUCKET = 16384  # tokens; more only repeat what so many do, and exact results need memory


@dataclass(frozen=True)
class Setting:
    """An algorithm, and into how many parts and how its sums are split: 1 and -1 where not."""

    algorithm: int
    split_k: int = 1
    split_k_mode: int = -1

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))

    @staticmethod
    def parse(text: str) -> "Setting":
        """The setting that `str` wrote.

        Raises: ValueError if the text is no list of three integers.
        """
        return Setting(*integers(text, len(fields(Setting)), "a setting"))


@dataclass(frozen=True)
class SearchCase:
    """What a setting is searched for; `case_of` makes it. `tokens` are the most of its bucket."""

    dtype: torch.dtype
    out_dtype: torch.dtype
    out_features: int
    in_features: int
    tokens: int
    bias: torch.dtype | None
    alpha: bool

    @property
    def product(self) -> str:
        """`bfloat16 6144x4096`, and what else there is: `int8 to float16 64x64 alpha`."""
        alpha = " alpha" if self.alpha else ""
        bias = "" if self.bias is None else f" bias {_short(self.bias)}"
        return f"{self.dtypes} {self.out_features}x{self.in_features}{alpha}{bias}"

    @property
    def dtypes(self) -> str:
        """`bfloat16`, or `int8 to float16`: those whose kernels a number of an algorithm names."""
        to = "" if self.out_dtype == self.dtype else f" to {_short(self.out_dtype)}"
        return f"{_short(self.dtype)}{to}"

    @property
    def counts(self) -> range:
        """The numbers of tokens of the bucket, once padded, the fewest first."""
        step = STEPS[self.dtype]
        return range(min(self.tokens, self.tokens // 2 + step), self.tokens + 1, step)

    def written(self) -> dict[str, Any]:
        """Plain data that `SearchCase.read` makes the case of again."""
        return {
            field.name: _short(value) if isinstance(value, torch.dtype) else value
            for field in fields(SearchCase)
            for value in [getattr(self, field.name)]
        }

    @staticmethod
    def read(data: dict[str, Any]) -> "SearchCase":
        """The case that `written` gave."""
        dtypes = {name: getattr(torch, data[name]) for name in ("dtype", "out_dtype")}
        bias = None if data["bias"] is None else getattr(torch, data["bias"])
        return SearchCase(**{**data, **dtypes, "bias": bias})


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the library cannot multiply by such a weight here and what to do, or None.

    Whether it has a right algorithm for this GPU only a search can tell.
    """
    if (problem := why_no_gpu(device)) is not None:
        return problem
    if not torch.backends.cusparselt.is_available():
        return (
            f"cuSPARSELt needs a torch that was built with it, got {torch.__version__}: "
            "install a CUDA wheel from pytorch.org"
        )
    if dtype not in STEPS:
        wanted = ", ".join(map(_short, STEPS))
        return f"cuSPARSELt needs one of {wanted}, got {_short(dtype)}: cast the layer"
    problem = why_not_capability("cuSPARSELt", device, CAPABILITY, "leave the layer dense")
    return problem or why_no_multiple(f"cuSPARSELt in {_short(dtype)}", shape, STEPS[dtype])


def compress(weight: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "..."]:
    """The 2:4 weight as the library reads it: opaque, and of no use to another version of it.

    A group of four with more than two nonzeros loses some without an error.

    Cost: in 16 bits 0.5625 of the weight's bytes, as a copy of its own; in 8 bits 0.625.
    """
    blob: Tensor = torch._cslt_compress(readable(weight))
    return blob


def multiply(
    blob: Shaped[Tensor, "..."],
    x: Shaped[Tensor, "tokens in"],
    out_features: int,
    setting: Setting,
    bias: Float[Tensor, " out"] | None = None,
    alpha: Float[Tensor, " out"] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Shaped[Tensor, "tokens out"]:
    """`x @ W.T * alpha + bias` in `out_dtype`, by default the dtype of x; rows lie in order.

    Tokens are padded with zeros to whole steps and the result is cut back, so that its storage can
    be larger than it is. alpha is float32.

    Error: sums in float32 (int32 for int8), rounded once; parts of a split sum may be rounded, too.
    Cost: where tokens are no multiple of 16 (32 in 8 bits), a copy of x.
    Raises: RuntimeError if the library refuses the setting.
    """
    tokens = x.shape[0]
    result: Tensor = torch._cslt_sparse_mm(
        blob,
        _padded(x).t(),
        bias=None if bias is None else readable(bias),
        alpha=alpha,
        out_dtype=None if out_dtype == x.dtype else out_dtype,  # it takes none for 16-bit inputs
        transpose_result=True,
        alg_id=setting.algorithm,
        split_k=setting.split_k,
        split_k_mode=setting.split_k_mode,
    )
    assert result.shape[1] == out_features, (result.shape, out_features)
    return result[:tokens]


def case_of(
    x: Shaped[Tensor, "tokens in"],
    out_features: int,
    bias: Float[Tensor, " out"] | None = None,
    alpha: Float[Tensor, " out"] | None = None,
    out_dtype: torch.dtype | None = None,
) -> SearchCase:
    """The case of `multiply` with these arguments.

    Tokens up to the same power of two share it, and all above 16384.
    """
    tokens = min(LARGEST_BUCKET, max(STEPS[x.dtype], 1 << (x.shape[0] - 1).bit_length()))
    return SearchCase(
        dtype=x.dtype,
        out_dtype=out_dtype or x.dtype,
        out_features=out_features,
        in_features=x.shape[1],
        tokens=tokens,
        bias=None if bias is None else bias.dtype,
        alpha=alpha is not None,
    )


def _padded(x: Tensor) -> Tensor:
    """The tokens in order, and zeros up to a whole step."""
    tokens, missing = x.shape[0], -x.shape[0] % STEPS[x.dtype]
    if not missing:
        return readable(x)
    padded = x.new_empty(tokens + missing, x.shape[1])
    padded[:tokens] = x
    padded[tokens:].zero_()
    return padded


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
