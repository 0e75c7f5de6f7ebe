"""A trial chooses what is clearly faster, in order of preference."""

import time

import pytest
import torch

from kdpipe.stages.compute.trial import choose, is_worth_a_trial, time_in_turn, time_on_one_thread

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"float32": 1.0}, "float32"),
        ({"float32": 1.0, "tf32": 0.9}, "float32"),
        ({"float32": 1.0, "tf32": 0.5, "float16": 0.45}, "tf32"),
        ({"float32": 1.0, "tf32": 0.5, "float16": 0.2}, "float16"),
        ({"float32": 1.0, "tf32": 0.9, "float16": 0.75}, "float16"),
    ],
)
def test_choice(seconds, expected):
    assert choose(seconds) == expected


def test_times_are_in_turn():
    calls = []
    found = time_in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, rounds=3, may_drop=False)
    assert calls == list("ababab") and list(found) == ["a", "b"]


def test_slower_run_takes_longer_and_is_dropped():
    calls = []
    runs = {"slow": lambda: (calls.append("slow"), time.sleep(0.02)), "fast": lambda: calls.append("fast")}
    assert choose(time_in_turn(runs, CPU)) == "fast"
    assert calls == ["slow", "fast", "slow", "fast", "fast", "fast"]


def test_one_thread_does_not_count_its_waits():
    used, before = set(), torch.get_num_threads()
    found = time_on_one_thread({"": lambda: (time.sleep(0.02), used.add(torch.get_num_threads()))}, CPU)
    assert found[""] < 0.01 and used == {1} and torch.get_num_threads() == before


def test_small_jobs_have_no_trial():
    assert not is_worth_a_trial(1e10, CPU) and is_worth_a_trial(1e16, CPU)
    assert not is_worth_a_trial(1e16, torch.device("meta"))
