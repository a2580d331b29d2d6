"""Other libraries' kernels: packed as they ask, and searched once."""

from pathlib import Path

import pytest
import torch

from bench.lib import cold, peer_kernels
from secateur.formats.kernels.cusparselt import Setting
from secateur.formats.kernels.cusparselt_search import SearchResult
from tests.formats.kernels.fake_cusparselt import Fake, forget, install


def test_the_int4_peer_is_packed_as_torch_does() -> None:
    weight = cold.random_weights((16, 256), torch.device("cpu"))[0]
    codes, scales = peer_kernels.quantised(weight)
    assert codes.dtype == torch.uint8 and (codes >= 1).all() and (codes <= 15).all()
    assert scales.shape == (16, 2) and scales.dtype == torch.bfloat16
    exact = peer_kernels.dequantised(codes, scales)
    assert cold.error(exact, weight.double()) < 0.15
    assert torch.equal(exact[3, 128:], (codes[3, 128:].float() - 8) * scales[3, 1].float())
    bytes_ = peer_kernels.joined(codes)
    assert bytes_.shape == (16, 128) and bytes_.dtype == torch.uint8
    assert int(bytes_[2, 5]) == 16 * int(codes[2, 10]) + int(codes[2, 11])
    table = peer_kernels.scales_and_zeros(scales)
    assert table.shape == (2, 16, 2) and table.is_contiguous()
    assert torch.equal(table[1, :, 0], scales[:, 1]) and (table[..., 1] == 0).all()


def test_a_search_is_described_in_a_row() -> None:
    dropped = {Setting(1): "wrong by 1.0e-01 where 7.8e-03 is allowed", Setting(7): "CUDA error"}
    found = SearchResult(Setting(5, 8, 1), 1.0, dropped)
    assert (
        peer_kernels.described(found) == "algorithm 5 split_k 8 mode 1; 1 setting wrong, 1 refused"
    )
    plain = SearchResult(Setting(2), 1.0, {})
    assert peer_kernels.described(plain) == "algorithm 2; 0 settings wrong, 0 refused"


def test_sparse_marlin_says_what_it_lacks(tmp_path: Path) -> None:
    weight, x = torch.ones(4, 4), torch.ones(1, 4)
    with pytest.raises(ValueError, match="Sparse-Marlin needs a GPU"):
        peer_kernels.sparse_marlin(weight, x, tmp_path / "lib.so")
    with pytest.raises(ValueError, match=r"packer.py is no Python file: it has to lie beside"):
        peer_kernels._module(tmp_path / "packer.py")


@pytest.mark.parametrize("biased", [False, True])
def test_both_cusparselt_candidates_share_copies_and_a_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, biased: bool
) -> None:
    us = {Setting(0): 3.0, Setting(1): 1.0, Setting(2): 2.0}
    fake = install(monkeypatch, tmp_path, Fake(us, wrong={Setting(1)}))
    _, sparse = cold.random_weights((16, 32), torch.device("cpu"))
    bias = torch.ones(16).bfloat16() if biased else None
    shipped, searched = peer_kernels.cusparselt(sparse, torch.randn(32, 32).bfloat16(), bias)
    assert shipped.make is searched.make and searched.rows == 16
    runs = [searched.make()]
    first = cold.prepared(searched, runs, 3)
    # refused: four algorithms that are not there, and each of two with its sums split in six ways
    assert first.note == "16 rows; algorithm 2; 1 setting wrong, 16 refused" and first.error < 0.01
    assert (fake.biases[-1] is not None) == biased and fake.seen[-1] == Setting(2)
    count = len(fake.seen)
    cold.prepared(searched, runs, 8)  # again 16 rows: nothing is searched
    assert fake.seen[count:] == [Setting(2)] * 2  # the check alone and the chain's first
    cold.prepared(shipped, runs, 3)
    assert set(fake.seen[count + 2 :]) == {Setting(0)}
    assert not list(tmp_path.iterdir())  # a peer leaves nothing behind
    forget()
