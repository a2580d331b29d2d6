"""What `secateur.json` recorded when a folder was saved, as objects again."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from secateur.model.plan import Plan
from secateur.prune.verbs import LayerResult, PruneReport


@dataclass(frozen=True)
class Recorded:
    """A report as plain data, to be saved again as it was."""

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)


def recorded_reports(folder: Path) -> tuple[Plan | None, list[Recorded]]:
    """The plan and the reports that were saved with the folder; nothing where it has no sidecar."""
    from secateur.files.sidecar import SIDECAR, read_sidecar

    if not (folder / SIDECAR).is_file():
        return None, []
    saved = read_sidecar(folder)
    return saved.plan, [Recorded(report) for report in saved.reports]


def prune_reports(reports: list[Recorded]) -> list[PruneReport]:
    """Those reports that `prune_` or `reconstruct_` made."""
    names = {field.name for field in fields(LayerResult)}
    said = {field.name for field in fields(PruneReport)}
    found = []
    for report in reports:
        layers = report.data.get("layers")
        rows = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
        if rows and all(set(row) == names for row in rows) and said <= set(report.data):
            results = tuple(LayerResult(**row) for row in rows)
            data = {name: report.data[name] for name in said}
            found.append(PruneReport(**data | {"layers": results}))
    return found
