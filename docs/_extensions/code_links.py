"""`sc.prune_` in a text leads to its place in the reference, and so does a bare in-place verb."""

from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import secateur


class CodeLinks(SphinxTransform):
    """Turns literals that are public names into references."""

    default_priority = 600

    def apply(self, **options: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().partition("(")[0]
            public = name.removeprefix("sc.")
            certain = name.startswith("sc.") or name.endswith("_")
            if not certain or public not in secateur.__all__ or _inside_link(literal):
                continue
            link = addnodes.pending_xref(
                refdomain="py",
                reftype="obj",
                reftarget=f"secateur.{public}",
                refdoc=self.env.docname,
                refexplicit=True,
                refwarn=True,
            )
            literal.replace_self(link)
            link += literal


def _inside_link(node: nodes.Node) -> bool:
    return isinstance(node.parent, (nodes.reference, addnodes.pending_xref))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_transform(CodeLinks)
    return {"parallel_read_safe": True}
