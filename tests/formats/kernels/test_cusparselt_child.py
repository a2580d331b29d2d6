"""A search in a child process: what crashes there is dropped, remembered, and hurts nobody."""

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.accelerate.candidates import PASSING, failure
from secateur.formats.kernels import cusparselt, cusparselt_child, cusparselt_settings, isolated
from secateur.formats.kernels.cusparselt import SearchCase, Setting, compress
from secateur.formats.kernels.cusparselt_child import (
    NoSearch,
    one_child,
    random_weight,
    searched,
)
from secateur.formats.kernels.cusparselt_search import Past
from secateur.formats.kernels.cusparselt_settings import (
    chosen,
    product,
    remember,
    search_isolated,
    setting_for,
)
from secateur.formats.kernels.nvrtc import nvrtc_version
from tests.formats.kernels.fake_cusparselt import Fake, forget, install
from tests.formats.kernels.faulty_child import VARIABLE

CPU = torch.device("cpu")
OUT, WIDTH = 32, 64
LIBRARY = "A GPU, 132 SMs, cuSPARSELt 702"
US = {f"{number},1,-1": 10.0 + number for number in range(6)}
ILLEGAL = "CUDA error: an illegal instruction was encountered"


@dataclass
class Library:
    """The fake library as children have it; `tell` says which faults, `tried` what they ran."""

    folder: Path

    def tell(self, **told: Any) -> None:
        notes = self.folder / "notes"
        notes.write_text("")
        everything = {"us": US, "notes": str(notes), "cache": str(self.folder / "cache"), **told}
        (self.folder / "told.json").write_text(json.dumps(everything))
        cusparselt_child.end_child()  # one that runs was told something else

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Setting and process of each call."""
        lines = (self.folder / "notes").read_text().splitlines()
        return [(line.split()[0], line.split()[1]) for line in lines]

    @property
    def tried(self) -> set[str]:
        return {setting for setting, _ in self.calls}

    @property
    def crashed(self) -> dict[str, str]:
        """What the file of crashes has for this chip and version, dtypes together."""
        table = json.loads((self.folder / "cache" / "cusparselt-crashed.json").read_text())
        assert list(table) == [LIBRARY]
        return {key: text for kind in table[LIBRARY].values() for key, text in kind.items()}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Library]:
    """This process runs the library's algorithm without faults, its children what they are told."""
    install(monkeypatch, tmp_path / "cache", Fake({}), isolated=True)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "told.json"))
    monkeypatch.setattr(cusparselt_child, "MODULE", "tests.formats.kernels.faulty_child")
    found = Library(tmp_path)
    found.tell()
    yield found
    cusparselt_child.end_child()
    forget()


def case_in(
    dtype: torch.dtype = torch.bfloat16, tokens: int = 128, bias: torch.dtype | None = None
) -> SearchCase:
    return SearchCase(dtype, dtype, OUT, WIDTH, tokens, bias, False)


# ---- what crashes -------------------------------------------------------------------------------


