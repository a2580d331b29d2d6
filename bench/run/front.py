"""Speed and memory of the front half on a CPU.

    python -m bench.run.front --threads 2 [--model ../shared/models/reference-lm]

Cases: masks of a 4096 x 4096 weight against torch.ao.pruning; SparseGPT on the 36 linears of
all-MiniLM-L6-v2, calibration included; `import secateur` beyond torch; peak memory of
`reconstruct_` on a language model, against the model, its blocks and the calibration activations.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import nn

import secateur as sc
from bench.lib.command import parser_of
from bench.lib.rows import append
from secateur.cli.demo import CALIBRATION_SENTENCES, PACKAGE, manual_sentences
from secateur.integrations.tokens import end_of_text, text_batches, token_rows
from secateur.integrations.transformers import load_folder
from secateur.model.layers import select
from secateur.patterns import parse

Case = dict[str, str | int | float]
WIDTH = 4096
MIB = 2**20


def masks() -> Iterator[Case]:
    """Seconds for the mask of a 4096 x 4096 float32 weight, score included."""
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    for text in ("2:4", "4:8", "unstructured:0.5", "unstructured:0.5@layer", "block:64x64@0.8"):
        pattern = parse(text)
        yield {
            "case": f"mask {text}",
            "value": _seconds(lambda pattern=pattern: pattern.mask(sc.magnitude(weight))),
            "unit": "s",
        }
    yield {"case": "mask 2:4, torch.ao.pruning", "value": _seconds(_torch_ao(weight)), "unit": "s"}


def _torch_ao(weight: torch.Tensor) -> Callable[[], object]:
    from torch.ao.pruning import WeightNormSparsifier

    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    layer[0].weight.data = weight.clone()
    sparsifier = WeightNormSparsifier(1.0, (1, 4), 2)
    sparsifier.prepare(layer, [{"tensor_fqn": "0.weight"}])
    return sparsifier.step


def sparsegpt() -> Iterator[Case]:
    """Seconds for SparseGPT at 2:4 on a sentence encoder, 128 sentences."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        print(f"skipped: sparsegpt on MiniLM: the package {PACKAGE} is not installed")
        return
    folder = Path(found.submodule_search_locations[0]) / "model"
    sentences = manual_sentences()[200:][:CALIBRATION_SENTENCES]
    batches = text_batches(folder, sentences, len(sentences), 128, 32)
    model = load_folder(folder, torch.float32)
    plan = sc.plan(model, "2:4", ignore=["pooler.*"])
    begin = time.perf_counter()
    sc.reconstruct_(model, plan, sc.sparsegpt, batches)
    yield {
        "case": f"sparsegpt 2:4, MiniLM, {len(plan.layers)} linears",
        "value": time.perf_counter() - begin,
        "unit": "s",
    }


def imports() -> Iterator[Case]:
    """Seconds that `import secateur` takes beyond `import torch`."""
    code = (
        "import time, torch; begin = time.perf_counter(); import secateur; "
        "print(time.perf_counter() - begin)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(5)
    ]
    yield {"case": "import secateur beyond torch", "value": median(runs), "unit": "s"}


def memory(folder: Path | None) -> Iterator[Case]:
    """Peak memory of `reconstruct_` above what the process held with the model loaded."""
    if folder is None or not folder.is_dir():
        print(f"skipped: memory: there is no model folder {folder}")
        return
    code = "import sys, pathlib, bench.run.front as it; it.peak(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder)]
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    added, block, activations = map(float, found.stdout.split()[-3:])
    yield {"case": "reconstruct_ peak memory beyond the model", "value": added, "unit": "MiB"}
    yield {"case": "two blocks of that model", "value": 2 * block, "unit": "MiB"}
    yield {"case": "calibration activations of one block", "value": activations, "unit": "MiB"}


def peak(folder: Path, rows: int = 32, batch: int = 4) -> None:
    """Print what `reconstruct_` adds to the peak, a block's weights and the activations, in MiB."""
    model = load_folder(folder, torch.float32)
    tokens = f"{folder / 'tokens.safetensors'}:calibration"
    batches = token_rows(tokens, rows, batch, end_of_text(folder))
    with torch.no_grad():
        model(batches[0])  # what one forward pass of a batch needs is not the library's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _status("VmRSS")
    sc.reconstruct_(model, sc.plan(model, "2:4"), sc.sparsegpt, batches)
    after = _status("VmHWM")
    layers = select(model).layers
    blocks = max(int(name.split(".")[2]) for name in layers) + 1
    weights = sum(layer.weight.nbytes for layer in layers.values()) / blocks
    width = model.config.hidden_size
    activations = rows * batches[0].shape[1] * width * 4
    print((after - before) / 1024, weights / MIB, activations / MIB)


def _status(field: str) -> int:
    """KiB of this process in /proc/self/status: VmRSS is held now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _seconds(call: Callable[[], object], rounds: int = 7) -> float:
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)


def main() -> None:
    parser = parser_of("front", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/reference-lm"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for cases in (masks(), sparsegpt(), imports(), memory(options.model)):
        for row in cases:
            print(f"{row['case']}: {row['value']:.3f} {row['unit']}", flush=True)
            rows.append(row)
    append(options.output, "front", rows, "cpu")


if __name__ == "__main__":
    main()
