"""The order of examples is a function of seed and epoch and of nothing else."""

from __future__ import annotations

import torch

from luthier.training.order import Order, derived_seed, epoch_order


def test_each_epoch_is_a_permutation_and_differs() -> None:
    orders = [epoch_order(7, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != epoch_order(8, 0, 50)


def test_golden_order() -> None:
    """Pinned, so that a change that would break resuming and repeating older runs is noticed."""
    assert epoch_order(0, 0, 8) == GOLDEN
    assert derived_seed("order", 0, 0) == GOLDEN_SEED


def test_a_stream_entered_anywhere_is_the_same_stream() -> None:
    whole = Order(3, 10).row_numbers(0, 35)
    assert Order(3, 10).row_numbers(17, 31) == whole[17:31]
    assert whole[:10] == epoch_order(3, 0, 10)
    assert whole[30:35] == epoch_order(3, 3, 10)[:5]


def test_threads_and_global_randomness_do_not_matter() -> None:
    """Case 23."""
    before = epoch_order(1, 0, 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.manual_seed(99)
    try:
        assert epoch_order(1, 0, 1000) == before
    finally:
        torch.set_num_threads(threads)


GOLDEN = [5, 2, 4, 7, 6, 3, 1, 0]
GOLDEN_SEED = 3188057147386964236
