"""The rules of the house that a machine can keep."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import secateur as sc

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "secateur").rglob("*.py"))
COMMAND = ROOT / "secateur" / "cli" / "command.py"

# The public names. Adding one is a decision: change this list with it.
PUBLIC = {
    *("plan", "Plan", "read_plan", "prune_", "reconstruct_", "check", "shrink_"),
    *("NM", "Unstructured", "Block", "Channel"),
    *(
        "magnitude",
        "wanda",
        "ria",
        "sparsegpt",
        "refit",
        "swap",
        "thorough",
        "alps",
        "blockwise",
        "best",
        "sensitivity",
    ),
    *("Int4", "Int8", "Fp8"),
    *("hold", "gradual", "distil_"),
    *("accelerate_", "pack_", "unpack_", "SparseLinear", "warmup"),
    *("save", "load", "generate"),
}


# Imported by comparisons with other libraries alone, where those are installed.
PEERS = {"llmcompressor", "modelopt"}


def test_the_public_names_are_these() -> None:
    assert set(sc.__all__) == PUBLIC
    assert len(sc.__all__) <= 36
    assert all(name in vars(sc) for name in PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_says_what_it_is(name: str) -> None:
    documented = inspect.getdoc(vars(sc)[name])
    assert documented and len(documented.splitlines()[0]) > 20


def test_importing_touches_no_optional_package() -> None:
    """Except what torch itself imports: the driver's bindings, where they are installed."""
    optional = [
        "triton",
        "cuda",
        "transformers",
        "lm_eval",
        "lightning",
        "matplotlib",
        "jinja2",
        "typer",
        "rich",
        "pydantic",
    ]
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport secateur\n"
        "new = sorted(set(sys.modules) - before)\n"
        f"print([name for name in new if name.partition('.')[0] in {optional!r}])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_house_style(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "every file says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            # Statistics are passed whole to a method that is not known here, and a shell's options
            # to a command; a stand-in for another library's method takes and ignores whatever that
            # takes, and transformers hands a loop what it prepared for the model.
            handed_on = (
                "statistics",
                "ignored",
                "model_kwargs",
                *(["options"] if path == COMMAND else []),
            )
            assert node.args.kwarg is None or node.args.kwarg.arg in handed_on, (
                f"{node.name} takes **{node.args.kwarg}: name its options"
            )
        assert not isinstance(node, ast.Global), "no mutable module state"
    forbidden = r"\b(prunem?_n|sgpt|obcq|sparsity_level|prune_mask|importance)\b"
    if "compat" not in path.parts:
        assert not re.search(forbidden, text), "the glossary has another word for it"


# A protocol's members with a body are answers that hold for any class of it.
PROTOCOLS = {"Pattern", "Format", "Shown"}


def inheriting(tree: ast.Module) -> set[str]:
    """The classes that inherit from a class of secateur, of this file or imported from another."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(level=level, module=module, names=names):
                ours = level > 0 or str(module).partition(".")[0] == "secateur"
            case ast.Import(names=names):
                ours = False
            case _:
                continue
        for alias in names:
            if ours or alias.name.partition(".")[0] == "secateur":
                own.add(alias.asname or alias.name.partition(".")[0])
    own -= PROTOCOLS
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(n, ast.Name) and n.id in own for b in node.bases for n in ast.walk(b))
    }


def test_no_class_inherits_from_a_class_of_the_house() -> None:
    """In compat they do: torch.ao's hierarchy of classes is a part of its API."""
    files = [path for path in SOURCES if "compat" not in path.parts]
    found = set[str]().union(*(inheriting(ast.parse(path.read_text())) for path in files))
    assert found == set()


@pytest.mark.parametrize(
    "source",
    [
        "class A: ...\nclass B(A): ...",
        "from secateur.a import A\nclass B(A): ...",
        "from secateur import a\nclass B(a.A): ...",
        "from secateur.a import A as Other\nclass B(Other): ...",
        "import secateur.a\nclass B(secateur.a.A): ...",
        "import secateur.a as a\nclass B(a.A[int]): ...",
        "from .a import A\nclass B(A): ...",
    ],
)
def test_inheritance_is_seen_however_the_base_is_named(source: str) -> None:
    assert inheriting(ast.parse(source)) == {"B"}
    assert inheriting(ast.parse("from torch import nn\nclass B(nn.Module): ...")) == set()


def test_no_binary_or_large_file_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    large = [
        f
        for f in listed.stdout.split("\n")
        if f and (ROOT / f).is_file() and (ROOT / f).stat().st_size > 2**20
    ]
    assert large == []


