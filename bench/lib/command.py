"""The command line that benches have in common."""

import argparse
from pathlib import Path

import torch

from bench.lib.results import RESULTS


def parser_of(bench: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m bench.run.BENCH`, with the folder that rows go to."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.run.{bench}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Let the command line choose the device; by default the GPU, where there is one."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
