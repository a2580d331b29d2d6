"""Reconstruction of a model folder that is larger than memory, block by block."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.disk.atomic import appearing_whole, settle
from secateur.core.disk.checkpoint import Checkpoint, digest, is_of_checkpoint
from secateur.core.disk.tensor_files import read_tensors, save_file, shapes_in
from secateur.files.save import STEMS, write_index
from secateur.files.sidecar import (
    SIDECAR,
    Sidecar,
    fingerprint,
    fingerprints,
    share_of_zeros,
    verify_if_saved,
)
from secateur.integrations.stored_names import StoredNames
from secateur.integrations.transformers import hollow, tokenizer_files, weight_files
from secateur.model import layers as _layers
from secateur.model.blocks import Batch, find_chains
from secateur.model.calibrate import as_list
from secateur.model.distributed import team
from secateur.model.piece import parameter_name
from secateur.model.plan import Plan, as_plan, match
from secateur.model.statistics import STATISTICS
from secateur.model.window import Window
from secateur.patterns import Pattern
from secateur.prune.passes import (
    Pass,
    reconstruction,
    report_of,
    result_of,
    solve_stages_,
    stages_of,
)
from secateur.prune.preconditions import require_finite, warn_of_lost_zeros
from secateur.prune.report import PruneReport
from secateur.reconstruct import Blockwise, Solution
from secateur.reconstruct.methods import bind_criterion, is_algorithm

CONFIGS = ("config.json", "generation_config.json")


def reconstruct_folder(
    source: str | Path,
    target: str | Path,
    plan: Plan | Pattern | str,
    algorithm: Callable[..., Solution] | Callable[..., Tensor] | Blockwise,
    batches: Iterable[Batch],
    *,
    keep_zeros: bool = False,
    device: str | torch.device = "cpu",
) -> PruneReport:
    """Write into `target` what `reconstruct_` makes of the Hugging Face folder `source`.

    A criterion in place of an algorithm gives what `prune_` makes of it. Experts whose matrices the
    files hold one by one, as Mixtral's, are read and written as they are there.

    One part of the model is in memory at a time, on the device: a block, or a module outside the
    blocks, such as the embedding. Activations are on the CPU. A pattern stands for the plan that
    gives it to every layer; all planned layers have to be in one list of blocks. `keep_zeros` is
    as in `reconstruct_`.

    Until it is done, `target` holds finished layers and no model. After a kill the same call goes
    on where it stopped, and ends with the same model. transformers and `sc.load` read the result; a
    tokenizer is copied.

    Cost: beside the work of `reconstruct_`, seven reads of the model. Memory: a part, what the
        algorithm takes for a layer, and the inputs of one block for all batches. Disk: the planned
        layers twice.
    Error: exactly what `reconstruct_` gives on the same device.
    Raises:
        ValueError: before anything is written, if a folder, the plan or the algorithm cannot be
            used, or a tensor is missing or has another shape or dtype; before a layer is solved, if
            the model cannot run part by part.
    """
    source, target = Path(source), Path(target).resolve()
    if team().size > 1:
        raise ValueError("reconstruct_folder runs in one process: start it without torchrun")
    verify_if_saved(source)
    model = hollow(source)
    made = _pass(model, as_plan(model, plan), algorithm, keep_zeros)
    layers = match(model, made.plan)
    chain = _chain(model, layers)
    stored = _Stored(source, model)
    window = Window(model, chain, stored.read, torch.device(device))
    _require_part_by_part(made)
    listed = as_list(batches)
    at_risk = _at_risk(made, layers, stored)
    if made.sequential and not keep_zeros:
        warn_of_lost_zeros(at_risk)
    with _progress(target, source, made, stored, listed) as saved:
        report = _solved(made, listed, saved, window)
        result = _Result(stored, saved, made.plan, _by_parameter(layers))
        with appearing_whole(target, replaced=is_of_checkpoint) as partial:
            _write(partial, source, model, window.parts, result, report)
            _require_none_replaced(partial, target)
    return report


def _pass(
    model: nn.Module,
    plan: Plan,
    method: Callable[..., Any] | Blockwise,
    keep_zeros: bool,
) -> Pass:
    """The pass that `prune_` makes by a criterion, or `reconstruct_` by an algorithm."""
    if isinstance(method, Blockwise) or is_algorithm(method):
        return reconstruction(model, plan, method, keep_zeros=keep_zeros)
    return Pass(model, plan, bind_criterion(method), keep_zeros=keep_zeros)


def _by_parameter(layers: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """The layers by the name of the parameter that holds them, alone or with others."""
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in layers.items():
        found.setdefault(parameter_name(name, module), {})[name] = module
    return found


def _at_risk(made: Pass, layers: Mapping[str, nn.Module], stored: "_Stored") -> dict[str, float]:
    """What share of each layer's zeros may be lost.

    Raises:
        ValueError: if a weight is not finite.
    """
    at_risk: dict[str, float] = {}
    for parameter, inside in _by_parameter(layers).items():
        whole = stored.read([parameter])[parameter]
        for name, module in inside.items():
            weight = _layers.weight_in(module, whole)
            require_finite(name, weight)
            at_risk[name] = made.at_risk(name, _layers.matrix(module, weight))
    return at_risk


def _require_part_by_part(made: Pass) -> None:
    """Raise if the method needs the whole model at once."""
    if asked := [name for name in made.needs if name not in STATISTICS]:
        raise ValueError(
            f"{made.name} asks for the {asked[0]} of the whole model, which is in memory part by "
            "part: take another method, or load the model whole and call "
            f"{'reconstruct_' if made.sequential else 'prune_'}"
        )
    if made.distils:
        raise ValueError(
            f"{made.name} trains the whole model at the end, which is in memory part by part: "
            "take sc.best, or load the model whole and call reconstruct_"
        )


def _require_none_replaced(new: Path, target: Path) -> None:
    """Raise if a file of the new folder has the name of somebody else's in the target."""
    for path in new.iterdir():
        if (target / path.name).exists() and not is_of_checkpoint(path.name):
            raise ValueError(
                f"{target / path.name} would be replaced by the model's: move it elsewhere "
                "and repeat the call, which has no layer left to solve"
            )


