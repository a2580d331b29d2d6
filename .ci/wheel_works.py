"""What the README promises of an installed wheel, in the environment that runs this, on the CPU.

Usage: python -I wheel_works.py CHECKOUT, in an empty folder.
"""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import secateur as sc

EXTRAS = ("transformers", "tokenizers", "matplotlib", "scipy", "sphinx", "pytest", "peft")


def main(checkout: Path) -> None:
    """Every promise in turn; the first that is broken ends it."""
    home = Path(sc.__file__).parent
    assert home.is_relative_to(sys.prefix), f"secateur was imported from {home}, not from the wheel"
    found = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not found, f"the core dependencies bring {found}: the environment is not bare"
    assert (home / "py.typed").is_file(), "the wheel has no py.typed"
    sources = {p.relative_to(checkout / "secateur") for p in tracked(checkout)}
    missing = sorted(str(path) for path in sources if not (home / path).is_file())
    assert not missing, f"the wheel lacks {missing}"

    readme = (checkout / "README.md").read_text(encoding="utf-8")
    quickstart = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[0]
    run(sys.executable, "-W", "error", "-c", quickstart)
    assert Path("pruned/secateur.json").is_file(), "the quickstart saved nothing"

    assert sc.__version__ in run("secateur", "--version")
    assert sc.__version__ == importlib.metadata.version("secateur")
    assert " prune " in run("secateur", "--help")
    examined = run("secateur", "doctor", "--all")
    compiled = (home / "formats" / "kernels" / "simd" / "kernels.so").is_file()
    said = "body runs" if compiled else "were not compiled into this installation"
    assert "torch" in examined and said in " ".join(examined.split()), examined
    torch.manual_seed(0)
    save_file({"layers.0.mlp.up.weight": torch.randn(64, 64)}, "model.safetensors")
    run("secateur", "inspect", "model.safetensors")
    run("secateur", "prune", "model.safetensors", "-p", "2:4", "-o", "pruned-file")
    weight = load_file("pruned-file/model.safetensors")["layers.0.mlp.up.weight"]
    assert bool(((weight.view(-1, 4) == 0).sum(1) == 2).all()), "not 2:4"
    run("secateur", "check", "pruned-file", "-p", "2:4")
    print(f"the wheel of secateur {sc.__version__} works in a bare environment")


def run(*command: str) -> str:
    """What a command prints; it must succeed."""
    print("$", *(" ".join(part.split())[:60] for part in command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def tracked(checkout: Path) -> list[Path]:
    """Every file of the package in the checkout that is no by-product."""
    files = (checkout / "secateur").rglob("*")
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


main(Path(sys.argv[1]))
