"""`secateur.json`: what a saved model's folder says about its weights. Data only.

It is written last and read first. Reading checks every key and every enumerated value, so that a
file from elsewhere can name layers, formats and files of its own folder and nothing else.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.plan import Plan, plan_from_dict

SIDECAR = "secateur.json"
FORMAT_VERSION = 1

Form = Literal["dense", "packed"]


@dataclass(frozen=True)
class WeightFile:
    """What a weight file has to be to be the one that was saved."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Sidecar:
    """How a folder's weights are stored, where their zeros came from, and how to know them again.

    `tied` maps a tensor's name to another name of the same tensor; `packed` a packed layer to the
    description it is made again from. `model_class` is for people: no code is found by it.
    """

    form: Form
    model_class: str
    weights: Mapping[str, WeightFile]
    sparsity: Mapping[str, float]
    tied: Mapping[str, str]
    packed: Mapping[str, Mapping[str, int | str | bool]]
    plan: Plan | None
    reports: tuple[Mapping[str, Any], ...]
    library_version: str
    torch_version: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the file."""
        weights = {n: {"bytes": w.bytes, "sha256": w.sha256} for n, w in self.weights.items()}
        return {
            "version": FORMAT_VERSION,
            "library_version": self.library_version,
            "torch_version": self.torch_version,
            "form": self.form,
            "model_class": self.model_class,
            "weights": weights,
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
    data = _read_json(folder, path)
    # pydantic is imported here because reading files is rare and importing it costs 0.1 s.
    from pydantic import BaseModel, ConfigDict, Field, ValidationError

    class Weights(BaseModel):
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
        weights: dict[str, Weights] = Field(min_length=1)
        tied: dict[str, str]
        packed: dict[str, dict[str, int | str | bool]]
        sparsity: dict[str, float]
        plan: dict[str, Any] | None
        reports: list[dict[str, Any]]

    try:
        file = File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the top level"
        raise ValueError(f"{path} is damaged: at {place}: {first['msg']}: {_AGAIN}") from None
    for name in file.weights:
        if Path(name).name != name or Path(name).suffix not in (".safetensors", ".json"):
            raise ValueError(
                f"{path} names the file {name!r}, which is no weight file of its folder"
            )
    if bool(file.packed) != (file.form == "packed"):
        raise ValueError(
            f"{path} is damaged: its form is {file.form} with {len(file.packed)} packed layers: "
            f"{_AGAIN}"
        )
    return Sidecar(
        form=file.form,
        model_class=file.model_class,
        weights={n: WeightFile(w.bytes, w.sha256) for n, w in file.weights.items()},
        sparsity=file.sparsity,
        tied=file.tied,
        packed=file.packed,
        plan=None if file.plan is None else plan_from_dict(file.plan, f"the plan in {path}"),
        reports=tuple(file.reports),
        library_version=file.library_version,
        torch_version=file.torch_version,
    )


def fingerprint(path: Path) -> WeightFile:
    """The size and the hash of a file as it is."""
    with path.open("rb") as file:
        return WeightFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that a loader may read weights from: safetensors and their indexes."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index*.json")])


def verify(folder: Path, sidecar: Sidecar) -> None:
    """Nothing, if the folder's weight files are those that were saved, each and no other.

    Cost: reads every weight file once.
    Raises:
        ValueError: with the first file that is missing, cut off, changed or foreign.
    """
    for name, saved in sidecar.weights.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks its weight file {name}: {_AGAIN}")
        if (size := path.stat().st_size) != saved.bytes:
            raise ValueError(
                f"{path} has {size:,} bytes, {saved.bytes:,} were saved: it was cut off or "
                f"changed: {_AGAIN}"
            )
        if fingerprint(path) != saved:
            raise ValueError(f"{path} was changed after it was saved, its sha256 differs: {_AGAIN}")
    for path in weight_files(folder):
        if path.name not in sidecar.weights:
            raise ValueError(
                f"{path} was not saved with this model: move it out of the folder, or save it again"
            )


_AGAIN = "copy the folder again from where it was saved, or save the model again"


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: sc.load reads what sc.save wrote")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {SIDECAR}: sc.load reads what sc.save wrote; a Hugging Face folder "
            "is read by its class's from_pretrained"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}: {_AGAIN}") from None
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(version, int):
        raise ValueError(f"{path} is damaged: it has no version: {_AGAIN}")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, by secateur {data.get('library_version')}; this "
            f"secateur reads version {FORMAT_VERSION}: pip install -U secateur"
        )
    return data