@torch.inference_mode(False)
def _solved(made: Pass, batches: Sequence[Batch], saved: Checkpoint, window: Window) -> PruneReport:
    """The report of the pass over blocks that are loaded one by one; `saved` gets the weights.

    Activations are kept on the CPU. The model itself is left without weights.
    """
    begin = time.perf_counter()
    parameters = sum(p.numel() for p in made.model.parameters())  # tied ones are one until it runs
    layers = match(made.model, made.plan)
    finished = saved.finished()
    if all(name in finished for name in layers):
        results = tuple(result_of(finished[name]) for name in layers)
    else:
        with window.opened():
            none: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
            stages = stages_of(made, layers, batches, saved, offload=True, window=window)
            results = solve_stages_(made, layers, stages, saved, none, lambda _: None)
    return report_of(made, layers, results, begin, parameters)


def _chain(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The list of blocks that holds all of the layers."""
    chains = find_chains(model, layers)
    home = {name: p for name in layers for p in chains if name.startswith(f"{p}.")}
    if outside := [name for name in layers if name not in home]:
        raise ValueError(
            f"reconstruct_folder takes layers inside the blocks, {outside[0]} is outside: ignore it"
        )
    if len(chains) > 1:
        raise ValueError(
            f"reconstruct_folder needs one list of blocks, the planned layers of this "
            f"{type(model).__name__} lie in {len(chains)}: {', '.join(chains)}: load the model "
            "whole and call reconstruct_"
        )
    return chains[next(iter(chains))]


def _progress(
    target: Path, source: Path, made: Pass, stored: "_Stored", batches: Sequence[Batch]
) -> Checkpoint:
    """The checkpoint of this run in the target folder: its finished layers, none in a new one."""
    settle(target)
    if (target / SIDECAR).exists():
        raise ValueError(f"{target} holds a saved model: choose another folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: choose another name for the folder")
    return Checkpoint(
        target,
        {
            "source": str(source.resolve()),
            "files": {file.name: fingerprint(file).sha256 for file in stored.files},
            "method": made.name,
            "plan": made.plan.to_dict()["layers"],
            "keep_zeros": made.keep_zeros,
            "batches": digest(batches),
        },
    )


class _Stored:
    """The tensors of a model in its folder's safetensors files, by their names in the model.

    `tied` maps a name that is not in the files to the name there of the same tensor.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._folder = folder
        self.files = weight_files(folder)
        self._where: dict[str, Path] = {}
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file in self.files:
            of_file = shapes_in(file)
            self._where |= dict.fromkeys(of_file, file)
            found |= of_file
        own = model.state_dict(keep_vars=True)
        self._own = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        self.names = StoredNames(model, found)
        found |= {name: (tuple(own[name].shape), own[name].dtype) for name in self.names.sources}
        present = {id(tensor): name for name, tensor in own.items() if name in found}
        self.tied = {
            name: present[id(tensor)]
            for name, tensor in own.items()
            if name not in found and id(tensor) in present
        }
        self._require_all(type(model).__name__, own, found)

    def _require_all(
        self,
        model: str,
        own: Mapping[str, Tensor],
        found: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        if missing := [name for name in own if name not in found and name not in self.tied]:
            raise ValueError(
                f"{self._folder} lacks {len(missing)} tensors of {model}, first {missing[0]!r}: "
                "complete the folder; if they have other names there, load the model whole, save "
                "it and stream that"
            )
        for name, tensor in own.items():
            stored, wanted = found.get(name), (tuple(tensor.shape), tensor.dtype)
            if stored is not None and stored != wanted:
                raise ValueError(
                    f"{self._folder} has {name} as {stored[0]} of {stored[1]}, its config.json "
                    f"makes it {wanted[0]} of {wanted[1]}: load the model whole, save it and "
                    "stream that"
                )

    def has(self, name: str) -> bool:
        """Whether the files have this tensor, and not only one that it is tied to."""
        return name in self._where or name in self.names.sources

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU.

        Raises:
            ValueError: if one is stored in parts that make another shape or dtype.
        """
        found: dict[str, Tensor] = {}
        stored = {name: self.tied.get(name, name) for name in names}
        for name, own in list(stored.items()):
            if own in self.names.sources:
                found[name] = self._converted(own)
                del stored[name]
        for file in dict.fromkeys(self._where[name] for name in stored.values()):
            inside = {n: s for n, s in stored.items() if self._where[s] == file}
            tensors = read_tensors(file, set(inside.values()))
            found |= {name: tensors[s] for name, s in inside.items()}
        return found

    def _converted(self, name: str) -> Tensor:
        """The model's tensor of what is stored under other names."""

        def read(key: str) -> Tensor:
            return read_tensors(self._where[key], {key})[key]

        made, wanted = self.names.made_of(name, read), self._own[name]
        if (made.shape, made.dtype) != wanted:
            raise ValueError(
                f"{self._folder} makes {name} {tuple(made.shape)} of {made.dtype}, its config.json "
                f"{tuple(wanted[0])} of {wanted[1]}: complete the folder"
            )
        return made


@dataclass(frozen=True)
class _Result:
    """The finished model, tensor by tensor: what is stored, with the new weights in place."""

    stored: _Stored
    saved: Checkpoint
    plan: Plan
    layers: Mapping[str, Mapping[str, nn.Module]]  # the planned ones, by parameter

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        found = self.stored.read(names)
        for parameter in names:
            inside = self.layers.get(parameter, {})
            for layer, weight in self.saved.weights(list(inside)).items():
                _layers.weight_in(inside[layer], found[parameter]).copy_(weight)
        return found


def _write(
    folder: Path,
    source: Path,
    model: nn.Module,
    parts: Mapping[str, nn.Module],
    result: _Result,
    report: PruneReport,
) -> None:
    """Write the model into the folder, a file for each part, as `save` writes a dense one."""
    names = {part: [f"{part}.{key}" for key in m.state_dict()] for part, m in parts.items()}
    own = {part: [n for n in listed if result.stored.has(n)] for part, listed in names.items()}
    written = [part for part in parts if own[part]]
    files: dict[str, str] = {}
    sparsity: dict[str, float] = {}
    total = 0
    for part, module in parts.items():
        tensors = result.read(names[part])
        for inner, layer in _layers.layers_of(module).items():
            name = f"{part}.{inner}" if inner else part
            whole = tensors[parameter_name(name, layer)]
            sparsity[name] = share_of_zeros(_layers.weight_in(layer, whole))
        if part in written:
            number = written.index(part) + 1
            file = f"{STEMS['dense']}-{number:05}-of-{len(written):05}.safetensors"
            kept = {
                name: tensor.contiguous()
                for name, tensor in result.stored.names.as_stored(
                    {name: tensors[name] for name in own[part]}
                ).items()
            }
            save_file(kept, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(kept, file)
            total += sum(tensor.nbytes for tensor in kept.values())
    write_index(folder, STEMS["dense"], files, total)
    configs = {name: source / name for name in CONFIGS if (source / name).is_file()}
    for name, copied in {**configs, **tokenizer_files(source)}.items():
        shutil.copyfile(copied, folder / name)
    Sidecar(
        form="dense",
        model_class=type(model).__name__,
        files=fingerprints(folder),
        sparsity=sparsity,
        plan=result.plan,
        reports=(report.to_dict(),),
        tied=result.stored.tied,
    ).write(folder)
