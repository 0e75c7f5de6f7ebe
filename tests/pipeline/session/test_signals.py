"""When a job is to stop: durations as people and Slurm write them, the clock, and signals."""

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.session.signals import parse_duration, process_age_s, stop_at_once, stop_when_asked
from stages.errors import StoppedEarly


@given(st.tuples(*[st.integers(0, 99)] * 4).filter(any))
def test_a_duration_is_the_sum_of_its_units_in_people_s_and_in_slurm_s_writing(counts):
    wall_s = sum(count * unit_s for count, unit_s in zip(counts, (86400, 3600, 60, 1), strict=True))
    as_people = "".join(f"{count}{unit}" for count, unit in zip(counts, "dhms", strict=True) if count)
    days, hours, minutes, seconds = counts
    assert parse_duration(as_people) == wall_s
    assert parse_duration(f"{days}-{hours}:{minutes:02}:{seconds:02}") == wall_s


@pytest.mark.parametrize("text", ["", "0s", "0:00:00", "3", "3.5h", "-1h", "1h-", "h", "30m3h", "nan", "1" * 40 + "s"])
def test_what_is_no_duration_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="is no duration: write 3h30m"):
        parse_duration(text)


def test_the_clock_counts_from_the_start_of_the_process():
    age_s = process_age_s()
    assert age_s > 0
    with stop_when_asked(age_s + 1000) as stop:
        assert not stop()
    with stop_when_asked(age_s) as stop:
        assert stop()
        assert "--max-duration" in stop.reason


def test_a_signal_sets_the_flag_and_is_named_and_what_was_handled_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedEarly, match="at SIGUSR1"), stop_when_asked() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # what came first is the reason
        assert stop()
        raise StoppedEarly
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_sigint_breaks_off():
    with pytest.raises(KeyboardInterrupt), stop_when_asked() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)


def test_what_has_nothing_to_save_stops_where_it_stands():
    with pytest.raises(StoppedEarly, match="at SIGTERM"), stop_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")


def test_a_hangup_that_nohup_took_away_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_when_asked() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)
