"""`SparseLinear`: an `nn.Linear` whose weight is stored packed and multiplied as it is stored."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.autocast import autocast_dtype, without_autocast
from secateur.core.weights import DTYPES
from secateur.formats.activations import ACTIVATIONS
from secateur.formats.contract import (
    Format,
    Implementation,
    Packed,
    Run,
    held_tensors,
    typed_tensor,
)
from secateur.formats.direct import Direct, is_plain, is_watched
from secateur.formats.format import parse_format
from secateur.formats.op import (
    linear_operator,
    refuse_onnx,
    register,
    serving,
    unpack_operator,
)
from secateur.formats.read_only import ReadOnlyWeight

# Token counts at which the default choice asks each implementation whether it can run. A limit is
# taken from the largest power of two that an implementation accepts.
PROBED_TOKENS = tuple(2**power for power in range(17))

Table = tuple[tuple[str, int | None], ...]
REFERENCE: Table = (("reference", None),)
VALUES = "values"  # every format stores a tensor of this name

DESCRIBED: dict[str, type] = {
    "format": str,
    "out_features": int,
    "in_features": int,
    "bias": bool,
    "dtype": str,
    "stored": int,
}


class SparseLinear(nn.Linear):
    """`y = x @ weight.T + bias` with a packed weight, in one operator that compile and export see.

    The weight is held once: as it is stored (`values`, `metadata`, ...), or as the kernels that run
    it read it, from which what is stored is restored bit for bit whenever it is asked for, by
    `state_dict`, a save, a move or a cast. These tensors are buffers under their own names, the
    bias an ordinary parameter. The weight is frozen; gradients flow to the input and the bias, so
    adapters can be trained on top of it. After `unfreeze_` its `values` are a parameter, too.

    `.to(dtype)` casts the values as it would cast a dense weight, or the scales of a quantised one;
    indices and codes keep their type. After `.to` another dtype or device, and after
    `load_state_dict`, implementations are chosen afresh, because what was measured no longer holds.

    Under `torch.autocast` inputs may be of any dtype that `nn.Linear` takes there, and results have
    autocast's. A float32 weight is multiplied in float32, by what was measured for it, and the
    result rounded; a 16-bit weight of another dtype is cast to autocast's, as a dense one is, and
    multiplied by the reference.
    """

    def __init__(
        self,
        packed: Packed,
        bias: nn.Parameter | None = None,
        name: str = "",
        table: Table | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = packed.shape
        self.format = packed.format
        register(self.format)
        self._operators = self.format.name
        self.name = name  # only for error messages
        self.unpacks_to: type[nn.Module] = nn.Linear  # or Conv1D; `swap` sets it
        self.activation = ""  # that is applied to the results; `fuse_activations_` sets it
        self.dtype = packed.dtype
        self._laid_out: Direct | None = None
        self._hold(packed.tensors)
        self._sizes = _sizes(packed)
        self.register_parameter("bias", bias)
        self.use(self._default() if table is None else table)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the dense weight."""
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return self._tensor(self._names[0]).device

    @property
    def held(self) -> Packed:
        """The weight by the tensors that this layer holds of it, stored ones or arranged."""
        return Packed(self.format, self.shape, self.dtype, self._held())

    @property
    def packed(self) -> Packed:
        """The packed weight as a checkpoint stores it: this layer's buffers, or restored from them.

        Cost: one pass over the weight where a kernel's arrangement is held instead.
        """
        return self.held.stored()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight in a checkpoint."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self._sizes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held."""
        return sum(self.held_bytes.values())

    @property
    def held_bytes(self) -> dict[str, int]:
        """Of each tensor of the weight that is held, the bytes: stored ones, and arranged ones."""
        return {name: tensor.nbytes for name, tensor in self._held().items()}

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """The dense weight, for reading: every way of writing to it raises.

        It is unpacked afresh, so a write would be lost. `unpack_(model)` gives the layer a weight
        that can be changed.

        Cost: unpacks the whole weight at every access; ask the layer's own `dtype` and `device`.
        """
        with torch.no_grad():
            what = *self.shape, self.dispatch, self.dtype
            dense: Tensor = unpack_operator(self._operators)(*self._parts(), *what)
        if torch.compiler.is_compiling():  # models read weight.dtype in forward; see no subclass
            return dense
        return dense.as_subclass(ReadOnlyWeight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ValueError(
                f"{self._title()} needs its weight left packed, got an assignment to .weight: "
                "call unpack_(model) first and pack_ again afterwards; merging a dense adapter "
                "would destroy the zeros, so keep the adapter beside the layer, or unpack and "
                "merge by secateur.integrations.peft.merge_adapters_"
            )
        super().__setattr__(name, value)

    def use(self, table: Table) -> None:
        """Run the implementations of `table` from now on, the weight arranged for them.

        Rows are (implementation, largest number of tokens), ascending; the last limit is None.

        Raises: ValueError if an implementation does not exist, cannot run here, or limits do not
            ascend; then nothing has changed.
        """
        chosen = dict.fromkeys(self._validated(table))  # each once, in order
        tensors, names = self._held(), held_tensors(self.format, chosen)
        if not tensors.keys() >= set(names):
            stored = self.packed
            tensors |= stored.tensors
            for entry in chosen:
                if not tensors.keys() >= set(entry.reads(self.format)):
                    tensors |= entry.arranged(stored).tensors
        self._hold({name: tensors[name] for name in names})
        self.dispatch = " ".join(
            name if limit is None else f"{name}<={limit}" for name, limit in table
        )
        self._laid_out = None

    def runs(self, tokens: int) -> str:
        """The name of the implementation that serves so many tokens."""
        return serving(self.dispatch, self.format, tokens).name

    @property
    def trains(self) -> bool:
        """Whether the weight is trained: `values` is a parameter."""
        return VALUES in self._parameters

    def unfreeze_(self) -> "SparseLinear":
        """Make `values` a parameter, so that an optimizer of `parameters()` trains what is kept.

        What is zero and not stored stays zero. From now on only implementations run that read
        `values`; those with gradients of their own make nothing dense.

        Raises: ValueError for a format that rounds: its values are codes.
        """
        if not self.format.is_exact:
            raise ValueError(
                f"{self._title()} needs an exact format to train its weight, got {self.format}: "
                "call unpack_(model), train it under hold(...), and pack_ it again"
            )
        if not self.trains:
            self.use(REFERENCE)
            tensors = self._held()
            values = nn.Parameter(tensors[VALUES].detach())
            self._hold({**tensors, VALUES: values})
            self.use(self._default())
        return self

    def lie_in(self, name: str, place: Tensor) -> None:
        """Hold the tensor of this name in `place` from now on, which has the same numbers.

        So layers that run together can have theirs one after another in one piece of memory.
        """
        self._buffers[name] = place

    def forward(self, input: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """`input @ weight.T + bias`, from the packed weight; then the activation, if one is fused.

        Raises: ValueError for an input of another dtype or width.
        """
        if not torch.compiler.is_dynamo_compiling() and (run := self._direct(input)) is not None:
            return run(input)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            refuse_onnx(self.format.name)
        if (lower := autocast_dtype(self.device)) is not None:
            # Of float64 autocast keeps its hands off, and so of what is no number to be rounded.
            dtypes = (input.dtype, self.dtype)
            if all(d.is_floating_point and d is not torch.float64 for d in dtypes):
                with without_autocast(self.device):
                    return self._under_autocast(input, lower)
        return self._multiplied(input)

    def _direct(self, input: Tensor) -> Run | None:
        """What the operator would run for this input, if nothing else is to come of the call.

        That is: an ordinary input on a CPU, nothing that follows operators, no gradients, and an
        implementation that can be laid out in advance.
        """
        if not is_plain(input) or self.activation or self.trains or is_watched():
            return None
        bias = self._parameters.get("bias")
        if torch.is_grad_enabled() and (
            input.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return None
        shape = input.shape
        if input.dtype != self.dtype or shape[-1:] != (self.in_features,):
            return None
        direct = self._laid_out
        if direct is None or not direct.is_of(self._buffers, bias):
            if self.bias is not bias:  # a parametrization computes it
                return None
            direct = self._laid_out = Direct.of(self.held, bias, self.dispatch)
        return None if direct is None else direct.run(shape[:-1].numel())

    def _under_autocast(
        self, input: Float[Tensor, "*tokens in"], lower: torch.dtype
    ) -> Float[Tensor, "*tokens out"]:
        if self.dtype in (torch.float32, lower):
            return self._multiplied(input.to(self.dtype)).to(lower)
        typed = typed_tensor(self.format.tensors)
        parts = [
            part.to(lower) if name == typed else part for name, part in self.packed.tensors.items()
        ]
        result: Tensor = linear_operator(self._operators)(
            input.to(lower),
            *(*parts, None),
            None if self.bias is None else self.bias.to(lower),
            *(*self.shape, "reference", ""),
        )
        return ACTIVATIONS[self.activation](result) if self.activation else result

    def _multiplied(self, input: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if input.dtype != self.dtype:
            raise ValueError(
                f"{self._title()} needs {_short(self.dtype)} input, got {_short(input.dtype)}: "
                f"cast the input, or the layer with .to(torch.{_short(input.dtype)})"
            )
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._title()} needs input of width {self.in_features}, "
                f"got shape {tuple(input.shape)}: check the layer before it"
            )
        bias, activation = self.bias, self.activation
        if activation and torch.is_grad_enabled():
            if input.requires_grad or any(p.requires_grad for p in self.parameters()):
                activation = ""  # the operator has gradients of the linear alone
        result: Tensor = linear_operator(self._operators)(
            input, *self._parts(), bias, *(*self.shape, self.dispatch, activation)
        )
        return result if activation == self.activation else ACTIVATIONS[self.activation](result)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, runs={self.dispatch}"
            + (f", activation={self.activation}" if self.activation else "")
        )

    def _title(self) -> str:
        return f"SparseLinear {self.name!r}" if self.name else "SparseLinear"

    def _held(self) -> dict[str, Tensor]:
        """The tensors of the weight by name: those that are stored first."""
        return {name: self._tensor(name) for name in self._names}

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor | None = self._parameters.get(name)
        tensor = self._buffers[name] if tensor is None else tensor
        assert tensor is not None
        return tensor

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold these tensors of the weight and no others."""
        for name in getattr(self, "_names", ()):
            delattr(self, name)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=name in self.format.tensors)
        self._names = tuple(tensors)

    def _parts(self) -> tuple[Any, ...]:
        """What is held, as operators take it: each stored tensor or None, the others or None."""
        stored = self.format.tensors
        held = self._held()
        arranged = [tensor for name, tensor in held.items() if name not in stored]
        return *(held.get(name) for name in stored), arranged or None

    def _default(self) -> Table:
        """For each number of tokens, the first implementation that can run it from one copy.

        What holds a copy beside the weight is for a table, or `accelerate_`, to choose.
        """
        rows = list[tuple[str, int | None]]()
        for tokens in PROBED_TOKENS:
            name = next(
                implementation.name
                for implementation in self.format.implementations
                if (implementation.restores or implementation.arrangement is None)
                and self._why_not(implementation, tokens) is None
            )
            if rows and rows[-1][0] == name:
                rows.pop()
            rows.append((name, tokens))
        return (*rows[:-1], (rows[-1][0], None))

    def _why_not(self, implementation: Implementation, tokens: int) -> str | None:
        """Why it cannot run this layer as it is, or None."""
        if self.trains and VALUES not in implementation.reads(self.format):
            return f"it does not read {VALUES}, which are trained: pack the trained model again"
        return implementation.why_not(self.held, tokens)

    def _validated(self, table: Table) -> tuple[Implementation, ...]:
        known = {entry.name: entry for entry in self.format.implementations}
        limits = [limit for _, limit in table[:-1]]
        rising = all(
            limit is not None and limit > (before or 0)
            for before, limit in zip([0, *limits], limits, strict=False)
        )
        if not table or table[-1][1] is not None or not rising:
            raise ValueError(
                f"{self._title()} needs ascending limits that end with None, got {table}: "
                "give the last implementation no limit"
            )
        for name, limit in table:
            if name not in known:
                raise ValueError(
                    f"{self.format} has no implementation {name!r}: it has {', '.join(known)}"
                )
            problem = self._why_not(known[name], limit or PROBED_TOKENS[-1])
            if problem is not None:
                raise ValueError(f"{self._title()} cannot run {name} here: {problem}")
        return tuple(known[name] for name, _ in table)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseLinear":
        """A copy that holds the same tensors; pickling stores what a checkpoint does."""
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__ = deepcopy(self.__dict__, memo)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle: what is arranged is for this device and release alone."""
        stored = self.packed.tensors
        others = {name: b for name, b in self._buffers.items() if name not in self._names}
        buffers = {name: t for name, t in stored.items() if name not in self._parameters}
        changed = {"_buffers": {**others, **buffers}, "_names": tuple(stored), "_laid_out": None}
        return {**self.__dict__, **changed, "_non_persistent_buffers_set": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a layer that was pickled, perhaps in another process."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register(self.format)
        rows = (word.partition("<=") for word in self.dispatch.split())
        try:
            self.use(tuple((name, int(limit) if limit else None) for name, _, limit in rows))
        except ValueError:  # it was pickled where something ran that cannot run here
            self.use(self._default())

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (like.device, like.dtype) == (self.device, self.dtype):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        # memory that has just left the meta device holds no indices that could be arranged
        from_meta = self.device.type == "meta"
        self.use(REFERENCE)  # what is arranged is for one dtype, and one kind of device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = like.dtype
        self._sizes = _sizes(self.held)
        if not from_meta:
            self.use(self._default())
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if any(name not in self._names for name in self.format.tensors):
            for name, tensor in self.packed.tensors.items():
                destination[prefix + name] = destination.pop(prefix + name, tensor)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take tensors that are right in every respect, or none: a kernel trusts its indices."""
        given = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        own = [*self._sizes, *([] if self.bias is None else ["bias"])]
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        problem = self._why_not_loaded({k: given[k] for k in own if k in given}, assign)
        if "weight" in given:
            problem = (
                f"it holds a dense {prefix}weight: load it into unpack_(model), then pack_ again"
            )
        if problem is not None:
            error_msgs.append(f"{self._title()} cannot use the checkpoint: {problem}")
            return
        self.use(REFERENCE)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not any(tensor.is_meta for tensor in self._held().values()):
            self.use(self._default())

    def _why_not_loaded(self, given: Mapping[str, Any], assign: bool) -> str | None:
        """Why these tensors cannot take the places of this layer's own, or None."""
        if (parts := given.keys() & self._sizes.keys()) and len(parts) < len(self._sizes):
            lacking = next(key for key in self._sizes if key not in parts)
            return f"it has {min(parts)} and lacks {lacking}, of one packed weight"
        bias = {} if self.bias is None else {"bias": (self.bias.shape, self.bias.dtype)}
        own, typed = {**self._sizes, **bias}, typed_tensor(self._sizes)
        for key, new in given.items():
            shape, dtype = own[key]
            if not isinstance(new, Tensor) or new.layout != torch.strided:
                return f"{key} needs to be a plain tensor, got {type(new).__name__}"
            if new.shape != shape:
                return f"{key} needs shape {tuple(shape)}, got {tuple(new.shape)}"
            casts = key in (typed, "bias") and not assign
            if new.dtype != dtype and not (casts and new.dtype in DTYPES):
                return f"{key} needs {_short(dtype)}, got {_short(new.dtype)}"
            if new.is_meta and self.device.type != "meta":
                return f"{key} has no data (meta device)"
        if not parts or any(given[key].is_meta for key in self._sizes):
            return None
        tensors = {key: given[key].detach().to(dtype) for key, (_, dtype) in self._sizes.items()}
        return self.format.why_broken(Packed(self.format, self.shape, self.dtype, tensors))


def describe(linear: SparseLinear) -> dict[str, int | str | bool]:
    """Plain data that, with the layer's tensors, is enough to make it again; see `empty_from`."""
    return {
        "format": str(linear.format),
        "out_features": linear.out_features,
        "in_features": linear.in_features,
        "bias": linear.bias is not None,
        "dtype": _short(linear.dtype),
        "stored": linear._sizes["values"][0][0],
    }


def empty_from(
    description: dict[str, Any], name: str = "", formats: Sequence[Format] = ()
) -> SparseLinear:
    """A layer of zeros of the described sizes, for `load_state_dict` to fill.

    Nothing but the listed keys and known names is accepted, so a description may come from a file.
    `formats` are yours that it may name beside the library's.

    Raises: ValueError if a key is missing, unknown or of another type, or the sizes do not agree.
    """
    if set(description) != DESCRIBED.keys():
        raise ValueError(
            f"a packed layer's description needs the keys {', '.join(DESCRIBED)}, "
            f"got {', '.join(map(str, description))}: save the model again"
        )
    for key, kind in DESCRIBED.items():
        value = description[key]
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"a packed layer's {key} needs a {kind.__name__}, got {value!r}: "
                "save the model again"
            )
    dtypes = {_short(dtype): dtype for dtype in DTYPES}
    if description["dtype"] not in dtypes:
        raise ValueError(
            f"a packed layer's dtype needs to be one of {', '.join(dtypes)}, "
            f"got {description['dtype']!r}: save the model again"
        )
    dtype = dtypes[description["dtype"]]
    shape = description["out_features"], description["in_features"]
    packed = parse_format(description["format"], formats).empty(shape, description["stored"], dtype)
    bias = (
        nn.Parameter(torch.zeros(shape[0], dtype=dtype, device="cpu"))
        if description["bias"]
        else None
    )
    return SparseLinear(packed, bias, name, REFERENCE)  # zeros are no indices to arrange


def _sizes(stored: Packed) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each tensor that a checkpoint stores."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in stored.tensors.items()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
