"""Plans without curves for `secateur allocate`: ERK, OWL, or one threshold for all scores."""

from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.allocation import erk, owl, threshold
from secateur.allocation.threshold import NORMALISATIONS
from secateur.cli import options as o
from secateur.cli.console import caution
from secateur.cli.groups import Data
from secateur.cli.methods import ChosenMethod, criteria_by_name, find_criterion
from secateur.cli.source import Opened
from secateur.model.blocks import Batch
from secateur.patterns import Pattern

FORMULAS = ("erk", "owl", "threshold")


@dataclass(frozen=True)
class Formula:
    """Which weights get how many zeros together, and how their scores compare."""

    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            "-p",
            help="For erk, owl and threshold: what all weights together get, such as "
            "unstructured:0.7@layer.",
            show_default=False,
        ),
    ] = None
    layers: o.Layers = None
    ignore: o.Ignore = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=f"For threshold, how weights are scored: {', '.join(criteria_by_name())}.",
        ),
    ] = "magnitude"
    trust_code: o.TrustCode = False
    normalise: Annotated[
        str | None,
        typer.Option(
            help="For threshold, how scores of different layers compare: none, as they are, for "
            "taylor, fisher and snip; rms, over the layer's mean square; lamp, for magnitude.",
            show_default=False,
        ),
    ] = None
    floor: Annotated[
        float,
        typer.Option(
            help="For threshold, the share of its weights that every layer keeps at least."
        ),
    ] = 0.0

    def require_valid(self, by: str, data: Data) -> None:
        """Check the options, before a model is loaded; data that is not read is said on stderr.

        Raises:
            ValueError: if one is missing or wrong.
        """
        if self.pattern is None:
            such = "unstructured:0.7@layer" if by == "threshold" else "unstructured:0.7"
            raise ValueError(f"--by {by} needs --pattern, such as --pattern {such}")
        if by == "threshold" and self.normalise not in NORMALISATIONS:
            got = "" if self.normalise is None else f", got {self.normalise!r}"
            raise ValueError(
                "--by threshold needs --normalise none (scores that estimate the loss: taylor, "
                f"fisher, snip), rms or lamp (magnitude){got}"
            )
        if data.given and (by == "erk" or (by == "threshold" and not self._criterion().needs)):
            who = "erk" if by == "erk" else f"method {self.method!r}"
            caution(f"{data.named} is not read: {who} needs no data")

    def patterns(self, by: str, source: Opened, data: Data) -> dict[str, Pattern]:
        """The layers' patterns.

        Raises:
            ValueError: as the formulas; if data is needed and missing, or the model cannot run.
        """
        assert self.pattern is not None, "asked before"
        layers, ignore = self.layers or None, self.ignore or ()
        if by == "erk":
            return erk(source.model, self.pattern, layers=layers, ignore=ignore)
        if by == "owl":
            batches = _batches(source, data, "--by erk")
            return owl(source.model, self.pattern, batches, layers=layers, ignore=ignore)
        chosen = self._criterion()
        needed = _batches(source, data, "--method magnitude") if chosen.needs else None
        return threshold(
            source.model, self.pattern, chosen.function, needed,
            normalise=self.normalise,  # type: ignore[arg-type]
            floor=self.floor, layers=layers, ignore=ignore,
        )  # fmt: skip

    def followed_by(self, by: str, data: Data) -> str:
        """The options by which `secateur prune` drops what is below the threshold."""
        if by != "threshold":
            return ""
        options = [f"--method {self.method}"] if self.method != "magnitude" else []
        options += ["--trust-code"] if self.trust_code else []
        options += [data.options] if self._criterion().needs else []
        return "".join(f" {option}" for option in options)

    def _criterion(self) -> ChosenMethod:
        return find_criterion(self.method, trust_code=self.trust_code)


def _batches(source: Opened, data: Data, otherwise: str) -> list[Batch]:
    """The data; `otherwise` is what needs none."""
    if source.state_dict:
        raise ValueError(
            f"{source.path} is a bare state dict, which cannot be run on data: name the model's "
            f"folder, or use {otherwise}"
        )
    return data.read(source.path)
