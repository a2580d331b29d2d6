"""Groups of options: what the shell is shown, and what a command's function gets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from secateur.cli.command import command

Depth = Annotated[int, typer.Option(min=1, help="How deep.")]
Width = Annotated[str | None, typer.Option("--width", "-w")]


@dataclass(frozen=True)
class Size:
    depth: Depth = 3
    width: Width = None
    unit: str = "m"


IN_FEET = Size(depth=9, unit="ft")


def shell(function: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, list(arguments))


def test_a_group_has_its_class_s_defaults_or_its_parameter_s() -> None:
    got: list[Size] = []

    @command()
    def plain(*, size: Size) -> None:
        got.append(size)

    @command()
    def feet(*, size: Size = IN_FEET) -> None:
        got.append(size)

    for function in (plain, feet):
        assert shell(function).exit_code == 0
        assert shell(function, "-w", "wide", "--depth", "4").exit_code == 0
    assert got == [Size(), Size(4, "wide"), IN_FEET, Size(4, "wide", "ft")]


def test_options_of_a_group_are_checked_and_shown_as_they_are_written() -> None:
    @command()
    def build(*, size: Size, json: Annotated[bool, typer.Option("--json")] = False) -> None:
        """Build it."""

    shown = shell(build, "--help").output
    assert "Build it." in shown and "How deep." in shown and "unit" not in shown
    assert shown.index("--depth") < shown.index("--json") < shown.index("--debug")
    assert shell(build, "--depth", "0").exit_code == 2


def test_an_error_is_one_line_unless_it_is_to_be_debugged() -> None:
    @command()
    def fail(*, size: Size) -> None:
        raise ValueError(f"{size.depth} is wrong")

    refused = shell(fail)
    assert (refused.exit_code, refused.stderr) == (2, "error: 3 is wrong\n")
    assert isinstance(shell(fail, "--debug").exception, ValueError)


def test_an_interruption_says_where_finished_work_is_kept(tmp_path: Path) -> None:
    @command(kept="place")
    def stop(*, place: Annotated[Path, typer.Option()]) -> None:
        raise KeyboardInterrupt

    stopped = shell(stop, "--place", str(tmp_path))
    assert stopped.exit_code == 130 and f"is kept in {tmp_path}" in stopped.stderr


def test_two_options_of_one_name_are_refused() -> None:
    def twice(*, size: Size, depth: Depth = 1) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'depth'"):
        command()(twice)
