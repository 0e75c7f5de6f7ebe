"""The number of threads of work that may have any follows what is faster at present, at little cost."""

import pytest
import torch

from kdpipe.stages.compute import threads as threads_module
from kdpipe.stages.compute.threads import (
    PERIOD_S,
    PROBE_SHARE,
    AdaptiveThreads,
    CheckedThreads,
    fastest_count,
    max_threads,
    open_counts,
    set_up_threads,
    threads_of_call,
)


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
def four_threads():
    before = torch.get_num_threads()
    set_up_threads(4)
    yield
    set_up_threads(before)


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


def test_small_batches_keep_a_number_for_a_while(box):
    adaptive = AdaptiveThreads(lambda: box.now)
    run(box, adaptive, {1: PERIOD_S / 8, 4: PERIOD_S / 4}, 12)
    assert box.used == [1] * 8 + [4] * 4


def test_number_is_restored_even_after_an_error(four_threads):
    with pytest.raises(ZeroDivisionError):
        AdaptiveThreads().run(1, lambda: 1 // 0)
    assert torch.get_num_threads() == 4


def test_jobs_choose_only_what_the_user_did_not(four_threads, monkeypatch):
    assert (max_threads(), open_counts()) == (4, [4])
    monkeypatch.setattr(threads_module, "num_cores", lambda: 6)
    set_up_threads(None)
    assert torch.get_num_threads() == 1
    assert (max_threads(), open_counts()) == (6, [1, 3, 6])


@pytest.mark.parametrize(("setting", "before", "counts"), [("", 5, [1, 2, 5]), ("", 3, [3]), ("5", 5, [5])])
def test_calls_in_python_use_the_number_that_was_set(four_threads, monkeypatch, setting, before, counts):
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    for name in ("affinity_cores", "num_cores"):
        monkeypatch.setattr(threads_module, name, lambda: 5)
    torch.set_num_threads(before)
    with threads_of_call():
        assert open_counts() == counts
        torch.set_num_threads(1)
    assert (torch.get_num_threads(), open_counts()) == (before, [before])


@pytest.mark.parametrize(
    ("costs", "chosen", "num_runs"),
    [({1: 1.0, 2: 0.7, 4: 0.5}, 4, 12), ({1: 1.0, 2: 0.95, 4: 0.92}, 1, 12), ({1: 1.0, 2: 100.0, 4: 0.6}, 4, 10)],
)
def test_trial_takes_more_threads_where_they_pay(box, monkeypatch, costs, chosen, num_runs):
    monkeypatch.setattr(threads_module.time, "perf_counter", lambda: box.now)
    box.costs = costs
    assert fastest_count([1, 2, 4], box.work) == chosen
    assert len(box.used) == num_runs


def test_processes_that_wait_for_each_other_run_equally_often(box, monkeypatch):
    monkeypatch.setattr(threads_module.time, "perf_counter", lambda: box.now)
    box.costs = {1: 1.0, 4: 9.0}
    assert fastest_count([1, 4], box.work, may_drop=False) == 1
    assert box.used == [1, 4] * 4, "in turn"


@pytest.mark.parametrize(("depends", "used"), [(False, {1, 4}), (True, {4})])
def test_checked_work_adapts_only_if_no_bit_depends_on_it(box, monkeypatch, depends, used):
    monkeypatch.setattr(threads_module, "PERIOD_S", 0.0)
    checked, box.costs = CheckedThreads(4), {1: 1.0, 4: 1.0}

    def work():
        box.work()
        return torch.full((3,), float(torch.get_num_threads() if depends else 0))

    def run(shape):
        return checked.run_checked(shape, work, lambda result: [result])

    first = run((3, 1))
    assert box.used == [4, 1], "both, once"
    assert all(torch.equal(run((3, 1)), first) for _ in range(9)) and set(box.used[2:]) == used
    del box.used[:]
    assert torch.equal(run((2, 1)), first) and box.used == [4, 1], "another shape is checked too"


def test_kinds_that_depend_on_the_number_keep_it(box):
    """What another kind uses at present, one thread here, does not change them."""
    checked, box.costs = CheckedThreads(4), {1: 1.0, 4: 1.0}
    alike, depends = ((lambda: torch.zeros(1)), (lambda: torch.full((1,), float(torch.get_num_threads()))))

    def run(kind, work):
        return checked.run_checked(kind, work, lambda result: [result]).item()

    for _ in range(3):
        run((1, "alike"), alike)
        assert run((1, "depends"), depends) == run((2, "depends"), depends) == 4
