"""Hugging Face folders: models, and the files of their tokenizers.

Imports transformers inside functions only. Nothing is downloaded, and no code that a folder brings
along is ever run.
"""

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from secateur.replay import hooks

# Everything that tokenizers, processors and chat templates are known to be stored in.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip

# The variant of packed weight files; a loader that does not know it finds no weights at all.
PACKED_FILES = "model.secateur*.safetensors"

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def load_folder(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model in a Hugging Face folder, in eval mode, in the dtype it is stored in or another.

    Its class is the one that `config.json` names, which must be transformers' own. Weights are read
    from safetensors files only.

    Raises:
        ValueError: if the folder, its config or its weights are missing, damaged, packed, quantized
            or incomplete, or transformers is not installed.
    """
    folder = Path(folder)
    architecture = _dense_architecture(folder)
    try:
        model, found = architecture.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder} cannot be loaded as {architecture.__name__}: {error}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of {architecture.__name__}, first "
            f"{missing[0]!r}, which would be random: complete the folder, or name another class in "
            "config.json"
        )
    loaded: nn.Module = model
    return loaded


def unloaded(folder: str | Path) -> nn.Module:
    """The model that `config.json` describes, in its dtype, with weights that mean nothing yet."""
    folder = Path(folder)
    architecture = _architecture(read_config(folder), folder)
    config = architecture.config_class.from_pretrained(folder)
    before = torch.get_default_dtype()
    try:
        # As from_pretrained does: `.to(dtype)` would round buffers that have to stay in float32.
        torch.set_default_dtype(config.dtype or torch.float32)
        model: Any = architecture(config)
    finally:
        torch.set_default_dtype(before)
    if (folder / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    built: nn.Module = model.eval()
    return built


def hollow(folder: str | Path) -> nn.Module:
    """The model in a Hugging Face folder without its weights, in eval mode; no weight is read.

    Parameters are on the meta device, tied ones the same object; buffers hold their values.

    Raises:
        ValueError: if the folder or its config is missing, damaged, packed or quantized, its model
            is none of transformers' own, or the config names no dtype.
    """
    folder = Path(folder)
    _dense_architecture(folder)
    config = read_config(folder)
    if not (config.get("dtype") or config.get("torch_dtype")):
        raise ValueError(
            f'{folder / "config.json"} needs a "dtype", the one in which the weights are stored: '
            "add it"
        )
    with hooks(register_module_parameter_registration_hook(h) for h in [_without_memory]):
        return unloaded(folder)


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    """What is registered in place of a parameter; None for the parameter itself."""
    if parameter is None or parameter.is_meta:
        return None  # also one that is tied, so that both stay the same
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one of transformers' own kind; asks without importing transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def without_progress_bars() -> None:
    """Nothing; transformers shows no bar of its own for reading weights from now on."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def save_folder(model: nn.Module, folder: Path) -> None:
    """Write the model as transformers itself does: config.json and stock safetensors.

    Raises:
        ValueError: if the model is quantized: its weights are not those that would be read back.
    """
    stock: Any = model
    if getattr(stock.config, "quantization_config", None) is not None:
        raise ValueError(
            f"save needs a dense model, this {type(model).__name__} is quantized: load it without "
            "quantization_config"
        )
    stock.save_pretrained(folder)


def save_config(model: nn.Module, folder: Path) -> None:
    """Write config.json and generation_config.json; the weights are stored in a form of ours."""
    stock: Any = model
    config = copy.deepcopy(stock.config)
    config.architectures = [type(model).__name__]
    config.dtype = stock.dtype
    config.save_pretrained(folder)
    if stock.can_generate():
        stock.generation_config.save_pretrained(folder)


def copy_tokenizer(source: str | Path, folder: str | Path) -> tuple[str, ...]:
    """The names of the tokenizer's and processor's files, now copied from `source` to `folder`."""
    source, folder = Path(source), Path(folder)
    names = tuple(name for name in TOKENIZER_FILES if (source / name).is_file())
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


# --- config.json ---------------------------------------------------------------------------------


def _dense_architecture(folder: Path) -> Any:
    """The class of the model in the folder, whose weights have to be dense."""
    config = read_config(folder)
    architecture = _architecture(config, folder)
    if any(folder.glob(PACKED_FILES)):
        raise ValueError(
            f"{folder} is in secateur's packed form: load it with sc.load({str(folder)!r})"
        )
    if "quantization_config" in config:
        raise ValueError(
            f"load_folder needs a dense model, {folder / 'config.json'} has a quantization_config: "
            "use the model that it was quantized from"
        )
    return architecture


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises: ValueError if there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: models are read from local folders only")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is no Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} needs a JSON object, got {type(config).__name__}")
    return config


def class_name(config: dict[str, Any], folder: Path) -> str:
    """The model class that the config names.

    Raises: ValueError if it names none.
    """
    match config.get("architectures"):
        case [str(name), *_]:
            return name
        case other:
            raise ValueError(
                f'{folder / "config.json"} needs a model class under "architectures", got {other!r}'
            )


def _architecture(config: dict[str, Any], folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(not_installed("transformers")) from error
    name = class_name(config, folder)
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        own = " (its own code, under auto_map, is never run)" if "auto_map" in config else ""
        raise ValueError(
            f"{folder / 'config.json'} names the class {name!r}, which is no model of transformers "
            f"{transformers.__version__}{own}: make the model yourself, and pass it to sc.load as "
            "model="
        )
    return found


def not_installed(package: str) -> str:
    """What to say where a package that folders need is missing."""
    return f"Hugging Face folders need {package}, not installed: pip install 'secateur[hf]'"