def test_the_best_of_what_survives_is_found(
    library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In one search: two signals, a lost GPU, one that hangs, one that is wrong, one refused."""
    monkeypatch.setattr(cusparselt_child, "ATTEMPT_SECONDS", 3.0)
    us = {f"{number},1,-1": 1.0 + number for number in range(8)}
    faults = {"0,1,-1": "SIGILL", "1,1,-1": "SIGSEGV", "2,1,-1": "hang", "3,1,-1": "lost"}
    library.tell(us=us, faults={**faults, "5,1,-1": "raise"}, wrong=["4,1,-1"])
    state, pid = torch.get_rng_state(), os.getpid()
    assert setting_for(case_in(), CPU) == Setting(6)
    assert torch.equal(torch.get_rng_state(), state) and os.getpid() == pid
    found = {
        "0,1,-1": "0,1,-1: SIGILL",
        "1,1,-1": "1,1,-1: SIGSEGV",
        "2,1,-1": "2,1,-1: it took more than 3 s",
        "3,1,-1": f"3,1,-1: {ILLEGAL}",
    }
    assert library.crashed == found
    calls = library.calls
    assert len({process for _, process in calls}) == 5 and str(pid) not in dict(calls).values()
    for crashed in found:  # once, and the next child began behind it
        assert len([setting for setting, _ in calls if setting == crashed]) == 1
    assert len({process for setting, process in calls if setting == "4,1,-1"}) == 1
    # another search, in a new process, of a like product; and the file of settings lost
    library.tell(us=us, faults=faults)
    (tmp_path / "cache" / "cusparselt.json").unlink()
    forget()
    assert setting_for(case_in(), CPU) == Setting(4)
    assert setting_for(case_in(tokens=16, bias=torch.bfloat16), CPU) == Setting(4)
    assert not library.tried & found.keys() and library.crashed == found
    assert not list((tmp_path / "cache" / "cusparselt-trying").iterdir())


def test_what_is_known_before_a_crash_is_not_measured_again(library: Library) -> None:
    library.tell(faults={"3,1,-1": "SIGABRT"}, wrong=["1,1,-1"])
    found = search_isolated(case_in(), CPU)
    assert (found.setting, found.us) == (Setting(0), 10.0)
    assert found.dropped[Setting(3)] == "ended the process that tried it: SIGABRT"
    assert found.dropped[Setting(1)].startswith("wrong by ")
    assert "not supported" in found.dropped[Setting(6)]
    first = library.calls[0][1]
    assert [setting for setting, process in library.calls if process == first][-1] == "3,1,-1"
    later = [setting for setting, process in library.calls if process != first]
    assert "1,1,-1" not in later and {"4,1,-1", "0,2,1"} < set(later)
    assert later.count("2,1,-1") == 1 < later.count("4,1,-1")  # in turns with the others


def test_refusals_are_counted_over_a_crash(library: Library) -> None:
    """Four of them ended the search for algorithms, which the next child does not take up again."""
    us = {"0,1,-1": 5.0, "0,2,1": 1.0}
    library.tell(us=us, faults={"0,2,1": "SIGILL"})
    assert setting_for(case_in(), CPU) == Setting(0)
    whole = [setting for setting, _ in library.calls if setting.endswith(",1,-1")]
    assert set(whole) == {f"{number},1,-1" for number in range(5)}
    assert [whole.count(f"{number},1,-1") for number in range(1, 5)] == [1] * 4


def test_without_one_that_survives_it_is_an_error(library: Library) -> None:
    library.tell(us={"0,1,-1": 5.0}, faults={"0,1,-1": "SIGILL"})
    with pytest.raises(RuntimeError, match=r"got none of 5: .*ended the process that tried it: S"):
        setting_for(case_in(), CPU)
    assert chosen(case_in(), CPU) is None


def test_one_that_crashes_only_when_it_is_timed_in_turns_is_found(library: Library) -> None:
    us = {**US, "2,1,-1": 1.0, "4,1,-1": 2.0}
    library.tell(us=us, **{"finally": {"2,1,-1": "SIGFPE"}})
    assert setting_for(case_in(), CPU) == Setting(4)
    assert library.crashed == {"2,1,-1": "2,1,-1: SIGFPE"}
    assert len({process for _, process in library.calls}) == 3  # in turns, alone, the rest


def test_a_crash_holds_for_all_products_of_its_dtypes(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was chosen for another is no longer run, and is searched again."""
    remember(case_in(tokens=64), CPU, Setting(1))
    remember(case_in(torch.float16), CPU, Setting(1))
    library.tell(faults={"1,1,-1": "SIGILL"})
    assert setting_for(case_in(), CPU) == Setting(0)
    assert chosen(case_in(tokens=64), CPU) is None
    assert chosen(case_in(torch.float16), CPU) == Setting(1)
    forget()
    assert chosen(case_in(tokens=64), CPU) is None  # read from the disk
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 803)
    forget()
    remember(case_in(tokens=64), CPU, Setting(1))
    assert chosen(case_in(tokens=64), CPU) == Setting(1)  # of another version nothing is known


