"""Opening what a command names: a model, its data, its plan, and the place where results go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from secateur.cli.console import caution, working
from secateur.cli.wording import in_options
from secateur.files.save import Report, load, write_model
from secateur.files.sidecar import verify_if_saved
from secateur.files.state_dict import Bare, find_bare, read_bare, write_bare
from secateur.model.blocks import Batch
from secateur.model.plan import Plan, plan, read_plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO, STORED = "auto", "stored"
# What a row of text has by default, or fewer where the model has fewer positions.
LENGTH = 1024


@dataclass(frozen=True)
class Source:
    """An opened model; `bare` where it is a state dict without an architecture.

    `stored` are the dtypes on disk of parameters that are held in another one meanwhile.
    """

    path: Path
    model: nn.Module
    bare: Bare | None
    stored: Mapping[str, torch.dtype]

    @property
    def size(self) -> int:
        """Bytes of its weight files."""
        files = self.bare.files if self.bare else model_files(self.path)
        return sum(file.stat().st_size for file in files)

    def write(
        self, out: Path, *, plan: Plan | None, reports: Iterable[Report], overwrite: bool
    ) -> None:
        """Write the model into the folder `out`, in its stored dtypes, with its tokenizer.

        The model keeps the dtypes that it has, and has the weights that were written, rounded.
        """
        from secateur.integrations.transformers import tokenizer_files

        if self.bare:
            write_bare(self.bare, self.model, out, plan=plan, reports=reports)
            return
        held = {n: p for n, p in self.model.named_parameters() if n in self.stored}
        dtypes = {name: parameter.dtype for name, parameter in held.items()}
        for name, parameter in held.items():
            parameter.data = parameter.data.to(self.stored[name])
        write_model(
            self.model, out, plan=plan, reports=reports, overwrite=overwrite,
            beside=tokenizer_files(self.path),
        )  # fmt: skip
        for name, parameter in held.items():
            parameter.data = parameter.data.to(dtypes[name])


@dataclass(frozen=True)
class Data:
    """Where tokens come from, as the options say."""

    text: Path | None
    tokens: str | None
    rows: int
    length: int | None
    batch: int
    option: str = "--"

    @property
    def given(self) -> bool:
        return self.text is not None or self.tokens is not None

    @property
    def name(self) -> str:
        """How a summary calls it."""
        return self.text.name if self.text else Path(self.tokens or "").name

    @property
    def named(self) -> str:
        """The option that names it, with its value."""
        return (
            f"{self.option}text {self.text}" if self.text else f"{self.option}tokens {self.tokens}"
        )

    def require(self) -> None:
        """Nothing comes of it but an error: for data that nothing will use.

        Raises:
            ValueError: if it cannot be read.
        """
        from secateur.integrations.documents import read_documents
        from secateur.integrations.tokens import stored_rows

        if self.text is not None:
            read_documents(self.text)
        if self.tokens is not None:
            stored_rows(self.tokens, 1, 1)

    def read(self, folder: Path) -> list[Batch]:
        """The batches, for the model in the folder; too few rows or documents are said on stderr.

        Raises:
            ValueError: if neither or both are given, or they cannot be read.
        """
        from secateur.integrations.tokens import end_of_text, stored_rows, text_rows

        if (self.text is None) == (self.tokens is None):
            found = "both" if self.given else "neither"
            raise ValueError(
                f"data needs either {self.option}text FILE or {self.option}tokens FILE:KEY, got "
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
            raise ValueError(in_options(str(error), self.option)) from error
        for remark in dealt.remarks(f"{self.option}rows", "--length"):
            caution(remark)
        return list(dealt.batches)


def open_source(name: str | Path, dtype: str = STORED, device: str = "cpu") -> Source:
    """The model at a path, loaded and moved to the device.

    Raises:
        ValueError: if it is neither a Hugging Face folder nor a state dict, or an option does not
            apply.
    """
    from secateur.integrations.transformers import PICKLED, converted, no_folder

    path = Path(name)
    if not path.exists():
        raise ValueError(no_folder(path))
    file = find_bare(path)
    if file is None and path.is_file():
        raise ValueError(
            f"{path} is no model: name a Hugging Face folder, a .safetensors file or its index.json"
            + (f"; {converted(path)}" if path.suffix in PICKLED else "")
        )
    if file is None:
        return open_folder(path, dtype, device)
    if dtype in DTYPES:
        raise ValueError("--dtype needs a model folder: a state dict is never run")
    with working(f"reading {file.name}"):
        model, bare = read_bare(file)
    return Source(path, model, bare, {})


def open_folder(folder: Path, dtype: str = STORED, device: str = "cpu") -> Source:
    """The model in a Hugging Face folder, dense or packed, on the device and in the dtype.

    `dtype` is "stored", the name of one, or "auto": on a CPU float32, because most CPUs compute in
    16 bits many times slower, and on a GPU as stored.
    """
    from secateur.integrations.transformers import (
        PACKED_FILES,
        load_folder,
        without_progress_bars,
    )

    where, wanted = find_device(device), find_dtype(dtype)
    with working(f"loading {folder.name}"):
        if folder.is_dir() and any(folder.glob(PACKED_FILES)):
            model = load(folder)
        else:
            without_progress_bars()
            verify_if_saved(folder)
            model = load_folder(folder)
        if dtype == AUTO and where.type == "cpu" and _in_16_bits(model):
            wanted = torch.float32
        stored = {}
        if wanted is not None:
            stored = {name: p.dtype for name, p in model.named_parameters() if p.dtype != wanted}
            model = model.to(wanted)
        return Source(folder, model.to(where), None, stored)


def parameters_in(files: Iterable[Path]) -> int:
    """How many numbers the safetensors files hold, from their headers alone."""
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            total += sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    return total


def model_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder; other safetensors files may lie beside them."""
    return sorted(folder.glob("model*.safetensors"))


