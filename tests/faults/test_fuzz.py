"""A file damaged in any way is an error that names the file, or is read as what it was.

For a file with a hash, that is what was written. A file that anybody may write, such as a plan or
somebody else's state dict, has no hash: there it is what a second reader finds in it.
"""

import copy
import json
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur as sc
from secateur.accelerate.measurements import ENTRIES
from secateur.allocation import read_sensitivity, sensitivity
from secateur.cli import app
from secateur.core.disk.tensor_files import save_file
from secateur.files.save import load, save
from secateur.files.state_dict import read_state_dict
from secateur.formats.kernels import measured
from secateur.integrations.transformers import load_folder
from secateur.model.outputs import answer
from tests.faults.verbs import TRIED, batches, dense, pruned

Values = dict[str, Any]

# Values that no file has: a number in place of text, text that leads out of the folder, ...
ODD = (None, True, -1, 0, 1.5, 8, 16, 70, 1e300, "x", "../x", "a.bin", "\x1b[2J", "", [], {}, [[]])
ODD += ({"a": 1}, 2**63)
ODD_TEXT = (
    "NaN",
    "Infinity",
    "null",
    "-1",
    "1e400",
    '""',
    "[]",
    "{}",
    "true",
    "9" * 5000,
    "[" * 500,
)
ODD_TEXT += (
    '"\\ud800"',
    '"../x"',
    "\x00",
    "\xff",
    "*a",
    "&a ",
    "!!python/name:os.system ",
    "\n",
    "2:4",
)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip


# --- damage --------------------------------------------------------------------------------------


def damaged(content: bytes, name: str, chosen: random.Random) -> bytes:
    """The content of a file of this name with one fault, in its bytes or in its meaning."""
    if not content:
        return chosen.randbytes(3)
    if chosen.random() < 0.5:
        return _bytes(content, chosen)
    if name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + size].decode()
        said = json.loads(text).get("__metadata__", {}).get("description")
        if said and chosen.random() < 0.5:  # JSON within JSON, of a checkpoint
            text = text.replace(json.dumps(said), json.dumps(_meaning(said, chosen)))
        else:
            text = _meaning(text, chosen)
        header = text.encode("utf-8", "surrogatepass")
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    text = content.decode()
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        line = chosen.randrange(len(lines))
        lines[line] = _meaning(lines[line], chosen).replace("\n", " ")
        text = "\n".join(lines) + "\n"
    elif name.endswith(".yaml"):
        text = _meaning(json.dumps(yaml.safe_load(text)), chosen)
    else:
        text = _meaning(text, chosen)
    return text.encode("utf-8", "surrogatepass")


def _bytes(content: bytes, chosen: random.Random) -> bytes:
    a, b = sorted(chosen.choices(range(len(content)), k=2))
    # Many faults begin near the front, where headers are, whatever the size of the file.
    a = min(a, chosen.randrange(1, 400)) if chosen.random() < 0.4 else a
    few = a + chosen.randrange(1, 9)
    kinds: list[Callable[[], bytes]] = [
        lambda: content[:a] + bytes([content[a] ^ 1 << chosen.randrange(8)]) + content[a + 1 :],
        lambda: content[:a],
        lambda: content[:a] + chosen.randbytes(few - a) + content[a:],
        lambda: content[:a] + content[few:],
        lambda: content[:a] + content[b:],
        lambda: content[:few] + content[a:],
        lambda: content[:a] + bytes(few - a) + content[few:],
        lambda: content[:a] + chosen.choice(ODD_TEXT).encode("latin-1") + content[a:],
        lambda: content + content[a:few],
        lambda: content[b:] + content[:b],
    ]
    return chosen.choice(kinds)()


def _meaning(text: str, chosen: random.Random) -> str:
    """The JSON text with one value or key removed, changed, replaced by an odd one, or doubled."""
    data = json.loads(text)
    spots = list(_spots(data))
    if not spots:
        return text + text
    inside, key = chosen.choice(spots)
    other, from_key = chosen.choice(spots)
    match chosen.randrange(6):
        case 0:
            del inside[key]
        case 1:
            inside[key] = copy.deepcopy(chosen.choice(ODD))
        case 2:
            inside[key] = copy.deepcopy(other[from_key])
        case 3:
            one, two = copy.deepcopy(inside[key]), copy.deepcopy(other[from_key])
            other[from_key], inside[key] = one, two
        case 4 if isinstance(inside, dict):
            inside[f"{key}{chosen.choice(['x', '.', '', ' '])}"] = copy.deepcopy(other[from_key])
        case _:
            if not isinstance(inside, dict):
                inside.insert(0, copy.deepcopy(inside[key]))
            else:
                marker = "the key that is there twice"
                inside[marker] = copy.deepcopy(other[from_key])
                return json.dumps(data).replace(json.dumps(marker), json.dumps(key))
    return json.dumps(data)


