"""What pruning costs a real language model: every method on the same calibration rows, one run.

    python -m bench.run.accuracy ../shared/models/reference-lm --patterns 2:4 --rows 32,512

`--methods` chooses some, several `--rows` are cases of their own, and another `--seed` is another
choice of rows. Other libraries' methods are in `bench.lib.peer_methods`: one that is not installed,
or has no such pattern, has its reason in `note`, and so has one whose zeros do not fit the pattern.

The folder holds a causal language model and `tokens.safetensors` with rows of ids `calibration` and
`validation`, cut from documents laid end to end; rows are taken of as many documents as there are.
Every linear layer of the blocks is pruned; head, embeddings and norms stay dense. Columns: the
documents that calibration rows are of; nll and its difference to dense in nats a token on the
validation rows, KL(dense || pruned), top-1 agreement with dense, R_M and R_S = 1 - dnll /
dnll(magnitude | SparseGPT of the paper), where that method is among the chosen. R_KL, the same
share of kl, is in the tables.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import secateur as sc
from bench.lib.command import add_device, parser_of
from bench.lib.methods import METHODS, row_of
from bench.lib.paper import PAPER
from bench.lib.rows import append
from secateur.integrations.tokens import end_of_text, stored_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate


def measure(
    dense: nn.Module,
    pattern: str,
    methods: Sequence[str],
    calibration: Sequence[Tensor],
    validation: Sequence[Tensor],
) -> list[dict[str, str | float]]:
    """A row for dense and one for each method."""
    dense_nll = evaluate.perplexity(dense, validation).nll

    def figures(model: nn.Module) -> dict[str, float]:
        agreement = evaluate.compare(model, dense, validation)
        nll = evaluate.perplexity(model, validation).nll
        return {"nll": nll, "dnll": nll - dense_nll, "kl": agreement.kl, "top1": agreement.top1}

    plan = sc.plan(dense, pattern)
    rows: list[dict[str, str | float]] = [{"method": "dense", "nll": dense_nll, "dnll": 0.0}]
    rows += [row_of(name, dense, plan, calibration, figures) for name in methods]
    measured = [row for row in rows if "dnll" in row]
    loss = {row["method"]: float(row["dnll"]) for row in measured}
    for row in measured:
        for share, baseline in (("r_m", "magnitude"), ("r_s", PAPER)):
            known = baseline in loss
            row[share] = 1 - float(row["dnll"]) / loss[baseline] if known else ""
    return rows


def main() -> None:
    parser = parser_of("accuracy", __doc__)
    add_device(parser)
    parser.add_argument("model", type=Path)
    parser.add_argument("--patterns", default="2:4,4:8,unstructured:0.5@layer")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", default="128", help="calibration rows, such as 32,512")
    parser.add_argument("--seed", type=int, default=0, help="which calibration rows")
    parser.add_argument("--validation-rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()

    dense = load_folder(options.model, torch.float32).to(options.device)
    tokens, end = f"{options.model / 'tokens.safetensors'}:", end_of_text(options.model)

    def rows_of(key: str, rows: int, seed: int) -> tuple[list[Tensor], int]:
        """Batches on the device, and of how many documents they are."""
        dealt = stored_rows(tokens + key, rows, options.batch, end, seed)
        on_device = [ids.to(options.device) for ids in dealt.batches if isinstance(ids, Tensor)]
        return on_device, dealt.different

    validation, _ = rows_of("validation", options.validation_rows, 0)
    for rows, pattern in itertools.product(
        map(int, options.rows.split(",")), options.patterns.split(",")
    ):
        calibration, documents = rows_of("calibration", rows, options.seed)
        measured = measure(dense, pattern, options.methods, calibration, validation)
        shared = {
            "model": options.model.name,
            "pattern": pattern,
            "calibration_rows": rows,
            "seed": options.seed,
            "documents": documents,
            "validation_rows": options.validation_rows,
            "batch": options.batch,
        }
        append(options.output, "accuracy", [{**shared, **row} for row in measured], options.device)


if __name__ == "__main__":
    main()
