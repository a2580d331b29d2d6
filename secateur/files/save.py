"""`save` and `load`: a folder for any loader, or one in packed form for this library alone.

Dense form: stock safetensors with zeros in them and no trace in `config.json`, so that whatever
loads the dense model loads the pruned one. Packed form, for a model with `SparseLinear`s: plain
tensors in `model.secateur.safetensors`, a name under which other loaders find no weights at all;
under the stock name they would warn and go on with random ones. `config.json` names it for the
plug-in (`secateur.integrations.transformers_quantizer`). `secateur.json` lies beside both forms.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from secateur.core.conv1d import as_linear, is_conv1d
from secateur.core.disk.atomic import appearing_whole, settle
from secateur.core.disk.owned import temporary_folder
from secateur.core.disk.tensor_files import INDEX_SUFFIX, SUFFIX, load_files, save_file
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.weights import require_module, why_computed
from secateur.core.wrappers import adapted, base_name, unwrapped
from secateur.files.sidecar import (
    SIDECAR,
    Form,
    Sidecar,
    fingerprints,
    is_read_by_loaders,
    read_sidecar,
    share_of_zeros,
    verify,
)
from secateur.formats import Format, SparseLinear, describe, empty_from
from secateur.formats.experts import open_experts_
from secateur.formats.pack import swap
from secateur.integrations.packed_config import packed_config
from secateur.integrations.transformers import (
    is_transformers,
    load_folder,
    save_config,
    save_folder,
    unloaded,
    without_weights,
)
from secateur.model import layers as _layers
from secateur.model.plan import Plan, match

# A file of this size still copies and uploads in one go everywhere; Hugging Face's habit.
SHARD_BYTES = 5 * 10**9

# Parametrizations that belong to an architecture, as a weight norm does; a mask does not.
TORCH_NORMS = parametrizations.__name__

PROBE = ".secateur-probe-"  # a folder that is made to see whether one can be

STEMS: Mapping[Form, str] = {"dense": "model", "packed": "model.secateur"}


@runtime_checkable
class Report(Protocol):
    """What a verb returned, as plain data if asked."""

    def to_dict(self) -> dict[str, Any]: ...


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    reports: Iterable[Report] = (),
    overwrite: bool = False,
) -> None:
    """Write the model's weights, and beside them where their zeros came from.

    A transformers model is written by its own `save_pretrained`. A model that holds `SparseLinear`s
    is written packed. `torch.compile`, data-parallel wrappers and PEFT's adapters are taken off
    first. The folder appears whole or not at all; with `overwrite` it may replace one that `save`
    wrote, and files there that `save` did not write are kept.

    Cost: a copy of one shard, 5 GB at most; reads the files once more for their hashes.
    Raises:
        ValueError: before anything is written, if the folder cannot be, or the model has weights
            that are no plain tensors or are computed from others, or the plan is for another model;
            before anything is replaced, if a file that is not the model's would be.
        OSError: if a file cannot be written; then nothing has changed.
    """
    write_model(model, folder, plan=plan, reports=reports, overwrite=overwrite)


def write_model(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Plan | None,
    reports: Iterable[Report],
    overwrite: bool,
    beside: Mapping[str, Path] | None = None,
) -> None:
    """Write as `save` does, with copies of the files `beside` (name -> file), as a tokenizer's.

    Raises:
        ValueError, OSError: as `save`.
    """
    folder = Path(folder).resolve()
    require_writable(folder, overwrite=overwrite)
    require_module(model, changed=False)
    model = unwrapped(model)
    state = adapted(model).state_dict()  # once: packed layers restore what is stored for it
    _require_plain(model, state)
    if plan is not None:
        match(model, plan)
        plan = _in_saved_names(plan, model)
    model = adapted(model)
    saved = _saved(model, state)
    if len(saved) < len(state):
        warnings.warn(
            "save writes the model without the adapters that PEFT has put around its layers: write "
            "those with their own save_pretrained",
            stacklevel=3,
        )
    plain_reports = tuple(_plain(report) for report in reports)
    named = ((base_name(model, name), module) for name, module in model.named_modules())
    packed = {n: m for n, m in named if isinstance(m, SparseLinear) and n is not None}
    form: Form = "packed" if packed else "dense"
    descriptions = {name: describe(linear) for name, linear in packed.items()}
    with replacing(folder, beside) as partial:
        if is_transformers(model) and form == "dense":
            save_folder(model, partial, saved)
        else:
            weights = _write_shards(saved, partial, STEMS[form])
            if is_transformers(model):
                save_config(model, partial, packed_config(descriptions, weights))
        Sidecar(
            form=form,
            model_class=type(model).__name__,
            files=fingerprints(partial),
            sparsity=_sparsity(model),
            plan=plan,
            reports=plain_reports,
            tied=_tied(saved),
            packed=descriptions,
        ).write(partial)


def load(
    folder: str | Path, model: nn.Module | None = None, *, formats: Sequence[Format] = ()
) -> nn.Module:
    """The model that `save` wrote, all of its files verified by their hashes.

    A transformers model is made from the folder alone, in eval mode. Any other needs `model`, an
    instance of the same class and sizes: its weights are replaced, its packed layers exchanged, and
    it is returned. `formats` are those of your own that its layers were packed in.

    Cost: reads the files twice. With `model`, up to twice its weights in memory, and a copy of
        them on disk meanwhile.
    Raises:
        ValueError: if a file is missing, cut off, changed, foreign or of a newer version, or the
            weights are not those of `model`. Whatever is raised, `model` is left as it was.
    """
    with all_or_nothing() as undo:
        return _loaded(Path(folder), model, formats, undo)


def _loaded(
    folder: Path, model: nn.Module | None, formats: Sequence[Format], undo: Undo
) -> nn.Module:
    settle(folder)
    sidecar = read_sidecar(folder)
    verify(folder, sidecar)
    if model is None and "config.json" not in sidecar.files:
        raise ValueError(
            f"{folder} holds the weights of a {sidecar.model_class} and no config.json to make it "
            "from: make one and pass it as model="
        )
    if sidecar.form == "dense" and (model is None or _is_stock(adapted(unwrapped(model)))):
        loaded = load_folder(folder)
        if model is None:
            return loaded
        tensors = loaded.state_dict()
    else:
        tensors = _read_shards(folder, sidecar)
    model = unloaded(folder) if model is None else model
    _replace_weights(adapted(unwrapped(model)), sidecar, tensors, folder, formats, undo)
    return model


def require_writable(folder: str | Path, *, overwrite: bool = False) -> None:
    """Check that `save` could write this folder, before hours of work.

    Raises:
        ValueError: if it is a file or in a place that cannot be written to, or if it holds a saved
            model (without `overwrite`), other files and no saved model, or files that a loader
            would take for parts of a model.
    """
    folder = Path(folder).resolve()
    settle(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save needs a folder, {folder} is a file: choose another name")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / SIDECAR).is_file():
            raise ValueError(
                f"save needs an empty or a new folder, {folder} holds other files: choose another"
            )
        if not overwrite:
            raise ValueError(
                f"{folder} holds a saved model: choose another folder, or pass overwrite=True"
            )
        _require_none_taken(folder, filter(is_read_by_loaders, _names(folder)))
    parent = next(p for p in folder.parents if p.exists())
    try:  # permissions alone do not tell: root has them even where nothing can be written
        temporary_folder(PROBE, parent).remove()
    except OSError as error:
        raise ValueError(
            f"save cannot write into {parent}: {error.strerror}: choose a folder that you may "
            "write to"
        ) from None


@contextmanager
def replacing(folder: Path, beside: Mapping[str, Path] | None = None) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, or is gone if the block raises.

    `beside` are files to be copied into it. The files that an old folder's sidecar lists go; all
    others are kept.

    Raises:
        ValueError: at the end, if a file of the new folder has the name of one that is kept.
    """
    written = {SIDECAR, *read_sidecar(folder).files} if (folder / SIDECAR).is_file() else set()
    with appearing_whole(folder, replaced=written.__contains__) as partial:
        for name, file in (beside or {}).items():
            if file.resolve() != (folder / name).resolve() or name in written:
                shutil.copyfile(file, partial / name)
        yield partial
        _require_none_taken(folder, _names(partial))


