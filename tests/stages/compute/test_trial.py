"""A trial chooses what is clearly faster, in order of preference."""

import time

import pytest
import torch

from kdpipe.stages.compute.trial import choose, is_worth_a_trial, one_thread_clock, time_in_turn

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


def test_times_are_in_turn_after_one_call_each():
    calls = []
    found = time_in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, rounds=2)
    assert calls == list("ababab") and list(found) == ["a", "b"]


def test_slower_run_takes_longer():
    found = time_in_turn({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, CPU)
    assert choose(found) == "fast"


def test_on_one_thread_waiting_for_a_core_does_not_count(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert time_in_turn({"": lambda: time.sleep(0.02)}, CPU, clock=one_thread_clock(CPU))[""] < 0.01
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert one_thread_clock(CPU) is time.perf_counter


def test_small_jobs_have_no_trial():
    assert not is_worth_a_trial(1e10, CPU) and is_worth_a_trial(1e16, CPU)
    assert not is_worth_a_trial(1e16, torch.device("meta"))