def choose_plan(
    model: nn.Module,
    patterns: Sequence[str] | None,
    file: Path | None,
    layers: Sequence[str] | None,
    ignore: Sequence[str] | None,
) -> Plan:
    """The plan in the file, or the one that patterns and selectors make.

    Raises:
        ValueError: if both or neither are given, and as `plan` and `read_plan`.
    """
    if (file is None) == (not patterns):
        found = "both" if file else "neither"
        raise ValueError(f"either --pattern or --plan is needed, got {found}")
    if file is not None:
        if layers or ignore:
            raise ValueError("--layers and --ignore go with --pattern: a plan names its layers")
        return read_plan(file)
    assert patterns
    if len(patterns) == 1 and "=" not in patterns[0]:
        return plan(model, patterns[0], layers=layers or None, ignore=ignore or ())
    chosen: dict[Any, Any] = {}
    for text in patterns:
        selector, equals, pattern = text.rpartition("=")
        if not equals:
            raise ValueError(f"several patterns need SELECTOR=PATTERN each, got {text!r}")
        chosen[selector] = pattern
    return plan(model, chosen, layers=layers or None, ignore=ignore or ())


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        ValueError: if it does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    return device


def find_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for `auto` and `stored`.

    Raises:
        ValueError: if it is not one that models are run in.
    """
    if name not in (*DTYPES, AUTO, STORED):
        known = ", ".join((AUTO, STORED, *DTYPES))
        raise ValueError(f"--dtype needs to be one of {known}, got {name!r}")
    return DTYPES.get(name)


def _positions(folder: Path) -> int:
    """How many positions the model in the folder has; `LENGTH` where it does not say."""
    from secateur.integrations.transformers import read_config

    config = read_config(folder) if (folder / "config.json").is_file() else {}
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) else LENGTH


def _in_16_bits(model: nn.Module) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