# Torch makes these in the default dtype or on the default device unless it is told otherwise.
MADE = {"zeros", "ones", "empty", "full", "rand", "randn", "linspace", "logspace", "eye"}
MADE_OF_INTEGERS = {"arange", "randint", "randperm", "tensor", "as_tensor", "asarray"}


# Stand-ins for torch.ao follow their users' defaults.
OWN = [path for path in SOURCES if "compat" not in path.parts]


@pytest.mark.parametrize("path", OWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_tensor_is_made_by_default(path: Path) -> None:
    """Model scripts set both defaults, and results have to be the same."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        told = {keyword.arg for keyword in node.keywords}
        if node.func.attr in MADE | MADE_OF_INTEGERS:
            assert "device" in told, f"line {node.lineno}: say on which device"
        if node.func.attr in MADE:
            assert "dtype" in told, f"line {node.lineno}: say in which dtype"


def installed_by_make_test() -> set[str]:
    """The distributions of the extra `dev`, and of the extras that it includes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked, found = ["dev"], list(project["dependencies"])
    for extra in asked:
        for requirement in extras[extra]:
            if own := re.fullmatch(r"secateur\[(.*)\]", requirement):
                asked += own[1].split(",")
            else:
                found.append(requirement)
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in found}  # type: ignore[index]


def imported(path: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_make_help_tells_what_every_target_does() -> None:
    """And no target is missing from `.PHONY`, where a file of its name would switch it off."""
    makefile = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split()
    assert phony == re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    told = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=1) for line in told.splitlines()]
    assert [line[0] for line in lines] == phony and all(len(line) == 2 for line in lines)


def test_make_test_installs_what_the_tests_and_the_pages_import() -> None:
    folders = ("tests", "bench", "docs", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    own = {path.stem for path in (ROOT / "docs" / "_extensions").glob("*.py")}
    own |= {"secateur", "tests", "bench"}
    wanted = {name for file in files for name in imported(file)} - sys.stdlib_module_names - own
    given = installed_by_make_test()
    homes = packages_distributions()
    missing = {n for n in wanted if not given & {home.lower() for home in homes.get(n, [n])}}
    assert missing == PEERS
    makefile = (ROOT / "Makefile").read_text()
    assert "\n.venv/.dev: .venv/.demo\n\t$(PIP) -e '.[dev]'\n" in makefile
    for target in ("test", "docs", "lint", "types"):
        (needs,) = re.findall(rf"^{target}:(.*?)(?:##.*)?$", makefile, re.MULTILINE)
        assert needs.split() == [".venv/.dev"], f"make {target} needs what it installs"


def rooms() -> dict[str, set[str]]:
    """For each room, the rooms that its files import; `secateur/__init__.py` is no room."""
    folders = {path.parent.name for path in (ROOT / "secateur").glob("*/__init__.py")}
    found: dict[str, set[str]] = {name: set() for name in folders}
    for path in SOURCES:
        room = path.relative_to(ROOT / "secateur").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.ImportFrom(module=str(module)) if module.startswith("secateur."):
                    names = [module]
                case ast.ImportFrom(module="secateur", names=aliases):
                    names = [f"secateur.{alias.name}" for alias in aliases]
                case ast.Import(names=aliases):
                    names = [alias.name for alias in aliases if alias.name.startswith("secateur.")]
                case _:
                    continue
            if room in folders:
                found[room] |= {name.split(".")[1] for name in names} & (folders - {room})
    return found


def test_the_house_is_small() -> None:
    entries = {path.name for path in (ROOT / "secateur").iterdir()} - {"__pycache__", "py.typed"}
    assert len(entries) <= 17, "a new file belongs into a room"
    assert entries - {"__init__.py"} == set(rooms())
    assert sum(len(below) for below in rooms().values()) <= 90


def test_the_design_lists_every_room() -> None:
    table = re.search(
        r"^\| row \|.*?\n\n", (ROOT / "DESIGN.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert table
    listed = re.findall(r"^\|[^|]*\| `(\w+)` \|", table[0], re.MULTILINE)
    assert sorted(listed) == sorted(rooms())


def test_tests_lie_where_their_sources_lie() -> None:
    folders = {
        path.relative_to(ROOT / "tests").parent.as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    others = {".", "faults", "fidelity", "guests"}
    homes = {name: ROOT if name.startswith("bench") else ROOT / "secateur" for name in folders}
    missing = {name for name in folders - others if not (homes[name] / name).is_dir()}
    assert not missing


# Lines of a function, its docstring included. Kernels are exempt: a kernel is one function.
LONGEST = 60


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {node.name}, {lines} lines"
        for path in SOURCES
        if "kernels" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST
    ]
    assert long == []
