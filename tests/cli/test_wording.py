"""Messages in the shell: every one of the library is in the words of the command line there."""

import ast
import re
from pathlib import Path

import pytest

from secateur.cli.wording import IN_OPTIONS, in_options

SOURCES = Path(__file__).parents[2] / "secateur"

# What only a Python program can act on: verbs in place, dotted names, keyword arguments, calls.
PYTHON = re.compile(
    r"\b[a-z]\w*_(?=[\s(:,.;]|$)"
    r"|\b(?:sc|torch|copy|nn)\.(?!Linear|Conv|MultiheadAttention|float64)\w+"
    r"|\bsecateur\.(?!json)\w+"
    r"|\b[a-z]\w*=(?!=)"
    r"|\b[a-z]\w*\([^)]*\)"
    r"|\.[a-z]\w*\("
    r"|\b(?:text_batches|token_rows|sampled_rows)\b"
)
# What is written for a shell, and what says that it is for Python.
SHELL = re.compile(
    r"`[^`]*`|--[a-z-]+(?: '[^']*'| [a-z]+=[\w.]+)?|\bpip install '[^']*'|\bpython -c \"[^\"]*\""
)

# Modules of verbs that no command has, and of what runs on a GPU only under them.
NO_COMMAND = (
    "compat/", "prune/decompose.py", "prune/factorise.py", "prune/permute.py",
    "prune/permutation.py",
    "prune/free_dimensions.py", "prune/channels/", "reconstruct/lowrank.py", "reconstruct/peft.py",
    "allocation/", "train/hold.py", "train/gradual.py", "train/movement.py", "train/schedules.py",
    "formats/warmup.py", "formats/convert.py", "formats/read_only.py", "formats/kernels/",
    "integrations/packed_config.py", "integrations/transformers_quantizer.py",
    "integrations/vllm_plugin.py", "integrations/peft.py", "integrations/trainer.py",
    "train/steps.py", "train/weights.py", "train/dynamic.py", "integrations/lightning.py",
    "train/learn.py", "train/straight_through.py", "accelerate/training.py", "formats/training.py",
    "llm/custom_generate.py", "patterns/grids.py", "report/plots.py", "report/pictures.py", "cli/",
)  # fmt: skip
REACHED = (
    "allocation/sensitivity.py", "allocation/progress.py", "allocation/budget.py",
    "allocation/equalize.py", "allocation/formulas.py", "allocation/costs.py",
)  # fmt: skip

# What only a program can get wrong: no command makes such a call, or has such a model.
BY_PROGRAMS = (
    "distil_ needs a loss that is one number",
    "distil_ needs a teacher of its own",
    "distil_ needs float32 parameters",
    "distil_ needs parameters that require gradients",
    "WithTask needs a loss of the task",
    "perplexity needs a window for stride",
    "… needs an exact format to train its weight",
    "allocate needs the cost of …",
    "accuracy needs batches",
    "… needs an iterable of batches, got one",
    "into … needs a float32, bfloat16 or float16 weight",
    "pack needs a float32, float64, bfloat16 or float16 weight",
    "… needs its weight left packed, got an assignment",
    "… needs … input, got",
    "a quantised format stores every weight, 2:4 or 4:8",
    "… needs one scale per output, got one for every",
    "in_features=",
    "… needs a model that holds its layers",
    "NM(n, m) keeps n of m",
    "blockwise takes a criterion or an algorithm",
    "… takes a criterion or an algorithm",
    "prune_ and reconstruct_ take functions",
    "… makes an algorithm of a criterion",
    "… refits weights, prune_ changes none",
    "… only scores weights, reconstruct_ refits them",
    "is no parameter of its own",
    "a model needs to be an ",
    "is computed by ",
    "has no data (meta device), accelerate has",
    "is stored as …: make it dense",
    "use scope='layer', for one size",
    "was made in torch.inference_mode",
    "has elements that share memory",
    "has a mask of torch.nn.utils.prune attached",
    "save needs a model, got a bare SparseLinear",
    "… of this … has no memory (meta device)",
    "it holds a dense …weight",
    "save_pretrained would write packed weights",
    "ONNX needs dense weights",
    "… calls no hooks at its steps",
    "transformers.….from_pretrained(…, dtype='auto')",  # a part of what `python -c` is given
)


