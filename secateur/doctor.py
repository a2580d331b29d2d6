"""`doctor`: what this machine offers, and which implementation of each format can run on it."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from secateur.formats.format import FOLDERS, Format

STATES = ("yes", "no", "info")
OPTIONAL = {  # module to look for -> what it would give; looked up, never imported
    "triton": "block-sparse and quantising kernels on a GPU",
    "cuda.bindings.nvrtc": "compiling the CUDA kernels at first use",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination: a capability, yes, no or info, and the detail."""

    capability: str
    state: str
    detail: str


def doctor() -> list[Finding]:
    """What is here: torch, threads, GPU, optional packages, and each format's implementations.

    Nothing is compiled and no optional package is imported.
    """
    return [*_machine(), *_packages(), *_implementations(_device())]


def _machine() -> list[Finding]:
    cpu = torch.backends.cpu.get_cpu_capability()
    found = [
        Finding("torch", "info", torch.__version__),
        Finding("cpu", "info", f"{torch.get_num_threads()} threads, {cpu}"),
    ]
    if not torch.cuda.is_available():
        return [*found, Finding("cuda", "no", "torch sees no CUDA device: kernels run on the CPU")]
    major, minor = torch.cuda.get_device_capability()
    detail = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    return [*found, Finding("cuda", "yes", detail)]


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
    for name, folder in FOLDERS.items():
        format = Format(name, (4, 4) if name == "block" else ())
        packed = format.pack(torch.zeros(4, 4, device=device))
        for implementation in folder.IMPLEMENTATIONS:
            problem = implementation.why_not(packed, 1)
            state = "yes" if problem is None else "no"
            found.append(Finding(f"{name} {implementation.name}", state, problem or str(device)))
    return found


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
