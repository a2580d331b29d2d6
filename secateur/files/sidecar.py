"""`secateur.json`: what a saved model's folder says about its files. Data only.

It is written last and read first. Reading checks every key and every enumerated value, so that a
file from elsewhere can name layers, formats and files of its own folder and nothing else.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.core.disk.data_files import first_fault, read_json
from secateur.core.disk.tensor_files import SUFFIX, is_plain_name
from secateur.core.version import VERSION
from secateur.integrations.transformers import FROM_GGUF, GGUF, no_folder
from secateur.model.plan import Plan, plan_from_dict

SIDECAR = "secateur.json"
FORMAT_VERSION = 2  # 1 had hashes of the weight files alone
AGAIN = "copy the folder again from where it was saved, or save the model again"

Form = Literal["dense", "packed"]


@dataclass(frozen=True)
class Fingerprint:
    """The size and the hash by which a saved file is known again."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Sidecar:
    """How a folder's weights are stored, where their zeros came from, and its files' fingerprints.

    `files` has every file that was written, by name, the config and a tokenizer included. `tied`
    maps a tensor's name to another name of the same tensor, `packed` a packed layer to the
    description that it is rebuilt from. `model_class` is for people: no code is found by it.
    """

    form: Form
    model_class: str
    files: Mapping[str, Fingerprint]
    sparsity: Mapping[str, float]
    plan: Plan | None
    reports: tuple[Mapping[str, Any], ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, Mapping[str, int | str | bool]] = field(default_factory=dict)
    library_version: str = VERSION
    torch_version: str = str(torch.__version__)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the file."""
        files = {n: {"bytes": f.bytes, "sha256": f.sha256} for n, f in self.files.items()}
        return {
            "version": FORMAT_VERSION,
            "library_version": self.library_version,
            "torch_version": self.torch_version,
            "form": self.form,
            "model_class": self.model_class,
            "files": files,
            "tied": dict(self.tied),
            "packed": {name: dict(entry) for name, entry in self.packed.items()},
            "sparsity": dict(self.sparsity),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "reports": [dict(report) for report in self.reports],
        }

    def write(self, folder: Path) -> None:
        """Write the file into the folder."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        (folder / SIDECAR).write_text(text + "\n", encoding="utf-8")


def read_sidecar(folder: str | Path) -> Sidecar:
    """What `secateur.json` says in a folder that `save` wrote; no weights are read.

    Raises:
        ValueError: if the file is missing, damaged, of a newer version, or says what it may not.
    """
    folder = Path(folder)
    path = folder / SIDECAR
    said = _validated(_read_json(folder, path), path)
    for name in said["files"]:
        if not is_plain_name(name) or name == SIDECAR:
            raise ValueError(f"{path} names the file {name!r}, which is none of its folder")
    if bool(said["packed"]) != (said["form"] == "packed"):
        raise ValueError(
            f"{path} is damaged: its form is {said['form']} with {len(said['packed'])} packed "
            f"layers: {AGAIN}"
        )
    plan = said["plan"]
    made = {
        "files": {name: Fingerprint(**entry) for name, entry in said["files"].items()},
        "plan": None if plan is None else plan_from_dict(plan, f"the plan in {path}"),
        "reports": tuple(said["reports"]),
    }
    return Sidecar(**said | made)


def _validated(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The file's content without its version, every key and type as it has to be."""
    # pydantic is imported here because reading files is rare and importing it costs 0.1 s.
    from pydantic import BaseModel, ConfigDict, Field, ValidationError

    class Entry(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        bytes: int = Field(ge=0)
        sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    class File(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        version: int
        library_version: str
        torch_version: str
        form: Form
        model_class: str
        files: dict[str, Entry] = Field(min_length=1)
        tied: dict[str, str]
        packed: dict[str, dict[str, int | str | bool]]
        sparsity: dict[str, float]
        plan: dict[str, Any] | None
        reports: list[dict[str, Any]]

    try:
        return File.model_validate(data).model_dump(exclude={"version"})
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {first_fault(error)}: {AGAIN}") from None


def share_of_zeros(weight: Tensor) -> float:
    """The share of a weight's elements that are zero; 0 for a weight without elements."""
    return int((weight == 0).sum()) / max(weight.numel(), 1)


def fingerprint(path: Path) -> Fingerprint:
    """A file's fingerprint as it is now."""
    with path.open("rb") as file:
        return Fingerprint(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def fingerprints(folder: Path) -> dict[str, Fingerprint]:
    """The fingerprint of every file in a folder that was written for a model, by name."""
    return {path.name: fingerprint(path) for path in sorted(folder.iterdir()) if path.is_file()}


def verify(folder: Path, sidecar: Sidecar) -> None:
    """Check that the folder's files are the saved ones, and no other would be read as one of them.

    Cost: reads every file once.
    Raises:
        ValueError: with the first file that is missing, cut off, changed or foreign.
    """
    for name, saved in sidecar.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks its file {name}: {AGAIN}")
        if (size := path.stat().st_size) != saved.bytes:
            raise ValueError(
                f"{path} has {size:,} bytes, {saved.bytes:,} were saved: it was cut off or "
                f"changed: {AGAIN}"
            )
        if fingerprint(path) != saved:
            raise ValueError(f"{path} was changed after it was saved, its sha256 differs: {AGAIN}")
    foreign = {path.name for path in folder.iterdir()} - sidecar.files.keys()
    if taken := sorted(filter(is_read_by_loaders, foreign)):
        raise ValueError(
            f"{folder / taken[0]} was not saved with this model, and loaders would read it: move "
            "it out of the folder, or save the model again"
        )


def verify_if_saved(folder: Path) -> None:
    """Verify a folder that has a sidecar."""
    if (folder / SIDECAR).is_file():
        verify(folder, read_sidecar(folder))


def is_read_by_loaders(name: str) -> bool:
    """Whether loaders take a file of this name for part of a model, whoever wrote it.

    Other files may lie beside a model: adapters, token rows, notes.
    """
    weights = name.startswith("model") and name.endswith((SUFFIX, ".json")) and SUFFIX in name
    return weights or name == "generation_config.json"


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(no_folder(folder))
    if not path.is_file():
        other = "a Hugging Face folder is read by its class's from_pretrained"
        remedy = FROM_GGUF if any(folder.glob(f"*{GGUF}")) else other
        raise ValueError(f"{folder} has no {SIDECAR}: sc.load reads what sc.save wrote; {remedy}")
    try:
        data = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from None
    version = data.get("version")
    if type(version) is not int:
        raise ValueError(f"{path} is damaged: it has no version: {AGAIN}")
    if version != FORMAT_VERSION:
        newer = version > FORMAT_VERSION
        raise ValueError(
            f"{path} has format version {version}, by secateur {data.get('library_version')}; this "
            f"secateur reads version {FORMAT_VERSION}: "
            + ("pip install -U secateur" if newer else "save the model again")
        )
    return data