def _spots(data: Any) -> Any:
    """The path of every value in plain data."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from _spots(data[key])


# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Files that `write` makes in an empty folder, the ones to damage, and how they are read.

    `says` finds by other means what the files hold now, or None if it cannot; files without it
    have a hash, or hold what they held before.
    """

    write: Callable[[Path], Any]
    files: str
    read: Callable[[Path], Values]
    says: Callable[[Path], Values | None] | None = None


def state(model: nn.Module) -> Values:
    return dict(model.state_dict())


def in_file(path: Path) -> Values:
    """The tensors in a safetensors file, by its own rules and without the library for it."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = bytearray(content[begin + first : begin + last])
        flat = (
            torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        )
        found[name] = flat.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
    )
    model = LlamaForCausalLM(config).eval()
    sc.prune_(model, "2:4")
    return model


def _save_llama(folder: Path) -> None:
    model = llama()
    save(model, folder / "saved", plan=sc.plan(model, "2:4"))


def _save_packed(folder: Path) -> None:
    model = llama()
    names = list(sc.plan(model, "2:4").layers)
    for form, layers in {"semi24": names[:2], "csr": names[2:4], "bitmap": names[4:5]}.items():
        sc.pack_(model, form, layers=layers)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["secateur.files.save"], "SHARD_BYTES", 3000)
        save(model, folder / "saved")


def _load_packed(folder: Path) -> Values:
    model = load(folder / "saved")
    sc.unpack_(model)
    return state(model)


def _foreign(folder: Path) -> None:
    llama().save_pretrained(folder / "model", max_shard_size="5KB")


def _foreign_says(folder: Path) -> Values | None:
    config = json.loads((folder / "model/config.json").read_text())
    if config.get("dtype", "float32") != "float32" or config.get("tie_word_embeddings"):
        return None  # such a model rightly has other values than are stored
    if config["num_hidden_layers"] < 1:
        return None  # transformers reports that layers missing from the config are left out
    index = json.loads((folder / "model/model.safetensors.index.json").read_text())
    found: Values = {}
    for name in set(index["weight_map"].values()):
        found |= in_file(folder / "model" / name)
    return found


def _plan(name: str) -> Kind:
    def write(folder: Path) -> None:
        sc.plan(dense(), {"*up_proj": "2:4", "*down_proj": "block:8x8@0.5"}).write(folder / name)

    def says(folder: Path) -> Values:
        found = yaml.safe_load((folder / name).read_text())
        return {"skipped": {}, **found}

    return Kind(write, name, lambda folder: sc.read_plan(folder / name).to_dict(), says)


def _reconstruct(folder: Path) -> Values:
    model = dense()
    report = sc.reconstruct_(model, "2:4", sc.sparsegpt, batches(), checkpoint=folder / "run")
    rows = [{k: v for k, v in asdict(row).items() if k != "seconds"} for row in report.layers]
    return state(model) | {"report": rows}


def _distil(folder: Path) -> Values:
    model = pruned()
    report = sc.distil_(model, dense(), batches(), steps=3, checkpoint=folder / "run")
    return state(model) | {"losses": [report.first_loss, report.last_loss]}


def _sense(folder: Path) -> Values:
    def loss(model: nn.Module) -> float:
        return float(answer(model, batches()[0], "the batch").square().mean())

    found = sensitivity(dense(), ["2:4", "1:4"], loss, checkpoint=folder / "sense.jsonl")
    return found.to_dict()


def _sensitivity(folder: Path) -> None:
    (found := sensitivity(dense(), ["2:4", "1:4"], lambda model: 1.0)).write(folder / "found.json")
    assert found.increase


def _sensitivity_says(folder: Path) -> Values:
    found = json.loads((folder / "found.json").read_text())
    found = {"skipped": {}, **found}
    found["layers"] = {n: {"why_not": {}, **layer} for n, layer in found["layers"].items()}
    return found


def _read_sensitivity(folder: Path) -> Values:
    found = read_sensitivity(folder / "found.json").to_dict()
    found["layers"] = {n: {"why_not": {}, **layer} for n, layer in found["layers"].items()}
    return found


def _measured(folder: Path) -> None:
    entry = {"microseconds": {"dense": 3.0, "csr": 2.0}, "cannot": {"bitmap": "a reason"}}
    text = json.dumps({**entry, "dropped": ["out of memory"]})
    for tokens in ("1", "16"):
        measured.add(folder / "measured.json", ENTRIES, ("a chip", "a layer", tokens), text)


def _bare(folder: Path) -> None:
    save_file(state(dense()), folder / "weights.safetensors", {"format": "pt"})


def _read_bare(folder: Path) -> Values:
    model, _ = read_state_dict(folder / "weights.safetensors")
    return state(model)


def _bare_says(folder: Path) -> Values:
    """The model's matrices; no name here says to leave one alone."""
    tensors = in_file(folder / "weights.safetensors")
    return {n: tensors[n] for n in _read_bare(folder) if n in tensors}


