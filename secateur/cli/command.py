"""From a command's function to what typer reads: groups spelt out, errors in one line.

A function takes groups of options (`data: Data`), typer wants a parameter for each option. A
decorator stands between them, so that an option is written once, however many commands have it.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_origin, get_type_hints

from secateur.cli import options as o
from secateur.cli.console import failures

Function = Callable[..., None]

# Options that most commands have; the help shows them behind a command's own, in this order.
LAST = {"dtype": 1, "device": 2, "overwrite": 3, "full": 4, "json": 4, "debug": 5}


def command(*, kept: str | None = None) -> Callable[[Function], Function]:
    """A decorator that makes a command of a function.

    A parameter whose type is a dataclass is a group: it becomes an option for each field that is
    annotated as one. The parameter's default is an instance, whose values are the defaults of the
    options; without it, the class's defaults hold. `--debug` is added, and an error that the user
    can repair becomes one line. `kept` names the option that says where finished work is kept.
    """

    def decorate(function: Function) -> Function:
        hints = get_type_hints(function, include_extras=True)
        taken = [
            parameter.replace(annotation=hints[name])
            for name, parameter in signature(function).parameters.items()
        ]
        debug = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=o.Debug)
        shown = [debug, *(option for parameter in taken for option in _spelt_out(parameter))]
        shown.sort(key=lambda option: LAST.get(option.name, 0))

        @wraps(function)
        def run(**options: Any) -> None:
            where = None if kept is None else options[kept]
            with failures(options["debug"], where):
                function(**{parameter.name: _value(parameter, options) for parameter in taken})

        run.__signature__ = Signature(shown)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in shown}
        return run

    return decorate


def _spelt_out(parameter: Parameter) -> list[Parameter]:
    """A parameter for each option of a group; the parameter itself if it is no group."""
    group, given = parameter.annotation, parameter.default
    if not is_dataclass(group):
        return [parameter]
    hints = get_type_hints(group, include_extras=True)
    spelt = []
    for field in fields(group):
        default = field.default if given is Parameter.empty else getattr(given, field.name)
        if get_origin(hints[field.name]) is Annotated:
            spelt.append(
                Parameter(
                    field.name,
                    Parameter.KEYWORD_ONLY,
                    default=Parameter.empty if default is MISSING else default,
                    annotation=hints[field.name],
                )
            )
    return spelt


def _value(parameter: Parameter, options: dict[str, Any]) -> Any:
    """What the function gets for its parameter: a group of the options, or the option."""
    group, given = parameter.annotation, parameter.default
    if not is_dataclass(group):
        return options[parameter.name]
    values = {option.name: options[option.name] for option in _spelt_out(parameter)}
    if given is Parameter.empty:
        assert isinstance(group, type)
        return group(**values)
    return replace(given, **values)