def test_what_ended_with_its_parent_is_not_tried_again(library: Library, tmp_path: Path) -> None:
    journals = tmp_path / "cache" / "cusparselt-trying"
    journals.mkdir(parents=True)
    title = json.dumps([LIBRARY, "bfloat16"])
    texts = [f"{title}\n0,1,-1\n", f"{title}\n1,1,-1;2,1,-1\n", "no title\n3,1,-1\n"]
    texts += [f"{title}\nno setting\n"]
    old = time.time() - 2 * isolated.LEFT_OVER_SECONDS
    for number, text in enumerate(texts):
        path = journals / f"{number}.journal"
        path.write_text(text)
        os.utime(path, (old, old))
    assert setting_for(case_in(), CPU) == Setting(1)
    assert "0,1,-1" not in library.tried
    assert library.crashed == {"0,1,-1": f"0,1,-1: {cusparselt_settings.LEFT_OVER}"}
    assert not list(journals.iterdir())


def test_a_broken_file_of_crashes_is_named(library: Library, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "cusparselt-crashed.json"
    file.parent.mkdir()
    file.write_text(json.dumps({LIBRARY: {"bfloat16": {"0,1,-1": "SIGILL"}}}))
    with pytest.raises(ValueError, match=r"crashed\.json needs to be a table of cuSPARSELt sett"):
        setting_for(case_in(), CPU)


def test_crashes_that_cannot_be_written_are_remembered_until_the_end(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library.tell(faults={"0,1,-1": "SIGILL"})
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert setting_for(case_in(), CPU) == Setting(1)
    library.tell(faults={"0,1,-1": "SIGILL"})
    assert setting_for(case_in(tokens=16), CPU) == Setting(1)
    assert "0,1,-1" not in library.tried


# ---- no search ----------------------------------------------------------------------------------


def test_without_a_child_torch_s_own_algorithm_runs_and_nothing_is_kept(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.tell(**{"at the start": "no torch here"})
    with pytest.warns(
        RuntimeWarning,
        match=r"torch's own algorithm 0, .*: cuSPARSELt's algorithms are searched in a process of "
        r"its own, but a process that was started did not get ready: exit code 1, no torch here: "
        r"call accelerate_ or warmup",
    ):
        assert setting_for(case_in(), CPU) == Setting(0)
    started: list[object] = []
    monkeypatch.setattr(cusparselt_child, "Child", started.append)
    assert setting_for(case_in(), CPU) == Setting(0)  # and the warning came once
    assert setting_for(case_in(tokens=16), CPU) == Setting(0)
    assert started == [] and chosen(case_in(), CPU) is None
    assert not (tmp_path / "cache" / "cusparselt.json").exists()
    with pytest.raises(NoSearch, match="not get ready"), one_child():
        setting_for(case_in(), CPU)


def test_torch_s_own_algorithm_is_no_default_where_it_crashed(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.tell(faults={"0,1,-1": "SIGILL"})
    assert setting_for(case_in(), CPU) == Setting(1)
    library.tell(**{"at the start": "no torch here"})
    with pytest.raises(NoSearch, match="no torch here"):
        setting_for(case_in(tokens=16), CPU)


@pytest.mark.parametrize("fault", ["no room", "no room in torch"])
def test_a_full_gpu_is_no_crash(library: Library, fault: str) -> None:
    every = dict.fromkeys(US, fault)
    library.tell(faults=every)
    with pytest.warns(RuntimeWarning, match="a search for bfloat16 32x64 needs room on the GPU"):
        assert setting_for(case_in(), CPU) == Setting(0)
    assert not (library.folder / "cache" / "cusparselt-crashed.json").exists()
    assert len({process for _, process in library.calls}) == 1  # it could go on


def test_one_without_room_is_dropped_alone(library: Library) -> None:
    library.tell(faults={"0,1,-1": "no room in torch"})
    found = search_isolated(case_in(), CPU)
    assert found.setting == Setting(1)
    assert found.dropped[Setting(0)].startswith("ran out of memory: CUDA out of memory")


def test_a_child_that_is_ended_from_outside_is_no_crash(library: Library) -> None:
    library.tell(faults={"2,1,-1": "SIGKILL"})
    with pytest.warns(RuntimeWarning, match="the process that searched was ended: SIGKILL"):
        assert setting_for(case_in(), CPU) == Setting(0)
    assert not (library.folder / "cache" / "cusparselt-crashed.json").exists()


def test_a_library_of_another_version_is_not_searched(library: Library) -> None:
    library.tell(version=803)
    with pytest.raises(NoSearch, match="found version 803 of cuSPARSELt, not 702"):
        search_isolated(case_in(), CPU)
    assert library.calls == []


def test_a_search_that_costs_too_many_children_ends(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cusparselt_child, "MOST_ENDED", 2)
    library.tell(faults=dict.fromkeys(US, "SIGILL"))
    with pytest.raises(NoSearch, match="2 processes ended"):
        search_isolated(case_in(), CPU)
    assert set(library.crashed) == {"0,1,-1", "1,1,-1"}


def test_a_search_out_of_time_keeps_the_fastest_that_it_tried(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that is right, whatever crashed or was wrong before; a warning says so."""
    monkeypatch.setattr(cusparselt_child, "SEARCH_SECONDS", 0.0)
    library.tell(faults={"0,1,-1": "SIGILL"}, wrong=["1,1,-1"])
    with pytest.warns(RuntimeWarning, match="for bfloat16 32x64 at up to 128 tokens took"):
        assert setting_for(case_in(), CPU) == Setting(2)
    assert library.tried == {"0,1,-1", "1,1,-1", "2,1,-1"}
    assert chosen(case_in(), CPU) == Setting(2)


def test_every_attempt_that_ended_well_is_told_with_its_seconds(
    library: Library, tmp_path: Path
) -> None:
    library.tell(us={"0,1,-1": 2.0, "1,1,-1": 1.0}, faults={"2,1,-1": "SIGILL"})
    told = list[tuple[str, float]]()
    wanted = cusparselt_child.Search(case_in(), CPU, 702, "", tmp_path / "journals")
    past, crashed = Past(), dict[Setting, str]()
    searched(wanted, past, crashed.__setitem__, lambda *attempt: told.append(attempt))
    attempts = [settings for settings, _ in told]
    assert attempts[:2] == ["0,1,-1", "1,1,-1"] and attempts[-2:] == ["1,1,-1;0,1,-1", "1,1,-1"]
    assert all(0 <= seconds < 60 for _, seconds in told) and not crashed


def test_a_report_says_what_was_not_searched() -> None:
    said = failure("semi24 cusparselt", NoSearch("no process"))
    assert said == "semi24 cusparselt was not searched: no process"
    assert any(word in said for word in PASSING)  # so that it is tried again


def test_the_child_of_the_library_itself_gets_ready_or_says_why_not(tmp_path: Path) -> None:
    child = isolated.Child(cusparselt_child.MODULE, [""], {})
    assert child.ready == {"version": torch.backends.cusparselt.version()}
    child.end()
    with pytest.raises(isolated.NoChild, match="^it does not see the GPU of-nobody$"):
        isolated.Child(cusparselt_child.MODULE, ["of-nobody"], {})


# ---- one child ----------------------------------------------------------------------------------


def test_searches_share_a_child(library: Library) -> None:
    with one_child():
        for tokens in (16, 32, 64):
            assert setting_for(case_in(tokens=tokens), CPU) == Setting(0)
    (pid,) = {int(process) for _, process in library.calls}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_that_ended_while_it_was_idle_is_replaced(library: Library) -> None:
    setting_for(case_in(), CPU)
    kept = cusparselt_child._kept.child
    assert kept is not None
    kept._process.kill()
    while kept.alive:
        time.sleep(0.01)
    assert setting_for(case_in(tokens=16), CPU) == Setting(0)
    kept = cusparselt_child._kept.child
    assert kept is not None
    kept._process.kill()
    kept._process.wait()
    kept._process.returncode = None  # it is seen only when it does not answer
    cusparselt_child._kept.child = kept
    assert setting_for(case_in(tokens=32), CPU) == Setting(0)
    assert len({process for _, process in library.calls}) == 3


# ---- products -----------------------------------------------------------------------------------


def test_more_tokens_than_were_tried_are_multiplied_in_parts(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cusparselt_settings, "LARGEST_BUCKET", 64)
    fake = install(monkeypatch, library.folder / "cache", Fake({Setting(0): 1.0}))
    weight = random_weight(case_in(), CPU)
    x = torch.randn(131, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = product(compress(weight), x, OUT)
    assert torch.equal(y, (x.double() @ weight.double().t()).bfloat16())
    assert max(fake.tokens) <= 64
    assert len(product(compress(weight), x[:0], OUT)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_a_random_weight_keeps_two_of_four(dtype: torch.dtype) -> None:
    weight = random_weight(SearchCase(dtype, torch.bfloat16, 64, 128, 32, None, False), CPU)
    kept = (weight != 0).unflatten(1, (-1, 4))
    assert weight.dtype == dtype and bool((kept.sum(-1) == 2).all())
    assert len(kept.flatten(0, 1).unique(dim=0)) == 6  # each pair of places occurs
    if dtype == torch.int8:
        assert int(weight.min()) < -100 and int(weight.max()) > 100


def test_accelerate_leaves_no_child_and_searches_within_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside: list[bool] = []

    def decision(*arguments: object) -> object:
        inside.append(cusparselt_child.in_one_child())
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.accelerate.verb._measured_decision", decision)
    with pytest.raises(KeyboardInterrupt):
        sc.accelerate_(half_zeros(), formats=("semi24",))
    assert inside == [True] and not cusparselt_child.in_one_child()


def test_a_layer_that_was_not_searched_stays_dense_and_is_measured_again(
    library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cusparselt, "why_not", lambda *arguments: None)
    monkeypatch.setattr("secateur.accelerate.verb.MOST_SPREAD", inf)  # else a busy one keeps none
    library.tell(**{"at the start": "no torch here"})
    model = half_zeros()
    (layer,) = sc.accelerate_(model, (16,), ("semi24",), policy="fastest").layers
    (reason,) = layer.dropped
    assert layer.format == "dense" and type(model[0]) is nn.Linear
    assert reason.startswith("semi24 cusparselt was not searched: cuSPARSELt's algorithms are")
    kept = (tmp_path / "measured.json").read_text()  # the layer of blocks that is advised
    assert "semi24" not in kept and "block:64x64" in kept
    library.tell()
    forget()
    (layer,) = sc.accelerate_(half_zeros(), (16,), ("semi24",), policy="fastest").layers
    assert library.tried and "was not searched" not in str(layer.dropped)


def test_what_holds_a_second_copy_is_not_searched_by_default(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cusparselt, "why_not", lambda *arguments: None)
    (layer,) = sc.accelerate_(half_zeros(), (16,), ("semi24",)).layers
    assert not library.tried and layer.format == "dense"
    assert "semi24 cusparselt was not tried: it holds the weight a second time" in layer.reason
    (layer,) = sc.accelerate_(half_zeros(), (16,), ("semi24",), policy="fastest").layers
    assert library.tried and "was not tried" not in layer.reason


def half_zeros() -> nn.Sequential:
    linear = nn.Linear(64, 32).bfloat16()
    linear.weight.data[:, ::2] = 0
    return nn.Sequential(linear)


# ---- on a GPU -----------------------------------------------------------------------------------


def gpu(test: Any) -> Any:
    """The test runs on a GPU whose torch has the library, else it is skipped."""
    for mark in (
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        pytest.mark.skipif(
            not torch.backends.cusparselt.is_available(), reason="needs a torch with cuSPARSELt"
        ),
    ):
        test = mark(test)
    return test


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache in place of the user's, and children that try a few algorithms."""
    monkeypatch.setattr(cusparselt_child, "MODULE", "tests.formats.kernels.small_child")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    cusparselt_child.end_child()
    forget()


def gpu_case(tokens: int = 128, bias: torch.dtype | None = None) -> SearchCase:
    return SearchCase(torch.float16, torch.float16, 256, 512, tokens, bias, False)


def is_right_on_the_gpu() -> None:
    """This process has its context, and runs what was found in a child."""
    device = torch.device("cuda", torch.cuda.current_device())
    weight = random_weight(gpu_case(), device)
    x = torch.randn(100, 512, device=device).half()
    y = product(compress(weight), x, 256)
    exact = x.double() @ weight.double().t()
    assert float((y - exact).abs().max()) <= 2**-10 * float(exact.abs().max())


@gpu
def test_a_search_leaves_this_process_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library call, no memory; and the child is on this GPU whatever the variable says now."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    assert torch.cuda.device_count()  # which torch remembers now, and counts no more
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def never(*arguments: object, **options: object) -> object:
        raise AssertionError("the library was called in this process")

    before = torch.cuda.memory_allocated(device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_cslt_sparse_mm", never)
        patch.setattr(torch, "_cslt_compress", never)
        found = search_isolated(gpu_case(), device)
    assert found.us > 0 and torch.cuda.memory_allocated(device) == before
    is_right_on_the_gpu()


@gpu
@pytest.mark.parametrize("way", ["trap", "assert"])
def test_a_child_that_loses_its_context_costs_this_process_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, way: str, tmp_path: Path
) -> None:
    if way == "trap":
        try:
            nvrtc_version()
        except RuntimeError as problem:
            pytest.skip(str(problem))
    device = torch.device("cuda", torch.cuda.current_device())
    mine = torch.arange(1000, device=device)
    monkeypatch.setenv("TRAP", json.dumps({"algorithm": 1, "way": way, "folder": str(tmp_path)}))
    found = search_isolated(gpu_case(), device)
    assert found.setting.algorithm != 1
    assert re.match("ended the process that tried it: .*CUDA error", found.dropped[Setting(1)])
    torch.cuda.synchronize()
    assert int(mine.sum()) == 499500  # the context and what it held
    is_right_on_the_gpu()  # 1 is sound, but not tried
    table = json.loads((cache / "cusparselt-crashed.json").read_text())
    assert [list(kinds) for kinds in table.values()] == [["float16"]]


@gpu
def test_a_full_gpu_is_said(cache: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    is_right_on_the_gpu()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    room = 1024 * 2**20  # for the child's context, and little more
    filled = torch.empty(max(0, free - room), dtype=torch.uint8, device=device)
    case = SearchCase(torch.float16, torch.float16, 16384, 16384, 4096, None, False)
    with pytest.raises(NoSearch, match=r"GB are free beside|memory"):
        search_isolated(case, device)
    del filled
    torch.cuda.empty_cache()
    is_right_on_the_gpu()


@gpu
@pytest.mark.parametrize("bias", [None, torch.float16], ids=str)
def test_searches_in_fp16_end_whatever_they_meet(cache: Path, bias: torch.dtype | None) -> None:
    """The products in which an illegal instruction was once executed."""
    device = torch.device("cuda", torch.cuda.current_device())
    with one_child():
        for tokens in (16, 128, 1024):
            found = search_isolated(gpu_case(tokens, bias), device)
            assert found.us > 0
    is_right_on_the_gpu()
