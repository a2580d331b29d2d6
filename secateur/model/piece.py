"""A matrix that lives in another module's parameter, alone or among others, as a linear layer.

The layer's weight is the parameter's own memory, so that what is written into it is written into
the model. What a module holds so is listed by `experts`, `attention` and `recurrent`.
"""

from collections.abc import Callable

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F


def _whole(parameter: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    return parameter


class Piece(nn.Linear):
    """A matrix `[out, in]` of a parameter of `owner`, without bias.

    `inner` is its name in the owner, and `take` the view of it in a tensor of the parameter's
    shape. One of a stack of experts has its `index` there and multiplies. Other owners multiply
    themselves, in one kernel: their pieces are only shown the inputs, and hand them back.
    """

    owner: nn.Module

    def __init__(
        self,
        owner: nn.Module,
        key: str,
        inner: str,
        take: Callable[[Tensor], Tensor] = _whole,
        *,
        index: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # no child: the owner holds this layer's weight
        self.key, self.inner, self.piece_of, self.index = key, inner, take, index
        whole = self.held()
        self.weight = nn.Parameter(take(whole.detach()), requires_grad=whole.requires_grad)
        self.out_features, self.in_features = self.weight.shape
        self.register_parameter("bias", None)
        self.train(owner.training)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens _"]:
        return x if self.index is None else F.linear(x, self.piece_of(self.held()))

    @property
    def parameter(self) -> nn.Parameter:
        """The owner's parameter that holds the matrix."""
        parameter = self.held()
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def held(self) -> Shaped[Tensor, "..."]:
        """The owner's parameter, or what `torch.func.functional_call` has put in its place."""
        held: Tensor | None = self.owner._parameters[self.key]
        assert held is not None
        return held

    def current(self) -> nn.Parameter:
        """The weight, where the parameter is now: `.to` and loading give it other memory."""
        weight, now = self._parameters["weight"], self.piece_of(self.parameter.detach())
        assert weight is not None
        if weight.device.type == now.device.type:
            weight.data = now
        else:  # of another kind of tensor, as after the meta device
            self.weight = weight = nn.Parameter(now, requires_grad=weight.requires_grad)
        return weight


def is_expert(module: nn.Module) -> bool:
    """Whether the layer is one of a stack of experts, of which each sees tokens of its own."""
    return isinstance(module, Piece) and module.index is not None


def kind_of(module: nn.Module) -> str:
    """What the layer is called where layers are listed: the class that runs it."""
    if not isinstance(module, Piece):
        return type(module).__name__
    return "Expert" if is_expert(module) else type(module.owner).__name__


def parameter_name(name: str, module: nn.Module) -> str:
    """The name of the parameter that holds this layer's weight, alone or among others."""
    if isinstance(module, Piece):
        return f"{owner_name(name, module)}.{module.key}".removeprefix(".")
    return f"{name}.weight" if name else "weight"


def owner_name(name: str, module: nn.Module) -> str:
    """The name of the module that has the parameter with the weight of the layer of this name."""
    if isinstance(module, Piece):
        return name.removesuffix(module.inner).removesuffix(".")
    return name