# --- writing -------------------------------------------------------------------------------------


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _require_none_taken(folder: Path, names: Iterable[str]) -> None:
    """Raise if a file that is not the saved model's has a name that is about to be written."""
    if not (folder / SIDECAR).is_file():
        return
    foreign = _names(folder) - read_sidecar(folder).files.keys() - {SIDECAR}
    if taken := sorted(foreign.intersection(names)):
        raise ValueError(
            f"{folder / taken[0]} is none of the saved model's files and would be replaced: move "
            "it elsewhere first"
        )


def _require_plain(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    if isinstance(model, SparseLinear):
        raise ValueError("save needs a model, got a bare SparseLinear: wrap it in nn.Sequential")
    for name, module in model.named_modules():
        for own in _computed(model, name, module):
            raise ValueError(
                f"save needs weights that loaders know, {f'{name}.{own}'.lstrip('.')} "
                f"{why_computed(module, own)}"
            )
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and type(tensor) in (Tensor, nn.Parameter)
        if not plain or tensor.layout != torch.strided:
            kind = f"{type(tensor).__name__} of layout {getattr(tensor, 'layout', None)}"
            raise ValueError(
                f"save needs plain tensors, {name} is a {kind}: make it an ordinary tensor first"
            )
        if tensor.is_meta:
            raise ValueError(f"{name} has no data (meta device): load the weights first")


def _computed(model: nn.Module, name: str, module: nn.Module) -> list[str]:
    """The tensors of this module that are computed from others, except by its own class."""
    buffers = [n for n, _ in module.named_buffers(recurse=False)]  # a ScriptModule has no dict
    masked = [n.removesuffix("_mask") for n in buffers if n.endswith("_mask")]
    parameters = {n for n, _ in module.named_parameters(recurse=False)}
    if names := [n for n in masked if f"{n}_orig" in parameters]:
        return names
    if not parametrize.is_parametrized(module):
        return []
    chains = dict(module.parametrizations.items())  # type: ignore[operator, union-attr]
    if is_transformers(model):
        # A speech model has a weight norm from its very class, which makes it again on loading.
        fresh = dict(without_weights(model).named_modules()).get(name)
        return [] if fresh is not None and parametrize.is_parametrized(fresh) else list(chains)
    return [
        n for n, chain in chains.items() if {type(p).__module__ for p in chain} != {TORCH_NORMS}
    ]


def _saved(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors by their names without wrappers and adapters."""
    named = ((base_name(model, name), t) for name, t in state.items())
    return {name: tensor for name, tensor in named if name is not None}


def _in_saved_names(plan: Plan, model: nn.Module) -> Plan:
    """The plan with its layers' names as they are saved."""
    base = adapted(model)
    inside = {module: name for name, module in base.named_modules()}
    modules = dict(model.named_modules())

    def saved(name: str) -> str | None:
        module = modules.get(name)
        return base_name(base, inside[module]) if module in inside else None

    return Plan(
        {saved(name) or name: pattern for name, pattern in plan.layers.items()},
        {saved(name) or name: shape for name, shape in plan.shapes.items()},
        {new: why for name, why in plan.skipped.items() if (new := saved(name)) is not None},
        plan.left,
    )


def _write_shards(saved: Mapping[str, Tensor], folder: Path, stem: str) -> str:
    """The name of the file that the tensors are written to, or of the index of several.

    A file has at most `SHARD_BYTES`; tied tensors are in it once.
    """
    tied = _tied(saved)
    state = {name: t for name, t in saved.items() if name not in tied}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        part = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{part}.safetensors"
        # Copies, because safetensors refuses tensors that share memory, as views do.
        copies = {n: t.to("cpu", copy=True).contiguous() for n, t in shard.items()}
        save_file(copies, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    if len(shards) == 1:
        return file
    return write_index(folder, stem, files, sum(tensor.nbytes for tensor in state.values()))


def write_index(folder: Path, stem: str, files: Mapping[str, str], total_bytes: int) -> str:
    """The name of the file that now says which tensor is in which of several weight files."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    name = f"{stem}{INDEX_SUFFIX}"
    (folder / name).write_text(json.dumps(index, indent=2))
    return name


def _tied(saved: Mapping[str, Tensor]) -> dict[str, str]:
    """Every further name of a tensor -> its first name in the state dict."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, t in saved.items():
        if t.numel():
            place = (t.data_ptr(), t.device, t.dtype, tuple(t.shape), t.stride())
            if first.setdefault(place, name) != name:
                tied[name] = first[place]
    return tied


def _sparsity(model: nn.Module) -> dict[str, float]:
    """The share of zeros in each layer's weight, by the layer's name as it is saved."""
    named = ((base_name(model, name), m) for name, m in _layers.layers_of(model).items())
    with torch.no_grad():
        return {
            name: share_of_zeros(_layers.matrix(module))
            for name, module in named
            if name is not None
        }


def _plain(report: Report) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"save needs reports of plain finite data, {type(report).__name__} is not: {error}"
        ) from None
    return plain


# --- reading -------------------------------------------------------------------------------------


def _is_stock(model: nn.Module) -> bool:
    """Whether transformers may store its weights under names other than those in memory."""
    return is_transformers(model) and type(model).__module__.startswith("transformers.")


def _read_shards(folder: Path, sidecar: Sidecar) -> dict[str, Tensor]:
    """The tensors in the files that the sidecar lists, once verified."""
    return load_files(folder / name for name in sidecar.files if name.endswith(SUFFIX))


def _replace_weights(
    model: nn.Module,
    sidecar: Sidecar,
    tensors: dict[str, Tensor],
    folder: Path,
    formats: Sequence[Format],
    undo: Undo,
) -> None:
    """Give the model these tensors and packed layers once all are known to fit."""
    for name, other in sidecar.tied.items():
        for one, two in ((name, other), (other, name)):
            if one not in tensors and two in tensors:
                tensors[one] = tensors[two]
    open_experts_(model, undo, sidecar.packed)
    packed = {
        name: _packed_layer(model, name, dict(entry), tensors, folder, formats)
        for name, entry in sidecar.packed.items()
    }
    prefixes = tuple(f"{name}." for name in packed)
    own = {n: t for n, t in _saved(model, model.state_dict()).items() if not n.startswith(prefixes)}
    dense = {n: t for n, t in tensors.items() if not n.startswith(prefixes)}
    _require_same(own, dense, f"{folder} (a {sidecar.model_class})", type(model).__name__)
    undo.remember(own)
    for name, tensor in own.items():
        tensor.copy_(dense[name])
    swap(model, packed, undo)


def _packed_layer(
    model: nn.Module,
    name: str,
    description: dict[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
    formats: Sequence[Format],
) -> nn.Module:
    """The packed layer of that name, filled, on the device of the layer that it replaces."""
    layer = dict(model.named_modules()).get(name)
    shape = (description.get("out_features"), description.get("in_features"))
    if layer is None or _shape_of_linear(layer) != shape:
        raise ValueError(
            f"{folder} has a packed linear layer {name!r} of {shape[0]} x {shape[1]}, this "
            f"{type(model).__name__} has {layer}: {_MATCH}"
        )
    own = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
    try:
        packed = empty_from(description, name, formats)
        packed.load_state_dict(own)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{folder}, packed layer {name!r}: {said}") from error
    device = next(iter([*layer.parameters(), *layer.buffers()])).device
    return packed.to(device).train(layer.training)


def _shape_of_linear(layer: nn.Module) -> tuple[int, int] | None:
    """The shape `[out, in]` of a layer that may be packed; None for others."""
    if is_conv1d(layer):
        layer = as_linear(layer)
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None


def _require_same(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str, model: str
) -> None:
    """Raise unless names, shapes and dtypes agree."""
    if missing := [name for name in own if name not in given]:
        raise ValueError(
            f"{where} lacks {len(missing)} tensors of this {model}, first {missing[0]!r}: {_MATCH}"
        )
    if foreign := [name for name in given if name not in own]:
        raise ValueError(
            f"{where} has {len(foreign)} tensors that this {model} lacks, first {foreign[0]!r}: "
            f"{_MATCH}"
        )
    for name, tensor in own.items():
        saved = (tuple(given[name].shape), given[name].dtype)
        if saved != (tuple(tensor.shape), tensor.dtype):
            raise ValueError(
                f"{where} has {name} as {saved[0]} of {saved[1]}, this {model} as "
                f"{tuple(tensor.shape)} of {tensor.dtype}: {_MATCH}"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name} of this {model} has no memory (meta device): call "
                "model.to_empty(device='cpu') first"
            )


_MATCH = "pass a model of the class, sizes and dtype that was saved"
