"""What is done around the steps of optimizers, whoever calls them, and who may take steps at all.

An optimizer's step hooks are called around its class's own step, so they see the steps of
schedulers, scalers, accelerate and Lightning alike. What they do not see is refused: a global hook
raises before an optimizer updates a watched weight without having been given.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as _optimizer
from torch.utils.hooks import RemovableHandle

from secateur.core.wrappers import optimizers_with_hooks
from secateur.train.weights import Weight

Optimizer = torch.optim.Optimizer


def as_optimizers(given: object) -> list[Optimizer]:
    """One optimizer or several as a list.

    Raises: ValueError if something else is given, or none.
    """
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    # Lightning's wrapper is none by its class, and has one.
    inside = [
        one if isinstance(one, Optimizer) else getattr(one, "optimizer", 0) for one in several
    ]
    optimizers = [one for one in inside if isinstance(one, Optimizer)]
    if not several or len(optimizers) < len(several):
        kinds = ", ".join(type(one).__name__ for one in several) or "none"
        raise ValueError(
            f"training with zeros needs a torch.optim.Optimizer or a list of them, got {kinds}: "
            "pass what updates the weights"
        )
    return optimizers


def parameters_of(optimizer: Optimizer) -> dict[int, Tensor]:
    """The parameters that the optimizer updates, by identity."""
    return {id(p): p for group in optimizer.param_groups for p in group["params"]}


class Steps:
    """The steps that some optimizers take of a model's weights, counted.

    An optimizer that hands its steps on to another, as accelerate's and SAM do, counts none itself.
    Steps that a GradScaler skips are none. Optimizers are known weakly.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        weights: Mapping[str, Weight],
        verb: str,
    ) -> None:
        hooked = [one for given in optimizers for one in optimizers_with_hooks(given)]
        unique = list({id(one): one for one in hooked}.values())
        counting = [one for one in unique if len(optimizers_with_hooks(one)) == 1]
        self._counting = [weakref.ref(one) for one in counting]
        self.counts = [0] * len(counting)
        self._begun = set[int]()  # the optimizers that are in a step, by identity
        self.optimizers = weakref.WeakSet(unique)
        self._handles: list[RemovableHandle] = []
        self._model, self._verb = model, verb
        self._weights: dict[str, Weight] = {}
        self._parameters: dict[str, nn.Parameter] = {}  # as they were when they were added
        self._watch = Watch(self, model, verb)
        self.add(weights)

    def add(self, weights: Mapping[str, Weight]) -> None:
        """Take these weights as well for what is trained with zeros, and watch over them."""
        self.watch(weights)
        for name, weight in weights.items():
            assert weight.parameter is not None
            self._weights[name], self._parameters[name] = weight, weight.parameter

    def drop(self, names: Iterable[str]) -> None:
        """Train these as any others; other optimizers are still refused."""
        for name in names:
            del self._weights[name], self._parameters[name]

    def watch(self, weights: Mapping[str, Weight]) -> None:
        """Refuse steps of other optimizers that update these weights."""
        self._watch.add(weights)

    def require(self, counts: Sequence[int]) -> None:
        """Raise unless a run may go on with these counts of steps.

        Raises: ValueError if they are of other optimizers, or run backwards.
        """
        if len(counts) != len(self.counts):
            raise ValueError(
                f"this state is of {len(counts)} optimizers, {self._verb} has {len(self.counts)}: "
                "give it as many, in the same order"
            )
        for count, now in zip(counts, self.counts, strict=True):
            if count < now:
                raise ValueError(
                    f"this state is of step {count}, training is at step {now} and cannot run "
                    f"backwards: load the weights of step {count}, release() this {self._verb}, "
                    "make a new one and load its state"
                )

    def count_of(self, optimizer: Optimizer) -> int | None:
        """How many steps the optimizer has taken; None for one that hands on to another."""
        for one, count in zip(self._counting, self.counts, strict=True):
            if one() is optimizer:
                return count
        return None

    def attach(
        self,
        before: Callable[[Optimizer, bool], None],
        after: Callable[[Optimizer, int | None], None],
        again: Callable[[Optimizer], None] = lambda optimizer: None,
    ) -> None:
        """Have `before` called ahead of each step, and `after` behind it.

        `before(optimizer, final)` is called where gradients have just been made: ahead of a step,
        and at the end of each call of a step's closure. `final` is False ahead of a step with a
        closure, whose gradients are still to come. `after(optimizer, step)` has the number of steps
        that the optimizer has taken; it is None for one that hands on to another, which counts.
        `again(optimizer)` is called ahead of each call of a closure.

        The optimizers hold these functions, and nothing else here does: they end together.
        """
        for one in self.optimizers:
            pre = partial(self._before_step, before, again)
            post = partial(self._after_step, after)
            self._handles += [one.register_step_pre_hook(pre), one.register_step_post_hook(post)]

    def release(self) -> None:
        """Let the optimizers take steps as if nothing had been attached."""
        self._watch.end()
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self,
        before: Callable[[Optimizer, bool], None],
        again: Callable[[Optimizer], None],
        optimizer: Optimizer,
        args: Any,
        kwargs: Any,
    ) -> Any:
        self._require_as_seen()
        self._require_owner()
        self._begun.add(id(optimizer))
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            if not _is_skipped(optimizer):
                before(optimizer, True)
            return None
        before(optimizer, False)

        @wraps(closure)
        def then_before() -> Any:
            again(optimizer)
            result = closure()
            before(optimizer, True)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_before}
        return (args[0], then_before, *args[2:]), kwargs

    def _after_step(
        self,
        after: Callable[[Optimizer, int | None], None],
        optimizer: Optimizer,
        args: Any,
        kwargs: Any,
    ) -> None:
        if _is_skipped(optimizer):
            return
        step = None
        # Two hooks behind one step: a subclass's, and another of the class whose step it calls.
        is_first = id(optimizer) in self._begun
        self._begun.discard(id(optimizer))
        for i, one in enumerate(self._counting):
            if is_first and one() is optimizer:
                self.counts[i] += 1
                step = self.counts[i]
        after(optimizer, step)

    def _require_as_seen(self) -> None:
        for name, weight in self._weights.items():
            try:
                module = self._model.get_submodule(weight.path)
            except AttributeError:
                module = None
            if module is not weight.owner or weight.parameter is not self._parameters[name]:
                raise ValueError(
                    f"{weight.name} has been replaced since {self._verb} began: release() it and "
                    "begin anew, after what replaces parameters (sharding, adapters, new layers)"
                )

    def _require_owner(self) -> None:
        held = {id(parameter) for parameter in self._parameters.values()}
        if all(held.isdisjoint(parameters_of(one)) for one in self.optimizers):
            raise ValueError(
                f"the optimizer updates none of the {len(held)} held weights any more: release(), "
                f"and give {self._verb} the optimizer that does"
            )


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has found infinite gradients, so that a fused step changes nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


