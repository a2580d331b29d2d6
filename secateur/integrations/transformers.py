"""Hugging Face folders: models, text as token batches, and the tokenizer's files.

The only file that imports transformers and tokenizers, and only inside functions. Nothing is
downloaded, and no code that a folder brings along is ever run.
"""

import contextlib
import copy
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from tqdm import tqdm

from secateur.outputs import eval_mode

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
    architecture = _architecture(_config(folder), folder)
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
    config = _config(folder)
    if not (config.get("dtype") or config.get("torch_dtype")):
        raise ValueError(
            f'{folder / "config.json"} needs a "dtype", the one in which the weights are stored: '
            "add it"
        )
    handle = register_module_parameter_registration_hook(_without_memory)
    try:
        return unloaded(folder)
    finally:
        handle.remove()


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


def text_batches(
    folder: str | Path, text: str | Path | Sequence[str], rows: int, length: int, batch: int
) -> list[dict[str, Tensor]] | list[Tensor]:
    """The first `rows` rows of text as batches of `batch` rows for the model in the folder.

    For causal language models a row is `length` tokens cut from the documents laid end to end, the
    end-of-text token between them. For other models a row is one passage, cut off at `length`
    tokens, padded to the longest of its batch and with an `attention_mask`. `text` is a list of
    strings, or the path of a `.jsonl` file with a "text" on each line, or of a plain text file: one
    document, whose passages are its paragraphs.

    Raises:
        ValueError: if there is too little text (with what there is), `length` is beyond the model,
            a file cannot be read (with the line), or tokenizers is not installed.
    """
    folder = Path(folder)
    config = _config(folder)
    for name, number in (("rows", rows), ("length", length), ("batch", batch)):
        if number < 1:
            raise ValueError(f"text_batches needs {name} of at least 1, got {number}")
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions is not None and length > positions:
        raise ValueError(
            f"text_batches needs a length of at most {positions}, the positions of the model in "
            f"{folder}, got {length}"
        )
    causal = _class_name(config, folder).endswith(CAUSAL_ENDINGS)
    tokenizer = _tokenizer(folder)
    if causal:
        documents = _documents(text, whole=True)
        ids = _laid_end_to_end(tokenizer, documents, config.get("eos_token_id"), rows * length)
        return list(ids.view(rows, length).split(batch))
    passages = _documents(text, whole=False)
    if len(passages) < rows:
        raise ValueError(f"text_batches needs {rows} passages, the text has {len(passages)}")
    tokenizer.enable_truncation(length)
    encoded = [e.ids for e in tokenizer.encode_batch(passages[:rows])]
    # Where no token is named for padding any will do: the attention mask hides it.
    padding = config.get("pad_token_id") or 0
    return [_padded(encoded[i : i + batch], padding) for i in range(0, rows, batch)]


def token_rows(source: str, rows: int, batch: int) -> list[Tensor]:
    """The first `rows` rows of token ids in `"file.safetensors:key"`, in batches of `batch` rows.

    Raises:
        ValueError: if the file or the key is missing, or there are no such rows of integers.
    """
    file, _, key = source.rpartition(":")
    if not file.endswith(".safetensors") or not key:
        raise ValueError(f"token rows are named 'file.safetensors:key', got {source!r}")
    if rows < 1 or batch < 1:
        raise ValueError(f"token_rows needs rows and batch of at least 1, got {rows} and {batch}")
    try:
        with safe_open(file, framework="pt") as tensors:
            if key not in tensors.keys():
                listed = ", ".join(sorted(tensors.keys()))
                raise ValueError(f"{file} has no tensor {key!r}: it has {listed}")
            part = tensors.get_slice(key)
            shape = part.get_shape()
            ids = part[:rows] if len(shape) == 2 else None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    if ids is None or ids.is_floating_point() or shape[0] < rows:
        found = f"shape {shape}" if ids is None else f"{ids.dtype} {shape}"
        raise ValueError(f"{source} needs integers of shape [at least {rows}, tokens], has {found}")
    return list(ids.long().split(batch))


