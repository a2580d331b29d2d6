"""Rows of token ids to calibrate and evaluate on: from text, from a file, or written by the model.

Imports transformers and tokenizers inside functions only, and downloads nothing.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur.core.progress import progress
from secateur.integrations.deal import Dealt, held_apart, in_turns, shuffled
from secateur.integrations.documents import read_documents, read_passages
from secateur.integrations.transformers import (
    CAUSAL_ENDINGS,
    class_name,
    is_transformers,
    not_installed,
    read_config,
)
from secateur.model.outputs import eval_mode

MORE_FILES = "give 8 documents or more, as a folder of files or as lines of a .jsonl file"
IDS_INSTEAD = "pass token ids instead, as 'file.safetensors:key'"
MORE_ROWS = "take rows of 8 documents or more"


def text_batches(
    folder: str | Path,
    text: str | Path | Sequence[str],
    rows: int,
    length: int,
    batch: int,
    seed: int = 0,
) -> list[dict[str, Tensor]] | list[Tensor]:
    """At most `rows` rows of text as batches of `batch` rows for the model in the folder.

    `text` is a list of documents, or the path of a file or of a folder of files. A `.jsonl` file
    has a document on each line, its "text"; any other file is one, or several with the
    end-of-text token written between them.

    For causal language models a row is `length` tokens. Documents take turns, in an order that
    `seed` decides, and each gives a row from another place at every turn; what is shorter is laid
    end to end, the end-of-text token after each document. For other models a row is one passage (a
    paragraph of a plain file, else a document), cut off at `length` tokens, padded to the longest
    of its batch and with an `attention_mask`. Batches that are held out when methods are fitted
    (the second, and every eighth after it) share no document with the others, but for one where
    there are few.

    It warns if there are fewer rows than asked for, and if they are of fewer than 8 documents.

    Raises:
        ValueError: if there is not one row, `length` is beyond the model, a file cannot be read
            (with the line), or tokenizers is not installed.
    """
    return _warned(text_rows(folder, text, rows, length, batch, seed)).batches


def text_rows(
    folder: str | Path,
    text: str | Path | Sequence[str],
    rows: int,
    length: int,
    batch: int,
    seed: int = 0,
) -> Dealt:
    """What `text_batches` returns, with the rows' documents and without warnings.

    Raises: ValueError as `text_batches`.
    """
    folder = Path(folder)
    config = read_config(folder)
    for name, number in (("rows", rows), ("length", length), ("batch", batch)):
        if number < 1:
            raise ValueError(f"text needs {name} of at least 1, got {number}")
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions is not None and length > positions:
        raise ValueError(
            f"the model in {folder} has {positions} positions, got a length of {length}: take a "
            "smaller one"
        )
    tokenizer, generator = read_tokenizer(folder), torch.Generator().manual_seed(seed)
    if class_name(config, folder).endswith(CAUSAL_ENDINGS):
        documents = read_documents(text)
        return _rows_of_tokens(tokenizer, documents, _ends(config), rows, length, batch, generator)
    # Where no token is named for padding any will do: the attention mask hides it.
    padding = config.get("pad_token_id") or 0
    tokenizer.enable_truncation(length)
    return _rows_of_passages(tokenizer, read_passages(text), padding, rows, batch, generator)


def token_rows(
    source: str, rows: int, batch: int, end: Sequence[int] = (), seed: int = 0
) -> list[Tensor]:
    """At most `rows` rows of token ids in `"file.safetensors:key"`, in batches of `batch` rows.

    The rows are taken to be cut from documents laid end to end, each ended by one of the ids `end`
    (of a model's folder: `end_of_text`); a row counts to the document that most of its tokens are
    of. Documents take turns, as in `text_batches`. Without such ids each row is a document.

    It warns as `text_batches` does.

    Raises:
        ValueError: if the file or the key is missing, or there are no rows of integers.
    """
    dealt = _warned(stored_rows(source, rows, batch, end, seed))
    return [batch for batch in dealt.batches if isinstance(batch, Tensor)]


def stored_rows(
    source: str,
    rows: int,
    batch: int,
    end: Sequence[int] = (),
    seed: int = 0,
    length: int | None = None,
) -> Dealt:
    """What `token_rows` returns, with the rows' documents, without warnings, and cut to `length`.

    Raises: ValueError as `token_rows`.
    """
    file, _, key = source.rpartition(":")
    if not file.endswith(".safetensors") or not key:
        raise ValueError(f"token rows are named 'file.safetensors:key', got {source!r}")
    if rows < 1 or batch < 1:
        raise ValueError(f"tokens need rows and batch of at least 1, got {rows} and {batch}")
    try:
        with safe_open(file, framework="pt") as tensors:
            if key not in tensors.keys():
                listed = ", ".join(sorted(tensors.keys()))
                raise ValueError(f"{file} has no tensor {key!r}: it has {listed}")
            ids = tensors.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        found = f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(f"{source} needs integers of shape [rows, tokens], has {found}")
    of = _documents_of(ids, end)
    piles: dict[int, list[int]] = {}
    for place in shuffled(len(ids), torch.Generator().manual_seed(seed)):
        piles.setdefault(of[place], []).append(place)
    places = [place for _, place in islice(in_turns(piles.values()), rows)]
    places = [places[i] for i in held_apart([of[place] for place in places], batch)]
    documents = tuple(of[place] for place in places)
    chosen = ids[places, :length].long()
    what = f"rows of {chosen.shape[1]:,} tokens"
    different = len(set(documents))
    return Dealt(list(chosen.split(batch)), documents, different, rows, what, MORE_ROWS)


def end_of_text(folder: str | Path) -> tuple[int, ...]:
    """The ids of the tokens that end a text, from the config of the model in the folder."""
    return _ends(read_config(Path(folder)))


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

    Each starts with `prompt` tokens, or half a row if that is less, from a random place in the
    given rows and goes on, up to their length, with tokens drawn from the model's own distribution;
    the end of a text does not end it. Where calibration data is scarce, the dense model gives more
    of it in this way.

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
            for start in progress(starts.split(at_once), "sample")
        ]
    return list(torch.cat(written).split(len(batches[0])))


@contextlib.contextmanager
def _sampling_plainly(model: Any) -> Iterator[None]:
    """Let `generate` draw from the model's own distribution, without an early end.

    The model's own settings, such as a repetition penalty, are put aside until the end.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, top_k=0)
    try:
        yield
    finally:
        model.generation_config = own


def read_tokenizer(folder: Path, instead: str = IDS_INSTEAD) -> Any:
    """The tokenizer in a Hugging Face folder, which neither cuts texts off nor pads them.

    Raises:
        ValueError: if there is none, it is damaged, or tokenizers is not installed. `instead` is
            the remedy for a folder without one.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(not_installed("tokenizers")) from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: {instead}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ends(config: dict[str, Any]) -> tuple[int, ...]:
    found = config.get("eos_token_id")
    ends = found if isinstance(found, list) else [found]
    return tuple(end for end in ends if isinstance(end, int))


def _warned(dealt: Dealt) -> Dealt:
    for remark in dealt.remarks():
        warnings.warn(remark, stacklevel=3)
    return dealt


def _rows_of_tokens(
    tokenizer: Any,
    documents: Sequence[str],
    ends: Sequence[int],
    rows: int,
    length: int,
    batch: int,
    generator: torch.Generator,
) -> Dealt:
    """Rows of `length` tokens, for a causal language model."""
    cut = _Cut(length)
    for number, piece in in_turns(_pieces(tokenizer, documents, ends, length, generator)):
        cut.add(number, piece)
        if len(cut.rows) == rows:
            break
    cut.use_leftovers(rows)
    if not cut.rows:
        raise ValueError(
            f"a row needs {length:,} tokens, the text has {cut.tokens:,}: give more text, or "
            "take a smaller length"
        )
    order = held_apart(cut.documents, batch)
    ids = torch.tensor([cut.rows[i] for i in order], device="cpu")
    of = tuple(cut.documents[i] for i in order)
    what = f"rows of {length:,} tokens"
    return Dealt(list(ids.split(batch)), of, cut.different, rows, what, MORE_FILES)


def _rows_of_passages(
    tokenizer: Any,
    texts: Sequence[Sequence[str]],
    padding: int,
    rows: int,
    batch: int,
    generator: torch.Generator,
) -> Dealt:
    """A passage in each row, for a model that reads a text as a whole."""
    order = shuffled(len(texts), generator)
    dealt = islice(in_turns([list(enumerate(texts[i])) for i in order]), rows)
    passages = sorted((order[number], place, passage) for number, (place, passage) in dealt)
    if not passages:
        raise ValueError("the text is blank: give one with a passage at least")
    passages = [passages[i] for i in held_apart([number for number, *_ in passages], batch)]
    encoded = [e.ids for e in tokenizer.encode_batch([passage for *_, passage in passages])]
    batches = [_padded(encoded[i : i + batch], padding) for i in range(0, len(encoded), batch)]
    of = tuple(number for number, *_ in passages)
    return Dealt(batches, of, len(set(of)), rows, "passages", MORE_FILES)


def _pieces(
    tokenizer: Any,
    documents: Sequence[str],
    ends: Sequence[int],
    length: int,
    generator: torch.Generator,
) -> Iterator[list[list[int]]]:
    """The rows of each document, then its shorter rest; documents and rows in a random order."""
    for number in shuffled(len(documents), generator):
        ids: list[int] = tokenizer.encode(documents[number]).ids
        if ends and ids and ids[-1] not in ends:
            ids.append(ends[0])
        inside = _split(ids, ends)
        for which in shuffled(len(inside), generator):
            part = inside[which]
            places = shuffled(len(part) // length, generator)
            rows = [part[place * length : (place + 1) * length] for place in places]
            rest = part[len(rows) * length :]
            yield [*rows, rest] if rest else rows


def _split(ids: list[int], ends: Sequence[int]) -> list[list[int]]:
    """The documents in the ids, each with the id that ends it."""
    after = [i + 1 for i, token in enumerate(ids) if token in ends]
    bounds = [0, *after, len(ids)]
    return [ids[a:b] for a, b in pairwise(bounds) if a < b]


class _Cut:
    """Rows of one length made from pieces of at most that length, short ones laid end to end.

    The rest of a document that a row cuts off waits for the end, so that a document is in as few
    rows as possible.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.rows = list[list[int]]()
        self.documents = list[int]()
        self._begun = list[tuple[int, list[int]]]()
        self._left = list[tuple[int, list[int]]]()
        self._different = set[int]()
        self.tokens = 0

    @property
    def different(self) -> int:
        """How many documents the rows are of."""
        return len(self._different)

    def add(self, document: int, piece: list[int]) -> None:
        """Take a piece in; it may complete a row."""
        self.tokens += len(piece)
        if len(piece) == self._length:
            self._complete([(document, piece)])
        else:
            self._lay(document, piece)

    def use_leftovers(self, rows: int) -> None:
        """Lay the leftovers end to end until there are `rows` rows."""
        while self._left and len(self.rows) < rows:
            left, self._left = self._left, []
            before = len(self.rows)
            for document, piece in left:
                if len(self.rows) < rows:
                    self._lay(document, piece)
            if len(self.rows) == before:
                return

    def _lay(self, document: int, piece: list[int]) -> None:
        missing = self._length - sum(len(ids) for _, ids in self._begun)
        self._begun.append((document, piece[:missing]))
        if len(piece) >= missing:
            self._complete(self._begun)
            self._begun = []
        if len(piece) > missing:
            self._left.append((document, piece[missing:]))

    def _complete(self, pieces: Sequence[tuple[int, list[int]]]) -> None:
        self.rows.append([token for _, ids in pieces for token in ids])
        self.documents.append(pieces[0][0])
        self._different |= {document for document, _ in pieces}


def _documents_of(ids: Tensor, ends: Sequence[int]) -> list[int]:
    """For each row of ids, laid end to end, the number of the document that most of it is from."""
    ended = (
        torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))
        if ends
        else ids != ids
    )
    if not bool(ended.any()):
        return list(range(len(ids)))
    flat = ended.flatten().long()
    number = (flat.cumsum(0) - flat).view_as(ids)
    documents: list[int] = number.mode(1).values.tolist()
    return documents


def _padded(rows: list[list[int]], padding: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = [row + [padding] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device="cpu"),
        "attention_mask": torch.tensor(mask, device="cpu"),
    }
