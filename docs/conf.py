"""How the documentation is built: `make docs`, offline, with warnings as errors."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import secateur

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "secateur"
author = "the secateur authors"
copyright = f"2026, {author}"
release = version = secateur.__version__

# reference: writes the reference's pages, from `secateur.__all__`.
# docstrings: the house's docstrings are Markdown with a few sections of their own.
# code_links: `sc.prune_` in a text leads to its reference.
own = ["reference", "docstrings", "code_links"]
extensions = ["sphinx.ext.autodoc", "myst_nb", "sphinx_design", *own]
exclude_patterns = ["_build", "_extensions", "jupyter_execute"]

autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Guides are run at every build, on small models; one that raises or warns fails the build. One
# thread, because more of them on a busy machine wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # pages show results, not how they came about
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_output_stderr = "warn"

html_theme = "furo"
html_title = f"secateur {release}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]


def _drop_empty_globs(app: Sphinx, docname: str, source: list[str]) -> None:
    """Leave out of a table of contents what matches no page: some are made by `make tables`."""
    lines, folder = source[0].split("\n"), (HERE / docname).parent
    empty = [g for g in lines if re.fullmatch(r"[\w/]+\*", g) and not any(folder.glob(f"{g}.md"))]
    source[0] = "\n".join(line for line in lines if line not in empty)


def _skip_torch(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leave out what a class has from torch, whose docstrings are in another markup."""
    return True if str(getattr(member, "__module__", "")).startswith("torch.") else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip_torch)
    app.connect("source-read", _drop_empty_globs)