class Watch:
    """Raises before an optimizer that was not given updates one of these weights.

    Nor may it update what has taken the place of one, as a sharded parameter does. Weights, model
    and optimizers are known weakly: the watch ends with the weights and the model.
    """

    def __init__(self, steps: Steps, model: nn.Module, verb: str) -> None:
        self._optimizers, self.verb = steps.optimizers, verb
        self._steps = weakref.ref(steps)
        self._model = weakref.ref(model, self._end_without)
        self._names: dict[int, tuple[weakref.ref[nn.Parameter], str]] = {}
        self._places: dict[tuple[str, str], str] = {}
        self._handle = _optimizer.register_optimizer_step_pre_hook(self)

    def add(self, weights: Mapping[str, Weight]) -> None:
        for weight in weights.values():
            if (parameter := weight.parameter) is None:
                continue
            key = id(parameter)
            self._places.setdefault((weight.path, weight.parameter_key), weight.name)
            if key not in self._names:
                self._names[key] = weakref.ref(parameter, partial(self._forget, key)), weight.name

    def end(self) -> None:
        """Watch no more."""
        self._handle.remove()

    def release(self) -> None:
        """Watch no more, and end what is done around the optimizers' steps."""
        self.end()
        if steps := self._steps():
            steps.release()

    def is_on(self) -> bool:
        """Whether an optimizer is left that may update the weights.

        A trainer and its optimizer that refer to each other outlive the function that made them
        until garbage is collected.
        """
        if self._optimizers:
            gc.collect()
        return bool(self._optimizers)

    def watched(self, parameters: Mapping[int, Tensor]) -> str | None:
        """The name of the first of these parameters that is watched, or in the place of one."""
        return self._by_identity(parameters) or self._by_place(parameters)

    def _by_identity(self, parameters: Mapping[int, Tensor]) -> str | None:
        return next((self._names[key][1] for key in parameters if key in self._names), None)

    def _by_place(self, parameters: Mapping[int, Tensor]) -> str | None:
        model = self._model()
        for (path, key), name in self._places.items() if model is not None else ():
            with contextlib.suppress(AttributeError):  # there is no such module any more
                assert model is not None
                if id(model.get_submodule(path)._parameters.get(key)) in parameters:
                    return name
        return None

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if optimizer in self._optimizers:
            return
        own, kind = parameters_of(optimizer), type(optimizer).__name__
        if name := self._by_identity(own):
            owner = "another optimizer" if self.is_on() else "an optimizer that is gone"
            raise ValueError(
                f"{self.verb} was given {owner}, and this {kind} updates {name}: give it all "
                f"optimizers of the model, {self.verb}(model, [a, b]), or end it with "
                "secateur.train.release(model)"
            )
        if name := self._by_place(own):
            raise ValueError(
                f"{name} has been replaced since {self.verb} began, and this {kind} updates what "
                "is there now: end it with secateur.train.release(model) and begin anew"
            )

    def _forget(self, key: int, gone: object) -> None:
        self._names.pop(key, None)
        self._end_without(gone)

    def _end_without(self, gone: object) -> None:
        if not self._names and self._model() is None:
            self.end()


