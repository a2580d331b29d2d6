"""The library's messages in the words of the command line: its options and its verbs.

A message of the library names its remedy as a Python program would write it. Only the table below
says how the same remedy is written in a shell; `tests/cli/test_wording.py` reads every message of
the library and fails on one that the table leaves in Python.
"""

import re
from functools import cache

# Expression in a message of the library -> its words in the shell. An expression comes before any
# that would match a part of it. `{data}` is `--`, or `--eval-` if the message is about the data to
# measure on.
IN_OPTIONS = {
    # arguments
    r"pass keep_zeros=True": "give --keep-zeros",
    r"pass overwrite=True": "give --overwrite",
    r"\bsave needs (?=an? )": "--output needs ",
    r"\bsave cannot write into": "--output cannot be written into",
    r"\bcheckpoint needs an empty folder": "--checkpoint needs an empty folder",
    r"repeat the call that began it": "repeat the command that began it",
    r"\bbelongs to another call\b": "belongs to another command",
    r"either a mapping of selectors to patterns, or layers=": (
        "either several --pattern SELECTOR=PATTERN, or --layers"
    ),
    r"use a bounded loss, such as \S+, or ignore the layer": "leave the layer out with --ignore",
    r"\bIgnore them\b": "Leave them out with --ignore",
    r"\(ignore=\)": "(--ignore)",
    r"\bignore it\b": "leave it out with --ignore",
    r"remainder='dense' or 'pad'": "'2:4@dense-remainder' or '2:4@pad-remainder'",
    r"\braise the damping\b": "raise the damping with --option damping=0.1",
    r"\blower the learning rate\b": "lower --learning-rate",
    r"give threshold a floor, as floor=(\S+), or": r"give --floor \1, or",
    r"\bnormalise is one of\b": "--normalise is one of",
    r"\bnormalise by '": "use --normalise '",
    r"\b(lower|leave) (width|heads|experts|blocks)\b": r"\1 --\2",
    r"\bshrink_ needs a share of width, heads, experts or blocks, as width=0.25": (
        "one of --width, --heads, --experts and --blocks is needed, as --width 0.25"
    ),
    # data
    r"pass batches\b": "give {data}text FILE or {data}tokens FILE:KEY",
    r"pass shorter batches\b": "give a smaller --length",
    r"pass more batches\b": "give more --rows, or a smaller --batch",
    r"split it, as in tokens\.split\(8\)": "give a smaller --batch",
    r"\bgive batches of one row\b": "give --batch 1",
    r"give the batches labels, or pass loss=, a function \(output, batch\) -> a number": (
        "use a --method that reads no gradients"
    ),
    r"got a length of (\S+): take a smaller one": r"got --length \1: give a smaller one",
    r"\btoken rows are named 'file\.safetensors:key', got": (
        "{data}tokens needs FILE:KEY, 'file.safetensors:key', got"
    ),
    r"pass token ids instead, as 'file\.safetensors:key'": "give {data}tokens FILE:KEY instead",
    r"\bsampled_rows needs batches\b": "--sample needs data",
    r"\bsampled_rows\b": "--sample",
    r"\btake a smaller length\b": "give a smaller --length",
    # methods
    r"\bor sc\.refit\b": "or --method 'refit(METHOD)'",
    r"\b(use|take|such as) sc\.(?=[a-z])": r"\1 --method ",
    # text
    r"\bpass max_new_tokens=": "give --tokens ",
    r"\bmax_new_tokens=": "--tokens ",
    r"\bmax_new_tokens needs": "--tokens needs",
    r"\bpass temperature=1\.0 too": "give --temperature 1.0 too",
    r"\btemperature needs": "--temperature needs",
    r"\btop_k and top_p are": "--top-k and --top-p are",
    r"\btop_([kp]) needs": r"--top-\1 needs",
    r"use model\.generate\(custom_generate=secateur\.llm\.custom_generate\), which does": (
        "transformers in Python does"
    ),
    # verbs
    r"load the model whole and call (?:reconstruct|prune)_": (
        "use `secateur prune`, which loads it whole"
    ),
    r"load the model whole, save it and stream that": (
        "write it again with `secateur export --to dense`, and stream that"
    ),
    r"\breconstruct_folder (?=takes|needs|runs)": "`secateur stream` ",
    r"\bprune_ it first\b": "prune it first, with `secateur prune`",
    r"\brun prune_ with NM\((\d), (\d)\) first": r"prune it to \1:\2 first, with `secateur prune`",
    r"\bunpack_(?:\(model\)| a packed model) first": (
        "write it with `secateur export --to dense` first"
    ),
    r"cast it to bfloat16 or a wider dtype, layer\.\S+ = .*\), and quantise it afterwards": (
        "prune the model that it was made from, and quantise it afterwards"
    ),
    r" other than by\s+secateur\.integrations\.peft\.merge_adapters_": "",
    r"untie them first, layer\.weight = \S+": "untie them in Python first",
    r", or make copy\.deepcopy\(model\) work": "",
    r"load it with sc\.load\([^)]*\)": "write it with `secateur export --to dense` first",
    r"load it with transformers\.\S+\.from_pretrained\([^)]*\)": (
        "load it with transformers in Python, where importing secateur is enough"
    ),
    r"\bsc\.load reads what sc\.save wrote": (
        "the packed form is read with the secateur.json that was written beside it"
    ),
    r"make one and pass it as model=": "make one in Python, where sc.load takes it as model=",
    r"make the model yourself, and pass it to sc\.load as model=": (
        "make the model in Python, where sc.load takes it as model="
    ),
    r"\bname another format\b": "name another --format",
    r"\bpack_ (?=needs|cannot)": "packing ",
    r"\bdistil_ (?=needs)": "`secateur recover` ",
    r"\baccelerate_ with strict needs\b": "--strict needs",
    r"\baccelerate_ needs (?=numbers of tokens|to know how often)": "--tokens-per-call needs ",
    r"\bsuch as \(1, 16\)": "such as 1,16",
    r"as in \{1: 1000, 2048: 1\}": "as in 1:1000,2048:1",
    r"\b(out of|in) tokens=": r"\1 --tokens-per-call",
    r"\bpolicy='([^']*)'": r"--policy \1",
    r"\baccelerate_ needs\b": "`secateur bench` needs",
    r"training without sc\.hold": "training that does not hold them",
    r"sc\.plan\(model, '([^']*)'\)": r"`secateur prune MODEL --pattern \1`",
    # what is left of an argument
    r"\bpass (?=\w)(?!\w+=)": "give ",
}


def in_options(message: str, data: str = "--") -> str:
    """The message as someone at a shell can act on it.

    `data` is the beginning of the names of the options for the data that the message is about.
    """
    for expression, words in _table():
        message = expression.sub(words.replace("{data}", data), message)
    return message


@cache
def _table() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(expression), words) for expression, words in IN_OPTIONS.items())