def text_of(node: ast.expr | None) -> str:
    """A string as it is written, with … for what is filled in."""
    match node:
        case ast.Constant(value=str(found)):
            return found
        case ast.JoinedStr(values=parts):
            return "".join(
                text_of(part) if isinstance(part, ast.Constant) else "…" for part in parts
            )
        case ast.BinOp(left=left, right=right):
            return text_of(left) + text_of(right)
    return "…"


def messages() -> list[tuple[str, str]]:
    """Every text that an error, a warning or a reason of the library can be, with its module."""
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        module = path.relative_to(SOURCES).as_posix()
        if module.startswith(NO_COMMAND) and module not in REACHED:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            said: ast.expr | None = None
            match node:
                case ast.Raise(exc=ast.Call(args=[first, *_])):
                    said = first
                case ast.Call(func=ast.Attribute(attr="warn"), args=[first, *_]):
                    said = first
                case ast.Return(value=value) | ast.Assign(value=value):
                    said = value
            if " " in (text := text_of(said)):
                found.append((module, text))
    return found


MESSAGES = messages()


def left_in_python(message: str) -> str | None:
    """What of the message, as the shell shows it, only a Python program can act on."""
    shown = in_options(message)
    found = None if " in Python" in shown else PYTHON.search(SHELL.sub("", shown))
    return found and found[0]


def test_no_message_that_a_command_can_give_speaks_python() -> None:
    assert len(MESSAGES) > 200
    left = [
        f"{module}: {left_in_python(text)!r} in {in_options(text)!r}"
        for module, text in MESSAGES
        if not text.startswith(BY_PROGRAMS) and left_in_python(text)
    ]
    assert not left, "say it in the table of secateur/cli/wording.py:\n" + "\n".join(left)


def test_the_exceptions_are_messages_that_exist() -> None:
    for opening in BY_PROGRAMS:
        assert any(text.startswith(opening) for _, text in MESSAGES), opening
    for module in (*NO_COMMAND, *REACHED):
        assert (SOURCES / module).exists(), module


def test_every_entry_of_the_table_has_its_message() -> None:
    # What is filled in is a name in quotes for the entries that keep it.
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for path in SOURCES.rglob("*.py")
        if "cli" not in path.parts
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    library = "\n".join(
        text_of(node).replace("'…'", "'2:4'")
        for node in nodes
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in docstrings
    )
    assert [entry for entry in IN_OPTIONS if not re.search(entry, library)] == []


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("out holds a saved model: choose another folder, or pass overwrite=True",
         "out holds a saved model: choose another folder, or give --overwrite"),
        ("wanda needs calibration data for input_norm: pass batches, or use sc.magnitude",
         "wanda needs calibration data for input_norm: give --text FILE or --tokens FILE:KEY, or "
         "use --method magnitude"),
        ("thorough trains the whole model at the end, which is in memory part by part: take "
         "sc.best, or load the model whole and call reconstruct_",
         "thorough trains the whole model at the end, which is in memory part by part: take "
         "--method best, or use `secateur prune`, which loads it whole"),
        ("the model in m has 64 positions, got a length of 100: take a smaller one",
         "the model in m has 64 positions, got --length 100: give a smaller one"),
        ("hold needs a model with zeros, this BertModel has none: prune_ it first",
         "hold needs a model with zeros, this BertModel has none: prune it first, with "
         "`secateur prune`"),
        ("accelerate_ with strict needs a gain, got none", "--strict needs a gain, got none"),
        ("m/config.json is not JSON: line 1", "m/config.json is not JSON: line 1"),
    ],
)  # fmt: skip
def test_messages_in_the_words_of_the_shell(message: str, shown: str) -> None:
    assert in_options(message) == shown
    assert in_options(shown) == shown, "twice is as good as once"


def test_options_of_the_held_out_data_have_their_own_names() -> None:
    said = "m has no tokenizer.json: pass token ids instead, as 'file.safetensors:key'"
    assert in_options(said, "--eval-").endswith("give --eval-tokens FILE:KEY instead")