def _prune_bare(folder: Path) -> None:
    _bare(folder)
    source, target = folder / "weights.safetensors", folder / "pruned"
    _shell("prune", str(source), "-o", str(target), "-p", "2:4", "-m", "magnitude")


def _shell(*command: str) -> str:
    done = CliRunner().invoke(app, command)
    if done.exit_code == 2:
        assert done.stderr.startswith("error: "), done.stderr
        raise ValueError(done.stderr.removeprefix("error: ").strip())
    assert done.exit_code == 0 and not done.exception, (done.exit_code, done.exception)
    return done.stdout


def _look(folder: Path) -> Values:
    return dict(json.loads(_shell("inspect", str(folder / "pruned"), "--json")))


KINDS: Mapping[str, Kind] = {
    "saved": Kind(
        lambda folder: save(pruned(), folder / "saved"),
        "saved/*",
        lambda folder: state(load(folder / "saved", dense())),
    ),
    "saved, transformers": Kind(
        _save_llama, "saved/*", lambda folder: state(load(folder / "saved"))
    ),
    "saved, packed": Kind(_save_packed, "saved/*", _load_packed),
    "Hugging Face": Kind(
        _foreign, "model/*", lambda folder: state(load_folder(folder / "model")), _foreign_says
    ),
    "plan.yaml": _plan("plan.yaml"),
    "plan.json": _plan("plan.json"),
    "checkpoint of layers": Kind(_reconstruct, "run/*", _reconstruct),
    "checkpoint of training": Kind(_distil, "run/*", _distil),
    "checkpoint of sensitivity": Kind(_sense, "sense.jsonl", _sense),
    "sensitivity": Kind(_sensitivity, "found.json", _read_sensitivity, _sensitivity_says),
    "measured.json": Kind(
        _measured,
        "measured.json",
        lambda folder: dict(measured.read(folder / "measured.json", ENTRIES)),
        lambda folder: dict(json.loads((folder / "measured.json").read_text())),
    ),
    "state dict": Kind(_bare, "weights.safetensors", _read_bare, _bare_says),
    "state dict in the shell": Kind(_prune_bare, "pruned/*", _look),
}


# --- the law -------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A key that is equal for two values if and only if they are the same, bit for bit."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def fault(kind: Kind, folder: Path, expected: Any) -> str | None:
    """What is wrong with the reading of the folder's damaged files; None if nothing is."""
    try:
        found = kind.read(folder)
    except (ValueError, OSError) as error:
        said = str(error)
        if "\n" in said or str(folder) not in said:
            return f"says {said!r}"
        return None
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"
    if kind.says is not None:
        try:
            expected = kind.says(folder)
        except BaseException as error:
            return f"reads what cannot be read, {type(error).__name__}: {error}"
        expected = found if expected is None else expected
    return None if plain(found) == plain(expected) else "reads other values"


@pytest.mark.parametrize("name", KINDS)
def test_damaged(name: str, tmp_path: Path) -> None:
    kind, chosen, wrong = KINDS[name], random.Random(name), {}
    whole = tmp_path / "whole"
    whole.mkdir()
    kind.write(whole)
    files = sorted(p.relative_to(whole) for p in whole.glob(kind.files) if p.is_file())
    assert files
    expected = kind.read(whole)
    for i in range(18 * TRIED):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        file = folder / chosen.choice(files)
        before = file.read_bytes()
        after = damaged(before, file.name, chosen)
        file.write_bytes(after)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if after != before and (found := fault(kind, folder, expected)):
                wrong[i, file.name, after[:80] if len(after) < 3000 else len(after)] = found
        shutil.rmtree(folder)
    assert wrong == {}
