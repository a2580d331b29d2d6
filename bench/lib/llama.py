"""transformers' Llama at named sizes, with random weights and random tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import secateur as sc

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
LLAMA_02B = {  # four blocks of TinyLlama's sizes and a small vocabulary: 0.21e9 parameters
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
REFERENCE_LM = {  # the small language model whose losses are measured: 0.03e9 parameters
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MODELS = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-0.2b": LLAMA_02B,
    "reference-lm": REFERENCE_LM,
    "wide": WIDE,
    "small": SMALL,
    "tiny": TINY,
}
STD = 0.02
BLOCKS = "model.layers."  # where transformers' Llama has them
DENSE = "dense"  # a configuration that packs nothing
FORMATS = ("semi24", "semi24_int4", "semi24_int8", "semi24_fp8")
WITHOUT_ZEROS = ("int8", "int4")
BLOCKS_OF_64 = "block:64x64"


def random_llama(
    sizes: dict[str, int | float], length: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """The architecture with random weights from a fixed seed, norms at one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, max_position_embeddings=length, tie_word_embeddings=False)
    with torch.device(device):  # which initialises it too, faster than a CPU
        model: nn.Module = LlamaForCausalLM._from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, STD, generator=generator)
    return model.eval()


@torch.no_grad()
def make_sparse(model: nn.Module, names: Iterable[str], format: str) -> None:
    """Prune these linear layers by magnitude to what the format stores, one at a time.

    80 % of blocks, or 2:4.
    """
    pattern = sc.Block(64, 64, 0.8) if format == BLOCKS_OF_64 else sc.NM(2, 4)
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        weight.mul_(pattern.mask(weight.abs().float()))


def tokens(vocabulary: int, rows: int, length: int, batch: int, device: str) -> list[Tensor]:
    """Random token ids in batches."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    return list(ids.to(device).split(batch))
