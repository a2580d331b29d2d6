"""A child that does as it is told; it imports no torch, so that it starts at once."""

import ctypes
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[3] / "secateur/formats/kernels/isolated.py"


def isolated() -> Any:
    spec = importlib.util.spec_from_file_location("isolated", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["isolated"] = module
    spec.loader.exec_module(module)
    return module


def main(*words: str) -> None:
    module = isolated()
    if "brief" in words:
        module.IDLE_SECONDS = 0.2

    def prepare() -> dict[str, Any]:
        if "unable" in words:
            raise RuntimeError("no GPU for it\nand a trace")
        if "mute" in words:
            time.sleep(600)
        return {"pid": os.getpid(), "words": list(words), "variable": os.environ.get("A_VARIABLE")}

    def answer(request: dict[str, Any], say: Any, journal: Any) -> None:
        print("a library prints this")
        for attempt, act in request["acts"]:
            if attempt is None:
                do(act, say, module, journal)
                continue
            with journal.trying(attempt):
                do(act, say, module, journal)
            say({"tried": attempt})

    module.serve(prepare, answer)


def do(act: str, say: Any, module: Any, journal: Any) -> None:
    if act.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, act))
        time.sleep(60)
    elif act == "hang":
        time.sleep(600)
    elif act == "hang in C":  # and hold the lock that all Python waits for
        say({"hangs": True})
        ctypes.PyDLL(None).sleep(600)
    elif act == "exit":
        print("the last words", file=sys.stderr, flush=True)
        os._exit(3)
    elif act == "fail":
        raise OSError("No space left on device\nand more")
    elif act == "alive":
        for _ in range(4):
            time.sleep(0.5)
            journal.alive()
            say({"alive": True})
    elif act == "lost":
        raise module.Lost("CUDA error: an illegal instruction was encountered")
    elif act == "journal":
        say({"journal": module.in_flight(journal.path)})
    elif act == "babble":
        os.write(1, b"no row\n")
