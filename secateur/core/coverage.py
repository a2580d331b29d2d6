"""Which share of a model's parameters a verb covers, and why it leaves the others as they are."""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.weights import is_adapters

# Reasons of the parameters that belong to no layer with a matrix.
VECTORS = "vectors: biases, norms and the like"
EMBEDDINGS = "embeddings"
ADAPTERS = "adapters, which stay beside the model"
EXPERTS = "experts: 3-D parameters, a matrix for each expert"
NO_MATRICES = (VECTORS, ADAPTERS)  # of the model, that somebody could have meant

SLIGHT = 0.01  # of the matrices: a user who covers less has most likely meant more
TOLD = 3  # reasons in a sentence, the largest ones
LEAST_TOLD = 0.01  # of all parameters


def left_alone(
    model: nn.Module, covered: Mapping[str, int], skipped: Mapping[str, str]
) -> dict[str, int]:
    """How many parameters are left as they are, by the reason; the largest number first.

    `covered` says of a parameter, by name, how many of its elements are covered, `skipped` of a
    module why it is not. Tied parameters count once.
    """
    modules = dict(model.named_modules())
    left: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owner, _, _ = name.rpartition(".")
        if not is_lazy(parameter) and (rest := parameter.numel() - covered.get(name, 0)) > 0:
            why = _reason(modules[owner], parameter, skipped.get(owner))
            left[ADAPTERS if is_adapters(model, name) else why] += rest
    return dict(left.most_common())


def coverage(verb: str, covered: int, left: Mapping[str, int]) -> str:
    """One sentence: `planned 14.1% of 1,234 parameters; left dense are 85.0% (experts: ...)`."""
    total = covered + sum(left.values())
    sizes = sorted(left.items(), key=lambda item: -item[1])
    told = [(why, n) for why, n in sizes if n >= LEAST_TOLD * total][:TOLD]
    sentence = f"{verb} {covered / max(total, 1):.1%} of {total:,} parameters"
    if is_slight(covered, left):
        sentence = f"almost nothing: {sentence}"
    if told:
        listed = ", ".join(f"{n / total:.1%} ({why})" for why, n in told)
        sentence += f"; left dense are {listed}"
    return sentence


def is_slight(covered: int, left: Mapping[str, int]) -> bool:
    """Whether hardly any of what could have been meant is covered: of the model's matrices."""
    matrices = covered + sum(n for why, n in left.items() if why not in NO_MATRICES)
    return covered < SLIGHT * matrices


def _reason(module: nn.Module, parameter: Tensor, skipped: str | None) -> str:
    """Why a parameter is left alone; `skipped` says why its module is."""
    if parameter.dim() < 2:
        return VECTORS
    if skipped is not None:
        return skipped
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if parameter.dim() == 3 and "Experts" in type(module).__name__:
        return EXPERTS
    return f"parameters of {type(module).__name__}"
