"""The options that several commands share, each written once, and how their values are read."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.accelerate.tokens import Tokens, day_of

DATA = "Data"
CHOICE = "Which layers, which zeros"
# How a page's name ends.
HTML = (".html", ".htm")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder; or a bare state dict: a .safetensors file or its index.json.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder.", show_default=False)
]
Folders = Annotated[
    list[Path],
    typer.Argument(
        metavar="FOLDER...", help="Hugging Face folders: one, or several to compare.",
        show_default=False,
    ),
]  # fmt: skip
Patterns = Annotated[
    list[str] | None,
    typer.Option(
        "--pattern",
        "-p",
        help="2:4, 4:8, unstructured:0.6, block:64x64@0.8, channels:0.25; or SELECTOR=PATTERN, "
        "repeated, of which the first match wins.",
        rich_help_panel=CHOICE,
        show_default=False,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="A plan file that `secateur plan` wrote.",
        rich_help_panel=CHOICE,
        show_default=False,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        help="Names, globs or re:... of the layers to take; repeat it for more.",
        rich_help_panel=CHOICE,
        show_default=False,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        help="Names, globs or re:... of layers to leave alone.",
        rich_help_panel=CHOICE,
        show_default=False,
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help='A text file, a .jsonl file with a "text" a line, or a folder of files; read with the '
        "model's tokenizer.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
TokenFile = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="FILE:KEY",
        help="Token ids [rows, length] in a safetensors file, cut from documents.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Rows = Annotated[
    int,
    typer.Option(
        min=1,
        help="How many rows of tokens to read, of as many documents as there are; fewer where the "
        "text is short.",
        rich_help_panel=DATA,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens in a row, at most; default: 1024 of a text, all of a file of tokens.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows run at once.", rich_help_panel=DATA)]
Sample = Annotated[
    int,
    typer.Option(
        min=0,
        help="Rows more that the dense language model writes itself, for methods that need data: "
        "little text then goes far.",
        rich_help_panel=DATA,
    ),
]
EvalText = Annotated[
    Path | None,
    typer.Option(
        help="Measure before and after on this text, which should be another.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
EvalTokens = Annotated[
    str | None,
    typer.Option(
        metavar="FILE:KEY",
        help="Measure before and after on these token ids.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
EvalRows = Annotated[
    int, typer.Option(min=1, help="How many rows to measure on.", rich_help_panel=DATA)
]
Baseline = Annotated[
    Path | None,
    typer.Option(help="The dense model's folder, to compare with.", show_default=False),
]
TokensPerCall = Annotated[
    str | None,
    typer.Option(
        help="Tokens in one call of the model, as 1,16,128; or with how often each occurs, as "
        "1:1000,2048:1.",
        show_default=False,
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Formats to try, separated by commas: semi24,semi48,block:64x64,bitmap,csr; "
        "semi24_int4,semi24_int8,semi24_fp8,semi48_int4,bitmap_int4 and, dense, int4,int8 round "
        "weights; "
        "semi24_int8_dynamic,semi24_fp8_dynamic,int8_dynamic,fp8_dynamic (the last two dense) "
        "inputs, too.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Measure this task of lm-eval too, such as arc_easy; repeat it for more. Data that is "
        "not on the disk is downloaded by lm-eval.",
        show_default=False,
    ),
]
TaskFolder = Annotated[
    Path | None,
    typer.Option(help="A folder with task files of your own for lm-eval.", show_default=False),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Documents of each task, at most.", show_default=False),
]
KeepZeros = Annotated[
    bool,
    typer.Option(
        "--keep-zeros",
        help="Weights that are zero already stay so, and count towards the pattern's zeros.",
        rich_help_panel=CHOICE,
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="An option of the method, as damping=0.1; repeat it for more.",
        show_default=False,
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Run the Python file that --method names. It may do anything you may."
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="The folder to write, new or empty.", show_default=False),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="What to compute in: stored, float32, bfloat16, float16, or auto (float32 on a CPU, "
        "but stored where weights are put on a grid). Files keep the dtype that they have."
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Full = Annotated[bool, typer.Option("--full", help="A line for every layer, also for equal ones.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


def token_counts(text: str) -> Tokens:
    """The numbers in `1,16,128`, or those in `1:1000,2048:1` with how often each occurs.

    Raises:
        ValueError: if they are not positive numbers, or how often they occur is not said of each
            once.
    """
    parts = [part.partition(":") for part in text.split(",")]
    try:
        counts = [int(count) for count, _, _ in parts]
        often = [float(times) for _, colon, times in parts if colon]
    except ValueError:
        counts, often = [], []
    tokens: Tokens = dict(zip(counts, often, strict=False)) if often else tuple(counts)
    if not tokens or (often and len(tokens) < len(parts)):
        raise ValueError(
            "--tokens-per-call needs numbers of at least 1 separated by commas, or each with how "
            f"often it occurs, as 1:1000,2048:1, got {text!r}"
        )
    day_of(tokens)  # before a model is read
    return tokens


def require_place(target: Path | None, *endings: str) -> None:
    """Check, before the work, that the file can be written and is what its name says.

    Raises:
        ValueError: if it cannot, or its name ends in something else.
    """
    if target is None:
        return
    if target.suffix.lower() not in endings:
        raise ValueError(
            f"{target} would not be what its name says, {endings[0]} is written: give it a name "
            f"that ends in {endings[0]}"
        )
    if target.is_dir() or not target.resolve().parent.is_dir():
        raise ValueError(f"{target} cannot be written: name a file in a folder that exists")