def release(model: nn.Module) -> None:
    """End every `hold` and `movement` of this model's weights; the weights stay as they are.

    It is for what `release()` cannot be called of, because it was not kept.
    """
    for watch in _watches_of(model.parameters()):
        watch.release()


def require_free(weights: Mapping[str, nn.Parameter]) -> None:
    """Raise if one of the weights is held already, and end holds whose optimizers are gone.

    Raises: ValueError with the weight's name.
    """
    for watch in _watches_of(weights.values()):
        if watch.is_on():
            name = watch.watched({id(p): p for p in weights.values()})
            raise ValueError(
                f"{name} is held already: call release() of what {watch.verb} returned, or "
                "secateur.train.release(model); several optimizers go into one call, [a, b]"
            )
        watch.end()


def require_not_held(model: nn.Module) -> None:
    """Raise if the model is held, so that zeros that were made now would be lost in training.

    Raises: ValueError with the name of a held weight.
    """
    parameters = list(model.parameters())
    for watch in _watches_of(parameters):
        if watch.is_on():
            name = watch.watched({id(p): p for p in parameters})
            raise ValueError(
                f"{name} is held with the zeros that it had, new ones would be lost: call "
                f"release() of what {watch.verb} returned, or secateur.train.release(model), and "
                "hold the model anew once it is pruned"
            )


def _watches_of(parameters: Iterable[Tensor]) -> list[Watch]:
    """The watches over one of these parameters."""
    own = {id(p): p for p in parameters}
    hooks = list(_optimizer._global_optimizer_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, Watch) and hook.watched(own)]
