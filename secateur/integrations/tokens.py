"""Rows of token ids to calibrate and evaluate on: from text, from a file, or written by the model.

Imports transformers and tokenizers inside functions only, and downloads nothing.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from secateur.integrations.transformers import (
    CAUSAL_ENDINGS,
    class_name,
    is_transformers,
    not_installed,
    read_config,
)
from secateur.outputs import eval_mode


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
    config = read_config(folder)
    for name, number in (("rows", rows), ("length", length), ("batch", batch)):
        if number < 1:
            raise ValueError(f"text_batches needs {name} of at least 1, got {number}")
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions is not None and length > positions:
        raise ValueError(
            f"text_batches needs a length of at most {positions}, the positions of the model in "
            f"{folder}, got {length}"
        )
    causal = class_name(config, folder).endswith(CAUSAL_ENDINGS)
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
    Source: Liu et al. 2023 (LLM-QAT), arXiv:2305.17888, data-free distillation.
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
    row = torch.randint(len(ids), (rows, 1), generator=generator, device="cpu")
    place = torch.randint(length - prompt + 1, (rows, 1), generator=generator, device="cpu")
    starts = ids[row.to(ids.device), (place + torch.arange(prompt, device="cpu")).to(ids.device)]
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


def _tokenizer(folder: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(not_installed("tokenizers")) from error
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
            return torch.tensor(ids[:tokens], device="cpu")
    raise ValueError(
        f"text_batches needs {tokens:,} tokens, the text has {len(ids):,}: ask for fewer or "
        "shorter rows, or give more text"
    )


def _padded(rows: list[list[int]], padding: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = [row + [padding] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device="cpu"),
        "attention_mask": torch.tensor(mask, device="cpu"),
    }
