"""The presets: what each is made of, under the name that a report gives it."""

import secateur as sc


def test_presets_are_half_blocks_on_alps() -> None:
    assert sc.best == sc.blockwise(sc.alps) and sc.best.name == "blockwise(alps)"
    assert sc.thorough == sc.blockwise(sc.alps, distil=4)
    assert sc.thorough.name == "blockwise(alps, distil=4)"