def sampled_rows(
    model: nn.Module,
    batches: Sequence[Tensor],
    rows: int,
    *,
    prompt: int = 32,
    at_once: int = 64,
    seed: int = 0,
) -> list[Tensor]:
    """Rows of token ids that the model writes itself, in batches such as those given.

    Each starts with `prompt` tokens, or half a row if that is less, from a random place of the
    given rows and goes on, up to their length, with tokens drawn from the model's own distribution;
    the end of a text does not end it. They are more calibration data where there is little. Ask the
    dense model for them.

    Cost: a forward pass over all rows, a token at a time for `at_once` rows, with their keys and
        values in memory.
    Raises:
        ValueError: if the model does not generate text, or the batches are not rows of ids, 2 or
            more in each.
    Source: Liu et al. 2023 (LLM-QAT), arXiv:2305.17888, section 3.1.
    """
    writer: Any = model
    if not (is_transformers(model) and writer.can_generate()):
        raise ValueError(
            "sampled_rows needs a model of transformers that generates text, got "
            f"{type(model).__name__}"
        )
    for name, number in (("rows", rows), ("prompt", prompt), ("at_once", at_once)):
        if number < 1:
            raise ValueError(f"sampled_rows needs {name} of at least 1, got {number}")
    lengths = {batch.shape[1] if batch.dim() == 2 else 0 for batch in batches}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            "sampled_rows needs batches [rows, tokens] of token ids, all of one length, 2 tokens "
            f"at least, got {[tuple(batch.shape) for batch in batches[:3]]}"
        )
    ids = torch.cat(list(batches)).to(writer.device)
    length = ids.shape[1]
    prompt = min(prompt, length // 2)
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(len(ids), (rows, 1), generator=generator)
    place = torch.randint(length - prompt + 1, (rows, 1), generator=generator)
    starts = ids[row.to(ids.device), (place + torch.arange(prompt)).to(ids.device)]
    devices = [ids.device] if ids.is_cuda else []
    with eval_mode(model), _sampling_plainly(writer), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        written = [
            writer.generate(
                start, attention_mask=torch.ones_like(start), max_length=length, use_cache=True
            )
            for start in tqdm(starts.split(at_once), desc="sample", disable=None)
        ]
    return list(torch.cat(written).split(len(batches[0])))


@contextlib.contextmanager
def _sampling_plainly(model: Any) -> Iterator[None]:
    """`generate` draws from the model's distribution as it is for the while, and never ends early.

    What the model's own configuration asks for, such as a repetition penalty, is put aside.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, top_k=0)
    try:
        yield
    finally:
        model.generation_config = own


# --- config.json ---------------------------------------------------------------------------------


def _dense_architecture(folder: Path) -> Any:
    """The class of the model in the folder, whose weights have to be dense."""
    config = _config(folder)
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


def _config(folder: Path) -> dict[str, Any]:
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


def _class_name(config: dict[str, Any], folder: Path) -> str:
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
        raise ValueError(_missing("transformers")) from error
    name = _class_name(config, folder)
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        own = " (its own code, under auto_map, is never run)" if "auto_map" in config else ""
        raise ValueError(
            f"{folder / 'config.json'} names the class {name!r}, which is no model of transformers "
            f"{transformers.__version__}{own}: make the model yourself, and pass it to sc.load as "
            "model="
        )
    return found


def _missing(package: str) -> str:
    return f"Hugging Face folders need {package}, not installed: pip install 'secateur[hf]'"


# --- text ----------------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(_missing("tokenizers")) from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json: pass token ids instead, as 'file.safetensors:key'"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _documents(text: str | Path | Sequence[str], whole: bool) -> list[str]:
    """Texts that are not blank; a plain text file is one, or with `whole` off its paragraphs."""
    if not isinstance(text, (str, Path)):
        return [document for document in text if document.strip()]
    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as text: {error}: strings are passed in a list"
        ) from error
    if path.suffix == ".jsonl":
        return _json_lines(path, content)
    parts = [content] if whole else re.split(r"\n\s*\n", content)
    return [part.strip() for part in parts if part.strip()]


def _json_lines(path: Path, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise ValueError(f'{path}, line {number}: needs a JSON object with a string "text"')
        if document.strip():
            documents.append(document)
    return documents


def _laid_end_to_end(tokenizer: Any, documents: list[str], end: Any, tokens: int) -> Tensor:
    """Exactly so many token ids of the documents, `end` after each that does not end with it."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document).ids
        if isinstance(end, int) and ids[-1:] != [end]:
            ids.append(end)
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    raise ValueError(
        f"text_batches needs {tokens:,} tokens, the text has {len(ids):,}: ask for fewer or "
        "shorter rows, or give more text"
    )


def _padded(rows: list[list[int]], padding: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = [row + [padding] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
