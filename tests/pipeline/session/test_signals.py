"""Stopping a job: durations as users and Slurm write them, the clock, and signals."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paths import PYTHONPATH

from kdpipe.pipeline.session.signals import exit_on_signal, handle_signals, parse_duration, process_age_s
from kdpipe.stages.errors import StoppedEarly


@given(st.tuples(*[st.integers(0, 99)] * 4).filter(any))
def test_durations_in_units_and_in_slurm_form(counts):
    wall_s = sum(count * unit_s for count, unit_s in zip(counts, (86400, 3600, 60, 1), strict=True))
    as_units = "".join(f"{count}{unit}" for count, unit in zip(counts, "dhms", strict=True) if count)
    days, hours, minutes, seconds = counts
    assert parse_duration(as_units) == wall_s
    assert parse_duration(f"{days}-{hours}:{minutes:02}:{seconds:02}") == wall_s


@pytest.mark.parametrize("text", ["", "0s", "0:00:00", "3", "3.5h", "-1h", "1h-", "h", "30m3h", "nan", "1" * 40 + "s"])
def test_invalid_durations_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match="is not a duration: write 3h30m"):
        parse_duration(text)


def test_max_duration_counts_from_process_start():
    age_s = process_age_s()
    assert age_s > 0
    with handle_signals(age_s + 1000) as stop:
        assert not stop()
    with handle_signals(age_s) as stop:
        assert stop()
        assert "--max-duration" in stop.reason


def test_a_signal_sets_the_flag_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedEarly, match="at SIGUSR1"), handle_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # the first one is the reason
        assert stop()
        raise StoppedEarly
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_sigint_aborts():
    with pytest.raises(KeyboardInterrupt), handle_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)


def test_exit_on_signal_stops_at_once():
    with pytest.raises(StoppedEarly, match="at SIGTERM"), exit_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")


def test_sighup_ignored_by_nohup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_the_imports_exits_with_75():
    code = (
        "import os, signal, sys; from kdpipe.pipeline import entry\n"
        "assert not {'typer', 'numpy', 'torch'} & set(sys.modules)\n"
        "entry.exit_at_signals(); os.kill(os.getpid(), signal.SIGTERM)"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (ended.returncode, ended.stdout) == (75, "")
    assert ended.stderr.startswith("kdpipe: stopped early at SIGTERM; all finished work is saved. Run the same command")
