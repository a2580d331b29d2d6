"""`doctor`: what this machine offers, and which implementation of each format can run on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from secateur.formats.contract import Format, Implementation, Packed
from secateur.formats.format import FORMATS
from secateur.formats.kernels import simd

STATES = ("yes", "no", "info")
TOKENS = (1, 4096)  # generating text, and reading a prompt or a batch of images
SHAPE = (256, 256)  # whole tiles of every implementation
ASKED = (torch.bfloat16, torch.float16, torch.float32)
OPTIONAL = {  # module to look for -> what it would give; looked up, never imported
    "triton": "block-sparse and quantising kernels on a GPU",
    "cuda.bindings.nvrtc": "compiling the CUDA kernels at first use",
}
# Extras of the package -> the module by which it is missed, and what it is for.
EXTRAS = {
    "hf": ("transformers", "models in Hugging Face folders"),
    "report": ("matplotlib", "pages of results"),
    "budget": ("scipy", "budgets of size and time"),
    "serve": ("uvicorn", "answers over HTTP"),
    "eval": ("lm_eval", "the tasks of lm-eval"),
    "vllm": ("vllm", "packed folders in vLLM"),
    "cuda": ("cuda.bindings.nvrtc", "the kernels for a GPU"),
}
FOR_A_GPU = ("cuda", "vllm")


@dataclass(frozen=True)
class Finding:
    """One line of the examination: a capability, yes, no or info, and the detail."""

    capability: str
    state: str
    detail: str


def doctor() -> list[Finding]:
    """What is here: torch, threads, GPU, optional packages, and each format's implementations.

    Of an implementation: whether it can run a layer of a usual size at 1 and at 4096 tokens, and in
    which dtypes. Whether it is faster than dense is for `accelerate_` to measure.

    Nothing is compiled and no optional package is imported.
    """
    return [*_machine(), *_packages(), *_implementations(_device())]


def digest(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """The four lines that matter first: machine, what it multiplies, what not, what to install."""
    told = {finding.capability: finding for finding in findings}
    gpu = told["cuda"]
    machine = f"torch {told['torch'].detail}; a CPU with {told['cpu'].detail}; "
    machine += gpu.detail if gpu.state == "yes" else "no CUDA GPU"
    able, unable = _by_format(findings)
    wanted = [format.prune_to for format in FORMATS if format.prune_to and str(format) in able]
    here = f"{', '.join(able) or 'nothing'}"
    if wanted:
        here += f"; prune to {' or '.join(wanted)}, and `secateur bench FOLDER` measures what gains"
    reasons: dict[str, list[str]] = {}
    for format, reason in unable.items():
        reasons.setdefault(reason, []).append(format)
    elsewhere = "; ".join(f"{', '.join(formats)}: {why}" for why, formats in reasons.items())
    missing = [
        f"pip install 'secateur[{extra}]' for {purpose}"
        for extra, (module, purpose) in EXTRAS.items()
        if not _installed(module) and (extra not in FOR_A_GPU or gpu.state == "yes")
    ]
    return [
        ("this machine", machine),
        ("sparse here", here),
        ("not here", elsewhere or "nothing: every format has something that runs it"),
        (
            "to install",
            "; ".join(missing) or "nothing: all extras that this machine can use are here",
        ),
    ]


def _by_format(findings: Sequence[Finding]) -> tuple[list[str], dict[str, str]]:
    """Formats that more than a reference multiplies here, and why the others have nothing."""
    rows: dict[str, list[Finding]] = {str(format): [] for format in FORMATS}
    for finding in findings:
        format, _, implementation = finding.capability.rpartition(" ")
        if format in rows and implementation != "reference":
            rows[format].append(finding)
    able, unable = list[str](), dict[str, str]()
    for format, found in rows.items():
        runs = [one for one in found if one.state == "yes"]
        if runs:
            able.append(format)
        elif format.partition(":")[0] not in unable:  # as the same format with other options
            unable[format] = found[0].detail if found else "it saves room, and is fast nowhere yet"
    return able, unable


def _machine() -> list[Finding]:
    cpu = torch.backends.cpu.get_cpu_capability()
    found = [
        Finding("torch", "info", torch.__version__),
        Finding("cpu", "info", f"{torch.get_num_threads()} threads, {cpu}"),
        _cpu_kernels(),
    ]
    if not torch.cuda.is_available():
        return [*found, Finding("cuda", "no", "torch sees no CUDA device: layers run on the CPU")]
    major, minor = torch.cuda.get_device_capability()
    detail = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    return [*found, Finding("cuda", "yes", detail)]


def _cpu_kernels() -> Finding:
    missing = simd.why_not()
    name = "cpu kernels"
    if missing is not None:
        return Finding(name, "no", missing)
    others = ", ".join(body for body in simd.bodies() if body != simd.body())
    return Finding(
        name, "yes", f"the {simd.body()} body runs; {simd.CHOICE} can name {others}, too"
    )


def _packages() -> list[Finding]:
    found = [
        Finding(name, "yes" if _installed(name) else "no", f"for {purpose}")
        for name, purpose in OPTIONAL.items()
    ]
    cusparselt = torch.backends.cusparselt.is_available()
    return [
        *found,
        Finding("cusparselt", "yes" if cusparselt else "no", "for 2:4 at many tokens on a GPU"),
    ]


def _implementations(device: torch.device) -> list[Finding]:
    found = list[Finding]()
    dtypes = ASKED if device.type == "cuda" else ASKED[::-1]
    for format in FORMATS:
        dense = (torch.zeros(SHAPE, dtype=dtype, device=device) for dtype in dtypes)
        packed = [format.pack(weight) for weight in dense]
        for implementation in format.implementations:
            found.append(_examined(format, implementation, packed, device))
    return found


def _examined(
    format: Format, implementation: Implementation, packed: Sequence[Packed], device: torch.device
) -> Finding:
    """At which numbers of tokens, and in which dtypes, it can run a layer of a usual size."""
    name = f"{format} {implementation.name}"
    problems = {
        tokens: [implementation.why_not(one, tokens) for one in packed] for tokens in TOKENS
    }
    if all(all(found) for found in problems.values()):
        reasons = [str(no) for no in problems[TOKENS[0]]]
        # one that holds for a dtype that it takes is what is really in the way
        other = (no for one, no in zip(packed, reasons, strict=True) if str(one.dtype) not in no)
        return Finding(name, "no", next(other, reasons[0]))
    said = dict[str, list[str]]()
    for tokens, found in problems.items():
        runs = [_short(one.dtype) for one, no in zip(packed, found, strict=True) if no is None]
        answer = f"in {', '.join(runs)}"
        if not runs:  # in a dtype that other numbers of tokens can have
            others = zip(found, *problems.values(), strict=True)
            answer = f"not: {next(no for no, *all_of in others if None in all_of)}"
        said.setdefault(answer, []).append(str(tokens))
    answers = "; ".join(
        f"at {' and '.join(counts)} token{'s' * (counts != ['1'])} {answer}"
        for answer, counts in said.items()
    )
    return Finding(name, "yes", f"{device.type}, {answers}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _installed(name: str) -> bool:
    """Whether a module could be imported; a missing parent package counts as no."""
    parent = name.partition(".")[0]
    return find_spec(parent) is not None and (parent == name or _has_child(name))


def _has_child(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
