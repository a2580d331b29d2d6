"""Layer shapes of named models, as (out_features, in_features), and numbers of tokens."""

SHAPES: dict[str, tuple[int, int]] = {
    "Llama-2-7B attention": (4096, 4096),
    "Llama-2-7B gate, up": (11008, 4096),
    "Llama-2-7B down": (4096, 11008),
    "BERT-base attention": (768, 768),
    "BERT-base up": (3072, 768),
    "ViT-H up": (5120, 1280),
    "Llama-3-8B qkv": (6144, 4096),
    "Llama-3-8B o": (4096, 4096),
    "Llama-3-8B gate_up": (28672, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-8B-FFN up": (14336, 4096),  # as one of two that train
    "Llama-3-8B-FFN down": (4096, 14336),
    "Llama-3-70B qkv": (10240, 8192),
    "Llama-3-70B o": (8192, 8192),
    "Llama-3-70B gate_up": (57344, 8192),
    "Llama-3-70B down": (8192, 28672),
    "Qwen2.5-7B qkv": (4608, 3584),
    "Qwen2.5-7B o": (3584, 3584),
    "Qwen2.5-7B gate_up": (37888, 3584),
    "Qwen2.5-7B down": (3584, 18944),
    "Gemma-2-9B qkv": (8192, 3584),
    "Gemma-2-9B o": (3584, 4096),
    "Gemma-2-9B gate_up": (28672, 3584),
    "Gemma-2-9B down": (3584, 14336),
    "SAM-ViT-h lin1": (5120, 1280),
    "SAM-ViT-h lin2": (1280, 5120),
    "ViT-L up": (4096, 1024),
    "ViT-L down": (1024, 4096),
}

ON_CPU = ("Llama-2-7B attention", "Llama-2-7B gate, up")
TOKENS_ON_CPU = (1, 16, 128)

ON_GPU = ("llama-3-8b", "llama-3-70b", "qwen2.5-7b", "gemma-2-9b", "sam-vit-h")
TOKENS_OF_DECODE = (1, 2, 4, 8, 16, 32, 64)
TOKENS_OF_PREFILL = (65, 128, 256, 512, 1024, 2048, 4096, 16384)


def layers_of(model: str) -> tuple[str, ...]:
    """The layers of a model of `ON_GPU`, or a layer by its own name.

    Raises: ValueError for any other name.
    """
    found = tuple(name for name in SHAPES if name.lower().startswith(f"{model.lower()} "))
    if not found and model not in SHAPES:
        raise ValueError(f"shapes are {', '.join(ON_GPU)} or the name of one layer, got {model!r}")
    return found or (model,)
