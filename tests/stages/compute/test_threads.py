"""The number of threads of work that may have any follows what is faster at present, at little cost."""

import pytest
import torch

from kdpipe.stages.compute import threads as threads_module
from kdpipe.stages.compute.threads import PROBE_SHARE, AdaptiveThreads, max_threads, open_counts, set_up_threads


class Box:
    """A machine whose clock tells what a batch costs with the number of threads in use."""

    def __init__(self):
        self.costs, self.now, self.used = {}, 0.0, []

    def work(self):
        self.used.append(torch.get_num_threads())
        self.now += self.costs[self.used[-1]]
        return len(self.used)

    def share_of(self, count, last):
        return self.used[-last:].count(count) / last


@pytest.fixture
def four_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads_module, "_limit", None)
    monkeypatch.setattr(threads_module, "_is_chosen", True)
    set_up_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def box(four_threads):
    return Box()


def run(box, adaptive, costs, num_batches):
    """Return the time of the batches, relative to the best number of threads."""
    box.costs, started = costs, box.now
    for _ in range(num_batches):
        assert adaptive.run(1, box.work) == len(box.used)
    return (box.now - started) / (num_batches * min(costs.values()))


def test_follows_the_load_and_loses_little_by_trying(box):
    adaptive = AdaptiveThreads(lambda: box.now)
    idle, busy = {1: 1.0, 4: 0.3}, {1: 1.2, 4: 40.0}
    assert run(box, adaptive, idle, 300) < 1.1 and box.share_of(4, 100) > 0.9
    run(box, adaptive, busy, 10)
    assert box.share_of(1, 5) == 1, "at once"
    assert run(box, adaptive, busy, 2000) < 1 + 2 * PROBE_SHARE
    run(box, adaptive, idle, 5000)
    assert box.share_of(4, 100) > 0.9, "the idle cores are found again"


def test_one_interruption_changes_nothing(box):
    adaptive = AdaptiveThreads(lambda: box.now)
    run(box, adaptive, {1: 1.0, 4: 0.5}, 100)
    run(box, adaptive, {1: 1.0, 4: 9.0}, 1)
    run(box, adaptive, {1: 1.0, 4: 0.5}, 50)
    assert box.share_of(4, 50) > 0.8


def test_number_is_restored_even_after_an_error(box):
    adaptive = AdaptiveThreads()
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        adaptive.run(1, lambda: 1 // 0)
    assert torch.get_num_threads() == 2


def test_jobs_choose_only_what_the_user_did_not(four_threads, monkeypatch):
    assert (max_threads(), open_counts()) == (4, [4])
    monkeypatch.setattr(threads_module, "num_cores", lambda: 6)
    set_up_threads(None)
    assert (max_threads(), open_counts()) == (6, [1, 2, 4, 6])
