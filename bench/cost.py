"""What pruning a language model takes: seconds and memory of each method, at real sizes.

    python -m bench.cost --model llama-3-8b --methods sparsegpt alps
    python -m bench.cost --model llama-3-8b --methods alps --stream FOLDER

transformers' Llama at the model's sizes with random weights in bfloat16, and random tokens; every
linear layer of the blocks is made 2:4. Columns: seconds of the whole verb; announced, what `best`
and `thorough` say before that they will take; peak_gib, the most
memory allocated on the GPU while it ran, the model included; error, the mean share of the layers'
output energy that is lost, which on random weights says only that it ran. `--offload` keeps
activations on the host. `--stream` writes the dense model into that folder first and reconstructs
it from there into another one, a block at a time.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor, nn

import secateur as sc
from bench.rows import append
from secateur.files.stream import reconstruct_folder
from secateur.model.plan import match
from secateur.reconstruct import Blockwise, estimate

METHODS = {
    "sparsegpt": sc.sparsegpt,
    "refit(sparsegpt)": sc.refit(sc.sparsegpt),
    "alps": sc.alps,
    "best": sc.best,
    "thorough": sc.thorough,
}
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE = {  # where solving layers is most of the work
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
MODELS = {"llama-3-8b": LLAMA_3_8B, "wide": WIDE, "small": SMALL, "tiny": TINY}
STD = 0.02


def random_llama(sizes: dict[str, int | float], length: int, device: str) -> nn.Module:
    """The architecture with random weights from a fixed seed, norms at one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, max_position_embeddings=length, tie_word_embeddings=False)
    with torch.device(device):  # which initialises it too, faster than a CPU
        model: nn.Module = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, STD, generator=generator)
    return model.eval()


def tokens(vocabulary: int, rows: int, length: int, batch: int, device: str) -> list[Tensor]:
    """Random token ids in batches."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    return list(ids.to(device).split(batch))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="instead of all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["sparsegpt", "alps"])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--stream", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    options = parser.parse_args(words)

    sizes = dict(MODELS[options.model])
    sizes["num_hidden_layers"] = options.blocks or sizes["num_hidden_layers"]
    data = (int(sizes["vocab_size"]), options.rows, options.length, options.batch)
    for method in options.methods:
        model = random_llama(sizes, options.length, options.device)
        model.to(getattr(torch, options.dtype))
        plan = sc.plan(model, "2:4")
        if options.stream is not None:
            model.save_pretrained(options.stream)  # type: ignore[operator]
            del model
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        announced: float | str = ""
        algorithm = METHODS[method]
        if isinstance(algorithm, Blockwise) and options.stream is None:
            layers, batches = match(model, plan), tokens(*data, options.device)
            announced = estimate(model, layers, plan.layers, batches, algorithm).seconds
        begin = perf_counter()
        if options.stream is None:
            batches = tokens(*data, options.device)
            report = sc.reconstruct_(model, plan, METHODS[method], batches, offload=options.offload)
        else:
            target = options.stream.with_name(f"{options.stream.name}-sparse")
            batches = tokens(*data, "cpu")
            report = reconstruct_folder(
                options.stream, target, plan, METHODS[method], batches, device=options.device
            )
            shutil.rmtree(target)
        seconds = perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else ""
        row = {
            "model": options.model,
            "blocks": sizes["num_hidden_layers"],
            "layers": len(report.layers),
            "rows": options.rows,
            "length": options.length,
            "batch": options.batch,
            "offload": options.offload,
            "streamed": options.stream is not None,
            "method": method,
            "dtype": options.dtype,
            "announced": announced,
            "seconds": seconds,
            "peak_gib": peak,
            "error": fmean(layer.error or 0.0 for layer in report.layers),
        }
        append(options.output, "cost", [row], options.device)
        print(f"{method}: {seconds:.1f} s, {peak} GiB", flush=True)


if __name__ == "__main__":
    main()
