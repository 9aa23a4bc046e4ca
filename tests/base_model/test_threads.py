"""Batches side by side give what they give one by one."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from align.config import Config
from align.objectives import Loss
from align.run import Run
from base_model.errors import GuardStop
from base_model.threads import in_threads, side_by_side

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_with_the_callers_grad_mode_and_the_threads_are_given_back(threads: int) -> None:
    with torch.no_grad():
        assert in_threads(lambda k: (k, torch.is_grad_enabled()), list(range(7)), CPU) == [(k, False) for k in range(7)]
    assert all(in_threads(lambda _: torch.is_grad_enabled(), [0, 1], CPU))
    assert torch.get_num_threads() == threads
    assert in_threads(lambda k: k, [], CPU) == []


def test_an_error_in_one_part_is_raised(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda k: 1 / k, [2, 1, 0], CPU)
    assert torch.get_num_threads() == threads


def gradients(out: Path, parts: list[torch.Tensor], threads: int) -> tuple[list[torch.Tensor], list[float]]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def losses(part: torch.Tensor) -> Iterator[Loss]:
        for x in part:
            yield Loss(network(x).square().mean(), {})

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seen = Run(out, Config(), seed=0, resume=False, metrics={}, quiet=True).backward_each(optimizer, losses, parts)
    torch.set_num_threads(before)
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None], [float(loss.value) for loss in seen]


def test_gradients_of_parts_are_those_of_their_sum_and_the_same_to_the_bit_on_any_number_of_cores(tmp_path: Path) -> None:
    parts = list(torch.randn(4, 3, 50, 16, generator=torch.Generator().manual_seed(1)))
    found = {threads: gradients(tmp_path / str(threads), parts, threads) for threads in (1, 2, 4)}
    whole, _ = gradients(tmp_path / "whole", [torch.cat(parts)], 1)
    for grads, values in found.values():
        assert all(torch.equal(a, b) for a, b in zip(grads, found[1][0], strict=True)) and values == found[1][1]
        assert len(grads) == 4 and len(values) == 12
        for a, b in zip(grads, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_any_gradient_is_added(tmp_path: Path) -> None:
    with pytest.raises(GuardStop, match="the loss is nan"):
        gradients(tmp_path, [torch.zeros(1, 2, 16), torch.full((1, 2, 16), torch.nan)], 2)


@pytest.mark.timed
def test_what_keeps_its_place_in_itself_goes_one_by_one(threads: int) -> None:
    """A batch that is at work sees no other at work."""
    at_work: list[int] = []

    def work(k: int) -> bool:
        at_work.append(k)
        time.sleep(0.01)
        alone = at_work == [k]
        at_work.remove(k)
        return alone

    side_by_side(False)
    try:
        assert all(in_threads(work, list(range(6)), CPU))
    finally:
        side_by_side(True)
    assert all(in_threads(work, list(range(6)), CPU)) == (threads == 1)
