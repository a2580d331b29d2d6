"""Which tools secateur works with, each row with the test that says so, or with why there is none.

To add a row: a `Row` with the id of its test. Where it runs is read from the test's own marks. A
row without a test says in `untested` why nobody has run it.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from bench.tables.markdown import table

ROOT = Path(__file__).parents[2]
PACKED = "tests/integrations/test_transformers_quantizer.py"
COMPILED = "tests/formats/test_compile.py::test_in_a_plain_process"
ON_GPU = "tests/formats/test_compile.py::test_on_a_gpu_in_a_plain_process"
PEFT = "tests/integrations/test_peft.py"
STEPS = "tests/train/test_steps.py"


@dataclass(frozen=True)
class Row:
    """What works with a tool (`does`), or does not, and the test that holds it.

    `unrun` is for a test that is written and waits for a machine that can run it.
    """

    tool: str
    does: str
    test: str = ""
    untested: str = ""
    unrun: str = ""


ROWS = (
    Row("transformers", "reads folders that are dense with zeros, without secateur",
        "tests/files/test_save.py::test_a_dense_transformers_folder_is_stock"),
    Row("transformers", "`from_pretrained`, `save_pretrained` of packed folders, every format",
        f"{PACKED}::test_a_packed_model_comes_back_to_the_bit_or_not_at_all"),
    Row("transformers", "shards of packed folders",
        f"{PACKED}::test_of_a_folder_that_sc_save_wrote_shards_are_read_too"),
    Row("transformers", "`generate`, `pipeline` with packed models",
        f"{PACKED}::test_generation_and_pipelines_take_it_as_they_take_the_dense_model"),
    Row("transformers", "`generate(custom_generate=...)`, this library's loop",
        "tests/llm/test_custom_generate.py::test_ids_are_those_of_transformers_own_loop"),
    Row("transformers", "tensor parallelism of packed layers: refused",
        f"{PACKED}::test_tensor_parallelism_is_refused"),
    Row("transformers", "packed models over several GPUs (`device_map`)",
        untested="takes several GPUs"),
    Row("transformers", "its oldest supported version, 5.15: these tests and those of generation",
        f"{PACKED}::test_a_packed_model_comes_back_to_the_bit_or_not_at_all"),
    Row("PEFT", "LoRA trained beside zeros and on packed layers",
        f"{PEFT}::test_lora_trains_beside_zeros"),
    Row("PEFT", "pruning leaves adapters of every method alone",
        f"{PEFT}::test_pruning_leaves_the_adapters_of_every_method_alone"),
    Row("PEFT", "`merge_adapters_` keeps zeros",
        f"{PEFT}::test_merging_is_the_merge_of_peft_with_zeros_kept"),
    Row("Trainer of transformers", "`SecateurCallback` holds zeros and resumes",
        "tests/integrations/test_trainer.py"
        "::test_a_training_that_resumes_equals_one_that_did_not_stop"),
    Row("accelerate", "its wrapped optimizers hold zeros",
        f"{STEPS}::test_accelerate_hands_on_to_the_optimizer_that_is_held"),
    Row("PyTorch's optimizers", "all of them hold zeros, closures included",
        f"{STEPS}::test_training_is_that_of_a_model_whose_forward_has_the_mask"),
    Row("PyTorch's GradScaler", "steps that it skips are not counted",
        f"{STEPS}::test_a_step_that_a_grad_scaler_skips_is_not_counted"),
    Row("FSDP2", "sharded weights are held",
        "tests/train/test_hold.py::test_sharded_weights_are_held_each_process_its_part"),
    Row("FSDP1, DeepSpeed", "refused by name",
        "tests/train/test_hold.py::test_trainers_that_flatten_parameters_are_refused_by_name"),
    Row("Lightning", "`SecateurCallback` holds zeros and resumes",
        "tests/integrations/test_lightning.py"
        "::test_a_training_that_resumes_equals_one_that_did_not_stop"),
    Row("torchrun", "processes calibrate together",
        "tests/model/test_distributed.py::test_two_processes_end_with_the_model_of_one"),
    Row("DataLoader", "batches of images and labels calibrate",
        "tests/model/test_calibrate.py::test_class_numbers_are_no_mask"),
    Row("lm-eval", "`secateur eval --tasks`, with the perplexity of `secateur eval`",
        "tests/integrations/test_lm_eval.py::test_its_perplexity_is_ours"),
    Row("torch.compile", "packed layers of every format in one graph", f"{COMPILED}[fullgraph]"),
    Row("torch.compile", "a whole Llama of packed layers in one graph",
        f"{COMPILED}[a_whole_llama]"),
    Row("torch.compile", "the same on a GPU, by its default compiler",
        f"{ON_GPU}[a_whole_llama_on_a_gpu]"),
    Row("torch.compile", "the decode kernels on a GPU", f"{ON_GPU}[decode_on_a_gpu]"),
    Row("torch.compile", "layers of blocks on a GPU, and their training",
        f"{ON_GPU}[blocks_on_a_gpu]", unrun="waits for a GPU"),
    Row("torch.export", "packed layers of every format, any number of tokens",
        f"{COMPILED}[export]"),
    Row("AOTInductor", "packed layers of every format, any number of tokens, on a CPU",
        f"{COMPILED}[aot_inductor]"),
    Row("AOTInductor", "the same on a GPU", f"{ON_GPU}[aot_inductor_on_a_gpu]",
        unrun="waits for a GPU with a later torch than 2.11"),
    Row("AOTInductor", "packages of packed layers with torch 2.11",
        untested="torch's loader ends the process by a segmentation fault"),
    Row("ONNX", "dense models with zeros, run by ONNX Runtime",
        "tests/test_export.py::test_onnx_runtime_gives_the_outputs_of_the_model"),
    Row("ONNX", "packed layers: refused, with the remedy", f"{COMPILED}[onnx_is_refused]"),
    Row("Jupyter", "reports as tables, progress as a bar",
        "tests/core/test_shown.py"
        "::test_in_a_notebook_a_report_is_a_table_and_progress_a_bar"),
    Row("torchao.sparsity, torch.ao.pruning", "their names, in `secateur.compat.torchao`",
        "tests/compat/torchao/test_core.py::test_whole_channels_go_alike"),
    Row("GGUF files", "refused, with what to take instead",
        "tests/cli/test_console.py::test_a_gguf_file_says_what_to_take_instead"),
    Row("Clients of OpenAI's API", "`secateur serve`: completions, chats and streams, on a CPU",
        "tests/cli/test_serve.py::test_a_folder_answers_as_generate_does"),
    Row("Clients of OpenAI's API", "malformed requests are answered, clients that leave dropped",
        "tests/llm/test_server.py::test_a_client_that_goes_away_is_dropped"),
    Row("Clients of OpenAI's API", "`secateur serve` on a GPU", untested="waits for a GPU"),
    Row("transformers serve", "packed folders", untested="tried by hand: guide/serve.md"),
    Row("vLLM 0.33", "the plug-in has the signatures that vLLM calls, and cuts layers as it does",
        "tests/integrations/test_vllm_plugin.py::test_signatures_are_those_that_vllm_calls"),
    Row("vLLM 0.33", "packed folders inside vLLM", untested="takes a GPU"),
    Row("SGLang", "packed folders", untested="no plug-in for it yet"),
)  # fmt: skip


def support(results: Path, rows: tuple[Row, ...] = ROWS, root: Path = ROOT) -> str:
    """The table of `docs/support.md`; `results` has no part in it.

    Raises: ValueError for a row that names no test that exists, or says nothing in its place.
    """
    lines = [(row.tool, row.does, how(row, root), f"`{row.test}`" if row.test else "-")
             for row in rows]  # fmt: skip
    return table(("tool", "what works", "how tested", "test"), lines) + "\n"


def how(row: Row, root: Path = ROOT) -> str:
    """Where the row's test runs, by its marks; or that it did not run.

    Raises: ValueError as `support`.
    """
    if bool(row.test) == bool(row.untested):
        raise ValueError(f"{row.tool}, {row.does}: needs a test, or why there is none")
    if row.untested:
        return f"**not run**: {row.untested}"
    marks = marks_of(row.test, root)
    where = "`make test-gpu`" if "gpu" in marks else "CI"
    where = "`make test-slow`" if "slow" in marks else where
    if row.unrun:
        return f"{where}, **not run yet**: {row.unrun}"
    pinned = root / "constraints.txt"
    in_ci = pinned.read_text(encoding="utf-8").lower() if pinned.is_file() else ""
    needs = [mark.removeprefix("needs ").replace("_", "-") for mark in marks if " " in mark]
    absent = next((name for name in needs if f"\n{name}==" not in in_ci), "")
    return f"by hand: CI has no {absent}" if absent else where


def marks_of(test: str, root: Path) -> set[str]:
    """The marks of a test, and `needs NAME` for each package without which it skips.

    Raises: ValueError if there is no such test, or no such case of it.
    """
    file, _, name = test.partition("::")
    name, _, case = name.rstrip("]").partition("[")
    path = root / file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = [n for n in ast.walk(ast.parse(text)) if getattr(n, "name", "") == name]
    cased = not case or re.search(rf"\bcheck_{case}\b", text)
    if not found or not cased:
        raise ValueError(f"there is no test {test}")
    (function,) = found
    assert isinstance(function, ast.FunctionDef)
    above = " ".join(map(ast.unparse, function.decorator_list))
    marks = set(re.findall(r"pytest\.mark\.(\w+)", above))
    skips = re.findall(r"importorskip\('(\w+)'", ast.unparse(function))
    return marks | {f"needs {package}" for package in skips}
