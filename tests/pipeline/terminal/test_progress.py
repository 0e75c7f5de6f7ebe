"""What people see of a job: its rate and time left, on a terminal of any width, in a log, and as JSON lines."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console

from pipeline.session import event_log as events
from pipeline.terminal import bars, progress
from pipeline.terminal.bars import Bars, JobDrawn, bar_line
from pipeline.terminal.progress import reporter
from pipeline.terminal.rate import Pace, duration_text, rate_text
from stages.watch import WARNING, Event


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (events, progress, bars):
        monkeypatch.setattr(module, "time", made)
    return made


def step(number, total=3000, job="distilled student, seed 0", **metrics):
    return Event("train-student", job, number, total, "step", metrics)


def stderr_of(monkeypatch, *, tty=False, term="xterm"):
    stream = io.StringIO()
    stream.isatty = lambda: tty
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    return stream


def test_a_resumed_jobs_rate_and_time_left_count_only_what_this_process_did():
    pace = Pace.start(2000, 3000, now=0.0)
    assert pace.rate_per_s() is None
    assert pace.eta_s(0.0) is None
    for second in range(1, 21):
        pace.went_to(2000 + 10 * second, 3000, float(second))
    assert pace.rate_per_s() == pytest.approx(10)
    assert pace.eta_s(20.0) == pytest.approx(80)
    assert pace.eta_s(25.0) == pytest.approx(75)  # it counts down between events


def test_a_rate_follows_a_change_within_a_minute_or_two():
    pace = Pace.start(0, 10**6, now=0.0)
    for second in range(1, 301):
        pace.went_to(100 * second, 10**6, float(second))
    for second in range(301, 421):
        pace.went_to(30_000 + 10 * (second - 300), 10**6, float(second))
    assert 10 < pace.rate_per_s() < 13


def test_steps_that_take_minutes_each_have_a_rate_over_several_of_them():
    pace = Pace.start(1, 100, now=0.0)
    for number, now in ((2, 300.0), (3, 900.0), (4, 1200.0)):
        pace.went_to(number, 100, now)
    assert 1 / 600 < pace.rate_per_s() < 1 / 300


def test_a_second_round_under_the_same_name_is_timed_afresh():
    pace = Pace.start(0, 100, now=0.0)
    pace.went_to(100, 100, 1.0)
    pace.went_to(1, 100, 2.0)
    assert pace.rate_per_s() is None
    pace.went_to(3, 100, 3.0)
    assert pace.rate_per_s() == pytest.approx(2)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1234.4, "1,234 images/s"), (2.53, "2.5 images/s"), (0.5, "30 images/min"), (0.001, "3.6 images/h"), (None, "")],
)
def test_a_rate_is_told_in_a_unit_in_which_it_can_be_read(rate, text):
    assert rate_text(rate, "image") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(34.2, "34 s"), (720, "12 min"), (7500, "2 h 05 min"), (273_600, "3 d 4 h"), (float("inf"), "for ever")],
)
def test_a_time_is_told_in_a_unit_in_which_it_can_be_read(seconds, text):
    assert duration_text(seconds) == text


def test_a_log_has_a_jobs_first_line_its_last_and_one_every_ten_seconds(monkeypatch, clock):
    log = stderr_of(monkeypatch)
    with reporter(as_json=False) as report:
        for number in range(1, 3001):
            report(step(number))
            clock.now += 1 / 64
        report(step(3000, accuracy=0.9812, losses={"kd": 0.3, "hard_labels": 0.1}))
    lines = log.getvalue().splitlines()
    assert lines[0] == "train-student: distilled student, seed 0: step 1/3000 (0 %)"
    assert lines[1] == "train-student: distilled student, seed 0: step 641/3000 (21 %), 64 steps/s, 37 s left"
    assert lines[-1].endswith("step 3000/3000 (100 %), in 47 s at 64 steps/s, test accuracy 98.12 %, loss 0.4")
    assert len(lines) == 6


def test_json_lines_keep_their_keys_and_add_moment_rate_and_time_left(monkeypatch, clock):
    log = stderr_of(monkeypatch)
    with reporter(as_json=True) as report:
        report(step(1))
        clock.now += 10
        report(step(101, accuracy=float("nan")))
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in log.getvalue().splitlines()]
    assert set(first) == {"time", "stage", "job", "step", "total", "unit", "metrics", "rate_per_s", "eta_s"}
    assert (first["rate_per_s"], first["eta_s"]) == (None, None)
    assert (second["rate_per_s"], second["eta_s"]) == (10, 289.9)
    assert second["metrics"] == {"accuracy": None}
    assert second["time"].endswith("Z")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_warning_is_told_at_once_however_many_there_are(monkeypatch, clock, as_json):
    log = stderr_of(monkeypatch)
    with reporter(as_json) as report:
        for _ in range(2):
            report(Event("data", "an image is odd", 1, 1, WARNING))
    assert log.getvalue().count("an image is odd") == 2


@pytest.mark.parametrize("as_json", [False, True])
def test_a_job_goes_on_when_nobody_reads_its_log_any_more(monkeypatch, as_json):
    log = stderr_of(monkeypatch)
    log.write = lambda text: (_ for _ in ()).throw(BrokenPipeError())
    with reporter(as_json) as report:
        report(step(1))


def test_a_terminal_that_cannot_redraw_a_line_gets_lines(monkeypatch):
    log = stderr_of(monkeypatch, tty=True, term="dumb")
    with reporter(as_json=False) as report:
        report(step(1))
    assert log.getvalue() == "train-student: distilled student, seed 0: step 1/3000 (0 %)\n"


@pytest.mark.parametrize("width", [*range(10, 60, 7), 80, 120, 200])
@pytest.mark.parametrize("job", ["store.zarr", "distilled student, seed 0", "数" * 60, "\x1b[31m\n" + "a" * 300])
@pytest.mark.parametrize("plain", [False, True])
def test_a_bar_fits_a_terminal_of_any_width(width, job, plain):
    pace = Pace.start(0, 10**6, now=0.0)
    pace.went_to(123_456, 10**6, 10.0)
    line = bar_line(
        JobDrawn(step(123_456, 10**6, job), pace, ["accuracy 98.12 %", "loss 0.4"]), 11.0, width, plain=plain
    )
    assert cell_len(line.plain) < width
    assert line.plain.isprintable()


def test_on_80_columns_a_bar_has_the_jobs_whole_name_steps_rate_and_time_left():
    pace = Pace.start(1000, 3000, now=0.0)
    pace.went_to(1850, 3000, 10.0)
    line = bar_line(JobDrawn(step(1850), pace, ["accuracy 98.12 %"]), 10.0, 80).plain
    for part in ("distilled student, seed 0", "1,850/3,000 steps", "85 steps/s", "14 s left"):
        assert part in line


def test_finished_jobs_leave_the_screen_as_one_line_each(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    drawn = Bars(console)
    for seed in range(20):
        for number in (1, 2, 3):
            drawn.report(step(number, 3, f"student {seed}", **({"epoch": 0, "accuracy": 0.5} if number == 3 else {})))
            clock.now += 1
    drawn.report(step(1, 3, "student 20"))
    printed = console.file.getvalue().splitlines()
    assert printed[0] == "student 0: 3 steps in 2 s, test accuracy 50.00 %"
    assert len(printed) == 20
    assert ["student 20" in line.plain for line in drawn.draw().renderables] == [True]


def test_jobs_that_are_never_heard_of_again_do_not_fill_the_screen(clock):
    drawn = Bars(Console(file=io.StringIO(), force_terminal=True, width=80))
    for number in range(50):
        drawn.report(step(1, 3, f"store {number}"))
    assert len(drawn.draw().renderables) == bars.MOST_LIVE


def test_a_terminal_sees_bars_and_keeps_what_was_under_way_at_the_end(monkeypatch):
    screen = stderr_of(monkeypatch, tty=True)
    monkeypatch.setattr(bars, "Console", lambda **asked: Console(file=screen, force_terminal=True, width=80))
    with reporter(as_json=False) as report:
        report(step(7))
    assert screen.getvalue().endswith("train-student: distilled student, seed 0: step 7/3000 (0 %)\n")


def test_stderr_that_is_gone_is_no_reason_to_stop(monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: (_ for _ in ()).throw(ValueError())))
    assert not progress._draws_bars()
