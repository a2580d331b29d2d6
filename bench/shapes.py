"""Layer shapes of named models, as (out_features, in_features), and numbers of tokens."""

SHAPES: dict[str, tuple[int, int]] = {
    "Llama-2-7B attention": (4096, 4096),
    "Llama-2-7B gate, up": (11008, 4096),
    "Llama-2-7B down": (4096, 11008),
    "BERT-base attention": (768, 768),
    "BERT-base up": (3072, 768),
    "ViT-H up": (5120, 1280),
}

ON_CPU = ("Llama-2-7B attention", "Llama-2-7B gate, up")
TOKENS_ON_CPU = (1, 16, 128)
