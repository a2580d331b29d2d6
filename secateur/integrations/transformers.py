"""Hugging Face folders: models, and the files of their tokenizers.

Imports transformers inside functions only. Nothing is downloaded, and no code that a folder brings
along is ever run.
"""

import contextlib
import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from secateur.core.disk.data_files import read_json
from secateur.core.disk.tensor_files import load_files, shards, writing
from secateur.formats.pack import QUANT_METHOD
from secateur.model.blocks import hooks

# All files that tokenizers, processors and chat templates are known to be stored in.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip

# The variant of packed weight files; a loader that does not know it finds no weights at all.
PACKED_FILES = "model.secateur*.safetensors"

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
GGUF = ".gguf"
FROM_GGUF = (
    "a GGUF file holds weights quantised for llama.cpp, which are not read: take the folder of "
    "safetensors that it was made from"
)
UNTRUSTED = "a pickle may hold code, so it is never read: convert it, if you trust it"

# The deepest models have a few hundred, and transformers builds a thousand in a second.
MOST_LAYERS = 10_000

# A model registers a tied weight once for each of its names, and again when it is loaded.
MOST_TIMES_STORED = 16

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def load_folder(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model in a Hugging Face folder, in eval mode, in the dtype it is stored in or another.

    Its class is the one that `config.json` names, which must be transformers' own. transformers is
    given the tensors and opens no weight file itself: whatever a folder names or holds, only
    safetensors files of that folder are read.

    Raises:
        ValueError: if the folder, its config or its weights are missing, damaged, packed, quantized
            or incomplete, or transformers is not installed.
        OSError: if a file cannot be read.
    """
    folder = Path(folder)
    architecture = _dense_architecture(folder)
    config = _config(architecture, folder)
    tensors = load_files(weight_files(folder, architecture))
    limit = _Limit(MOST_TIMES_STORED * sum(tensor.numel() for tensor in tensors.values()))
    counting = hooks(register_module_parameter_registration_hook(h) for h in [limit.count])
    with _naming(folder, architecture), counting:
        model, found = architecture.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of {architecture.__name__}, first "
            f"{missing[0]!r}, which would be random: complete the folder, or name another class in "
            "config.json"
        )
    _complete(model, folder)
    loaded: nn.Module = model
    return loaded


class _Limit:
    """Raise when a model under construction has many more numbers than its files.

    Later it would be refused for the missing weights, once random ones had been allocated.
    """

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0

    def count(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        self._count += 0 if parameter is None or is_lazy(parameter) else parameter.numel()
        if self._count > self._most:
            raise ValueError(
                f"the model would have more than {MOST_TIMES_STORED} times as many numbers as the "
                "weight files"
            )


def weight_files(folder: Path, architecture: Any = None) -> list[Path]:
    """The weight files of a Hugging Face folder: the only one, or those in its index.

    Raises:
        ValueError: if there are none, one is missing, or the index names anything but a
            safetensors file of the folder.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not whole.is_file() and not index.is_file():
        raise ValueError(_no_weights(folder))
    found = [whole] if whole.is_file() else shards(index)
    # A few classes keep a head in a file of its own.
    extra = getattr(getattr(architecture, "config_class", None), "extra_files", ())
    return [*found, *(folder / name for name in extra if (folder / name).is_file())]


def unloaded(folder: str | Path) -> nn.Module:
    """The model that `config.json` describes, in its dtype, with meaningless weights.

    Raises:
        ValueError: if the config is missing or damaged, or describes no model of transformers.
    """
    folder = Path(folder)
    architecture = _architecture(read_config(folder), folder)
    config = _config(architecture, folder)
    before = torch.get_default_dtype()
    with _naming(folder, architecture):
        try:
            # As from_pretrained does: `.to(dtype)` would round buffers that have to stay float32.
            torch.set_default_dtype(config.dtype or torch.float32)
            model: Any = architecture(config)
        finally:
            torch.set_default_dtype(before)
    _complete(model, folder)
    built: nn.Module = model.eval()
    return built


def without_weights(model: nn.Module) -> nn.Module:
    """A new model of this transformers model's class and config, on the meta device."""
    stock: Any = model
    with torch.device("meta"):
        fresh: nn.Module = type(stock)(copy.deepcopy(stock.config))
    return fresh


def hollow(folder: str | Path) -> nn.Module:
    """The model in a Hugging Face folder without its weights, in eval mode; no weight is read.

    Parameters are on the meta device, tied ones the same object; buffers hold their values.

    Raises:
        ValueError: if the folder or its config is missing, damaged, packed or quantized, its class
            is not transformers' own, or the config names no dtype.
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
    """The parameter to register in place of this one; None to keep it."""
    if parameter is None or parameter.is_meta:
        return None  # also one that is tied, so that both stay the same
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is a transformers model, without importing transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def without_progress_bars() -> None:
    """Keep transformers from showing progress bars of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def save_folder(model: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the model as transformers itself does: config.json and stock safetensors.

    `state` has its tensors, by their names in the model that will be read back.

    Raises:
        ValueError: if the model is quantized, since other weights would be read back.
        OSError: if a file cannot be written.
    """
    stock: Any = model
    if getattr(stock.config, "quantization_config", None) is not None:
        raise ValueError(
            f"save needs a dense model, this {type(model).__name__} is quantized: load it without "
            "quantization_config"
        )
    if getattr(stock, "_hf_peft_config_loaded", False):
        stock = copy.copy(stock)  # whose attribute alone is changed
        stock._hf_peft_config_loaded = False  # with it, nothing but adapters would be written
    with writing(folder):
        stock.save_pretrained(folder, state_dict=dict(state))
    for path in folder.glob("*.safetensors"):  # which safetensors leaves to their owner alone
        path.chmod((folder / "config.json").stat().st_mode)


def save_config(model: nn.Module, folder: Path, quantization: Mapping[str, Any]) -> None:
    """Write config.json, with this quantization_config, and generation_config.json."""
    stock: Any = model
    config = copy.deepcopy(stock.config)
    config.quantization_config = dict(quantization)
    config.architectures = [type(model).__name__]
    config.dtype = stock.dtype
    config.save_pretrained(folder)
    if stock.can_generate():
        stock.generation_config.save_pretrained(folder)


def tokenizer_files(folder: str | Path) -> dict[str, Path]:
    """The files of the tokenizer and the processor in a folder, by name."""
    return {name: Path(folder, name) for name in TOKENIZER_FILES if Path(folder, name).is_file()}


# --- config.json ---------------------------------------------------------------------------------


def _dense_architecture(folder: Path) -> Any:
    """The class of the model in the folder, if its weights are dense."""
    config = read_config(folder)
    architecture = _architecture(config, folder)
    if any(folder.glob(PACKED_FILES)):
        raise ValueError(
            f"{folder} is in secateur's packed form: load it with sc.load({str(folder)!r})"
        )
    if (given := config.get("quantization_config")) is not None:
        if isinstance(given, dict) and given.get("quant_method") == QUANT_METHOD:
            raise ValueError(
                f"{folder} is in secateur's packed form, written by save_pretrained: load it with "
                f"transformers.{class_name(config, folder)}.from_pretrained({str(folder)!r})"
            )
        raise ValueError(
            f"load_folder needs a dense model, {folder / 'config.json'} has a quantization_config: "
            "use the model that it was quantized from"
        )
    return architecture


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
        ValueError: if there is none, it is no JSON object, it sends a reader to files or code
            elsewhere, or it has layers without end.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(no_folder(folder))
    if not path.is_file():
        files = sorted(folder.iterdir())
        if any(file.suffix == GGUF for file in files):
            raise ValueError(f"{folder} has no config.json, {_only_gguf(files)}")
        raise ValueError(f"{folder} has no config.json: it is no Hugging Face model folder")
    config = read_json(path, infinite=True)  # state-space models limit a time step by infinity
    if "configuration_files" in config:
        raise ValueError(
            f"{path} names other files under configuration_files: keep the one that is meant, as "
            "config.json"
        )
    if (elsewhere := _kernels_from_a_hub(config)) is not None:
        raise ValueError(
            f"{path} asks for the code of {elsewhere!r}, which is never run: remove that entry"
        )
    _require_few_layers(config, path)
    return config


def _require_few_layers(config: Any, path: Path) -> None:
    """Raise if the config has so many layers that they would be built for ever, without weights."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if isinstance(value, dict | list):
            _require_few_layers(value, path)
        elif isinstance(value, int | float) and "layer" in str(key) and value > MOST_LAYERS:
            raise ValueError(
                f"{path} has {value:,} as its {key}, more than {MOST_LAYERS:,}: it is damaged: "
                "copy it again from where it comes"
            )


def _kernels_from_a_hub(config: Any) -> str | None:
    """A repository from which the config, or one inside it, takes an implementation."""
    if isinstance(config, list):
        return next(filter(None, map(_kernels_from_a_hub, config)), None)
    if not isinstance(config, dict):
        return None
    for key, value in config.items():
        named = list(value.values()) if isinstance(value, dict) else [value]
        for name in named if "_implementation" in key else ():
            if isinstance(name, str) and "/" in name:
                return name
        if (found := _kernels_from_a_hub(value)) is not None:
            return found
    return None


def no_folder(path: str | Path) -> str:
    """The message for a path without a model; a name on the hub is recognised."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        local = str(path).rpartition("/")[2]
        return (
            f"there is no folder {path}: models are read from local folders only; a model of the "
            f"Hugging Face hub is downloaded first: hf download {path} --local-dir {local}"
        )
    return f"there is no folder {path}: models are read from local folders only"


def _no_weights(folder: Path) -> str:
    """The message for a folder without safetensors; pickled weights can be converted."""
    pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLED)
    missing = f"{folder} has no model.safetensors, nor the index of several files"
    if not pickled and any(path.suffix == GGUF for path in folder.iterdir()):
        return f"{missing}, {_only_gguf(sorted(folder.iterdir()))}"
    if not pickled:
        return f"{missing}: copy the folder again"
    name = class_name(read_config(folder), folder)
    made = f"transformers.{name}.from_pretrained({str(folder)!r}, dtype='auto')"
    return (
        f"{missing}, only {pickled[0].name}, and {UNTRUSTED}: "
        f"python -c \"import transformers; {made}.save_pretrained('converted')\""
    )


def _only_gguf(files: Sequence[Path]) -> str:
    """What is there in place of what is read, and what to do."""
    first = next(file.name for file in files if file.suffix == GGUF)
    return f"only {first}: {FROM_GGUF}"


def converted(path: Path) -> str:
    """The advice for a file of pickled weights."""
    to = str(path.with_suffix(".safetensors"))
    return (
        f'{UNTRUSTED}: python -c "import torch, safetensors.torch as st; '
        f"w = torch.load({str(path)!r}, weights_only=True, map_location='cpu'); "
        f'st.save_file({{k: v.clone() for k, v in w.items()}}, {to!r})"'
    )


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
    base = transformers.PreTrainedModel  # which is no model itself, and has no config class
    if not (isinstance(found, type) and issubclass(found, base) and found is not base):
        own = " (its own code, under auto_map, is never run)" if "auto_map" in config else ""
        raise ValueError(
            f"{folder / 'config.json'} names the class {name!r}, which is no model of transformers "
            f"{transformers.__version__}{own}: make the model yourself, and pass it to sc.load as "
            "model="
        )
    return found


def _config(architecture: Any, folder: Path) -> Any:
    """The config of this class in the folder."""
    with _naming(folder, architecture):
        return architecture.config_class.from_pretrained(folder, local_files_only=True)


def _complete(model: Any, folder: Path) -> None:
    """Give the model its path and its generation settings, from a file of theirs or the config."""
    model.config.name_or_path = str(folder)
    if not model.can_generate():
        return
    path = folder / "generation_config.json"
    own = path.is_file()
    if own:
        read_json(path, infinite=True)
    kind = type(model.generation_config)
    with _naming(folder, type(model), path if own else None):
        model.generation_config = kind.from_pretrained(
            folder,
            config_file_name=path.name if own else "config.json",
            local_files_only=True,
            **({} if own else {"_from_model_config": True}),
        )


@contextlib.contextmanager
def _naming(folder: Path, architecture: Any, path: Path | None = None) -> Iterator[None]:
    """Turn whatever transformers raises over a file's content into a ValueError that names it.

    transformers has no narrower error: a wrong value ends in one of any kind, wherever it is used.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or "no reason"
        raise ValueError(
            f"{path or folder / 'config.json'} does not make a {architecture.__name__} with the "
            f"files beside it: {type(error).__name__}: {said}"
        ) from error


def not_installed(package: str) -> str:
    """The message for a missing package that folders need."""
    return f"Hugging Face folders need {package}, not installed: pip install 'secateur[hf]'"
