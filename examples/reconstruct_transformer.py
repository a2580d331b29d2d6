"""SparseGPT against Wanda against magnitude on a small language model, at 2:4.

The model is a byte-level transformer, trained for a few seconds on the help texts that ship with
Python. `prune_` only zeroes weights; `reconstruct_` also moves the kept ones so that each layer's
outputs change least. All see the same calibration text; perplexity, per byte, is measured on text
that neither training nor calibration has seen. Runs on a CPU in seconds.
"""

import copy
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.model.evaluate import perplexity

WIDTH, HEADS, DEPTH, CONTEXT, STEPS = 64, 4, 2, 64, 300


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        return self.lm_head(self.norm(self.blocks(x)))


def main() -> None:
    torch.manual_seed(0)
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    rows = text.unfold(0, CONTEXT + 1, CONTEXT + 1)
    rows = rows[torch.randperm(len(rows))]
    test, calibration, train = rows[:256].split(32), rows[256:512, :-1].split(32), rows[512:]

    dense = ByteModel()
    optimizer = torch.optim.AdamW(dense.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.015, total_steps=STEPS)
    for _ in range(STEPS):
        ids = train[torch.randint(len(train), (16,))]
        loss = F.cross_entropy(dense(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    plan = sc.plan(dense, "2:4")  # the output head is left alone, as the plan says
    results = {"dense": perplexity(dense, test).perplexity}
    for method in (sc.magnitude, sc.wanda, sc.sparsegpt):
        model = copy.deepcopy(dense)
        verb = sc.reconstruct_ if method is sc.sparsegpt else sc.prune_
        report = verb(model, plan, method, calibration)
        results[method.__name__] = perplexity(model, test).perplexity
    print(plan, report, "perplexity per byte, 16,384 bytes:", sep="\n\n")
    print(" ".join(f"{name}={value:.3f}" for name, value in results.items()))


if __name__ == "__main__":
    main()
