"""Groups of options that several commands take, each with what its options stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.cli import options as o
from secateur.cli.console import caution, working
from secateur.cli.methods import ChosenMethod, find_method
from secateur.cli.source import AUTO, STORED, Opened, open_folder, open_source
from secateur.cli.wording import in_options
from secateur.files.save import Report, require_writable
from secateur.integrations.documents import read_documents
from secateur.integrations.lm_eval import task_scores
from secateur.integrations.tokens import end_of_text, sampled_rows, stored_rows, text_rows
from secateur.integrations.transformers import read_config
from secateur.model.blocks import Batch
from secateur.model.plan import Plan, plan, read_plan

# Tokens in a row of text by default; fewer if the model has fewer positions.
LENGTH = 1024


@dataclass(frozen=True)
class Choice:
    """Which layers get which zeros."""

    patterns: o.Patterns = None
    plan: o.PlanFile = None
    layers: o.Layers = None
    ignore: o.Ignore = None

    def for_model(self, model: nn.Module) -> Plan:
        """The plan in the file, or the one that patterns and selectors make.

        Raises:
            ValueError: if both or neither are given, and as `plan` and `read_plan`.
        """
        if (self.plan is None) == (not self.patterns):
            found = "both" if self.plan else "neither"
            raise ValueError(f"either --pattern or --plan is needed, got {found}")
        if self.plan is not None:
            if self.layers or self.ignore:
                raise ValueError("--layers and --ignore go with --pattern: a plan names its layers")
            return read_plan(self.plan)
        assert self.patterns
        return plan(
            model, _mapped(self.patterns), layers=self.layers or None, ignore=self.ignore or ()
        )


@dataclass(frozen=True)
class How:
    """How a method is called: by which options, and whether the code in its file may run."""

    option: o.MethodOptions = None
    trust_code: o.TrustCode = False

    def method(self, name: str) -> ChosenMethod:
        """The method of that name, as `find_method`."""
        return find_method(name, self.option or (), trust_code=self.trust_code)

    @property
    def on_grid(self) -> bool:
        """Whether the method leaves weights on a grid."""
        return any(option.startswith("grid=") for option in self.option or ())


@dataclass(frozen=True)
class Data:
    """Where tokens come from. `prefix` is what the names of its options begin with."""

    text: o.TextFile = None
    tokens: o.TokenFile = None
    rows: o.Rows = 128
    length: o.Length = None
    batch: o.BatchSize = 8
    prefix: str = "--"

    @property
    def given(self) -> bool:
        return self.text is not None or self.tokens is not None

    @property
    def name(self) -> str:
        """The file's name, as a summary shows it."""
        return self.text.name if self.text else Path(self.tokens or "").name

    @property
    def named(self) -> str:
        """The option that names the file, with its value."""
        if self.text:
            return f"{self.prefix}text {self.text}"
        return f"{self.prefix}tokens {self.tokens}"

    @property
    def options(self) -> str:
        """The options that give a command the same data."""
        rows = [("rows", self.rows), ("length", self.length), ("batch", self.batch)]
        given = [f"--{name} {value}" for name, value in rows if value != getattr(Data(), name)]
        return " ".join([self.named, *given])

    def require_readable(self) -> None:
        """Raise ValueError if the data cannot be read: a check of data that nothing will use."""
        if self.text is not None:
            read_documents(self.text)
        if self.tokens is not None:
            stored_rows(self.tokens, 1, 1)

    def read(self, folder: Path) -> list[Batch]:
        """The batches, for the model in the folder; too few rows or documents are said on stderr.

        Raises:
            ValueError: if neither or both are given, or they cannot be read.
        """
        if (self.text is None) == (self.tokens is None):
            found = "both" if self.given else "neither"
            raise ValueError(
                f"data needs either {self.prefix}text FILE or {self.prefix}tokens FILE:KEY, got "
                f"{found}"
            )
        try:
            if self.text is not None:
                length = self.length or min(LENGTH, _positions(folder))
                dealt = text_rows(folder, self.text, self.rows, length, self.batch)
            else:
                end = end_of_text(folder)
                dealt = stored_rows(
                    str(self.tokens), self.rows, self.batch, end, length=self.length
                )
        except ValueError as error:
            raise ValueError(in_options(str(error), self.prefix)) from error
        for remark in dealt.remarks(f"{self.prefix}rows", "--length"):
            caution(remark)
        return list(dealt.batches)

    def and_sampled(self, folder: Path, dense: nn.Module, rows: int) -> list[Batch]:
        """The batches, and `rows` rows that the dense model wrote after them."""
        batches = self.read(folder)
        if not rows:
            return batches
        ids = [batch for batch in batches if isinstance(batch, Tensor)]
        return [*batches, *sampled_rows(dense, ids, rows)]


@dataclass(frozen=True)
class HeldOut:
    """The data to measure on, before and after."""

    eval_text: o.EvalText = None
    eval_tokens: o.EvalTokens = None
    eval_rows: o.EvalRows = 64

    def beside(self, data: Data) -> Data:
        """It as data, in rows and batches as long as the others."""
        return Data(
            self.eval_text, self.eval_tokens, self.eval_rows, data.length, data.batch, "--eval-"
        )


@dataclass(frozen=True)
class Harness:
    """What lm-eval measures."""

    tasks: o.Tasks = None
    task_folder: o.TaskFolder = None
    limit: o.Limit = None

    def scores(self, model: nn.Module, folder: Path | None, batch: int) -> dict[str, float]:
        """The tasks' scores of the model from the folder, by the names that reports print."""
        if not self.tasks or folder is None:
            return {}
        return task_scores(
            model, folder, self.tasks, own=self.task_folder, batch=batch, limit=self.limit
        )


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: in which dtype, on which device."""

    dtype: o.Dtype = AUTO
    device: o.Device = "auto"

    def for_grid(self) -> "Loading":
        """The same where weights are put on a grid.

        A grid's scales have the dtype of the weights. Chosen in another one than the file's, they
        would be rounded when they are written, and the weights lie on no grid any more.
        """
        return replace(self, dtype=STORED) if self.dtype == AUTO else self

    def source(self, name: str) -> Opened:
        """The model in a folder, or the state dict in a file, as `open_source`."""
        return open_source(name, self.dtype, self.device)

    def model(self, folder: Path) -> nn.Module:
        """The model in a folder, as `open_folder`."""
        return open_folder(folder, self.dtype, self.device).model


@dataclass(frozen=True)
class Out:
    """Where a model is written."""

    folder: o.Output
    overwrite: o.Overwrite = False

    def require_writable(self) -> None:
        """Raise ValueError if the folder is neither new nor empty nor may be replaced."""
        require_writable(self.folder, overwrite=self.overwrite)

    def write(self, source: Opened, plan: Plan | None, reports: Sequence[Report]) -> None:
        """Write the model with its plan and reports."""
        with working(f"writing {self.folder}"):
            source.write(self.folder, plan=plan, reports=reports, overwrite=self.overwrite)


def _mapped(patterns: Sequence[str]) -> Any:
    """The one pattern; or each selector with its pattern, from SELECTOR=PATTERN."""
    if len(patterns) == 1 and "=" not in patterns[0]:
        return patterns[0]
    chosen = {}
    for text in patterns:
        selector, equals, pattern = text.rpartition("=")
        if not equals:
            raise ValueError(f"several patterns need SELECTOR=PATTERN each, got {text!r}")
        chosen[selector] = pattern
    return chosen


def _positions(folder: Path) -> int:
    """How many positions the model in the folder has; `LENGTH` if it does not say."""
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) else LENGTH
