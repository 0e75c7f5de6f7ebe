"""Progress on stderr: rate and time left, bars on a terminal of any width, lines in a log, and JSON lines."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console
from support.tiny_run import TEACHER

from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.recipe.planned_jobs import planned_jobs
from kdpipe.pipeline.terminal import output, progress, rate, reporter, whole_run
from kdpipe.pipeline.terminal.output import Verbosity
from kdpipe.pipeline.terminal.progress import MAX_BARS, Bars
from kdpipe.pipeline.terminal.progress import reporter as open_reporter
from kdpipe.pipeline.terminal.rate import Rate, duration_text, rate_text
from kdpipe.pipeline.terminal.whole_run import WholeRun
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.runtime.events import WARNING, ProgressEvent
from kdpipe.stages.views.config import Views

RECIPE = Recipe(
    name="tiny", teacher=TEACHER, student=StudentConfig(model=TEACHER.model, seeds=(0, 1)), views=Views(num_views=4)
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    for module in (rate, progress, reporter, whole_run):
        monkeypatch.setattr(module, "time", fake)
    return fake


def step(number, total=3000, job="student distilled, seed 0", **metrics):
    return ProgressEvent("train-student", job, number, total, "step", metrics)


def stderr_of(monkeypatch, *, tty=False, term="xterm"):
    stream = io.StringIO()
    stream.isatty = lambda: tty
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    return stream


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def drawn(bars):
    """Return the lines that the bars take on the terminal."""
    out = Console(file=io.StringIO(), width=bars.progress.console.width)
    out.print(bars.progress.get_renderable())
    return out.file.getvalue().splitlines()


def test_a_resumed_job_counts_only_its_own_steps():
    pace = Rate.start(2000, 3000, now=0.0)
    assert pace.per_s() is None
    assert pace.eta_s(0.0) is None
    for second in range(1, 21):
        pace.update(2000 + 10 * second, 3000, float(second))
    assert pace.per_s() == pytest.approx(10)
    assert pace.eta_s(20.0) == pytest.approx(80)
    assert pace.eta_s(25.0) == pytest.approx(75)  # it counts down between events


def test_a_rate_follows_a_change_within_two_minutes():
    pace = Rate.start(0, 10**6, now=0.0)
    for second in range(1, 301):
        pace.update(100 * second, 10**6, float(second))
    for second in range(301, 421):
        pace.update(30_000 + 10 * (second - 300), 10**6, float(second))
    assert 10 < pace.per_s() < 13


def test_slow_steps_have_a_rate_over_several_of_them():
    pace = Rate.start(1, 100, now=0.0)
    for number, now in ((2, 300.0), (3, 900.0), (4, 1200.0)):
        pace.update(number, 100, now)
    assert 1 / 600 < pace.per_s() < 1 / 300


def test_a_second_round_under_the_same_name_has_its_own_rate():
    pace = Rate.start(0, 100, now=0.0)
    pace.update(100, 100, 1.0)
    pace.update(1, 100, 2.0)
    assert pace.per_s() is None
    pace.update(3, 100, 3.0)
    assert pace.per_s() == pytest.approx(2)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1234.4, "1,234 images/s"), (2.53, "2.5 images/s"), (0.5, "30 images/min"), (0.001, "3.6 images/h"), (None, "")],
)
def test_a_rate_has_a_readable_unit(rate, text):
    assert rate_text(rate, "image") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(34.2, "34 s"), (720, "12 min"), (7500, "2 h 05 min"), (273_600, "3 d 4 h"), (float("inf"), "forever")],
)
def test_a_duration_has_a_readable_unit(seconds, text):
    assert duration_text(seconds) == text


def test_a_log_has_the_first_and_last_line_and_one_every_10_s(monkeypatch, clock):
    log = stderr_of(monkeypatch)
    with open_reporter(as_json=False) as report:
        for number in range(1, 3001):
            report(step(number))
            clock.now += 1 / 64
        report(step(3000, accuracy=0.9812, losses={"kd": 0.3, "hard_labels": 0.1}))
    lines = log.getvalue().splitlines()
    assert lines[0] == "train-student: student distilled, seed 0: step 1/3000 (0 %)"
    assert lines[1] == "train-student: student distilled, seed 0: step 641/3000 (21 %), 64 steps/s, 37 s left"
    assert lines[-1].endswith(
        "step 3000/3000 (100 %), in 47 s at 64 steps/s, test accuracy 98.12 %, loss 0.4 (kd + hard_labels)"
    )
    assert len(lines) == 6


def test_json_lines_have_time_rate_and_eta(monkeypatch, clock):
    log = stderr_of(monkeypatch)
    with open_reporter(as_json=True) as report:
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
def test_every_warning_is_shown_at_once(monkeypatch, clock, as_json):
    log = stderr_of(monkeypatch)
    with open_reporter(as_json) as report:
        for _ in range(2):
            report(ProgressEvent("data", "an image is odd", 1, 1, WARNING))
    assert log.getvalue().count("an image is odd") == 2


@pytest.mark.parametrize(("tty", "as_json"), [(False, False), (False, True), (True, False)])
def test_quiet_shows_warnings_only(monkeypatch, tty, as_json):
    monkeypatch.setattr(output, "_verbosity", Verbosity.QUIET)
    log = stderr_of(monkeypatch, tty=tty)
    with open_reporter(as_json) as report:
        report(step(1))
        report(ProgressEvent("data", "an image is odd", 1, 1, WARNING))
    assert log.getvalue().count("\n") == 1
    assert "an image is odd" in log.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_broken_pipe_does_not_end_a_job(monkeypatch, as_json):
    log = stderr_of(monkeypatch)
    log.write = lambda text: (_ for _ in ()).throw(BrokenPipeError())
    with open_reporter(as_json) as report:
        report(step(1))


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch):
    log = stderr_of(monkeypatch, tty=True, term="dumb")
    with open_reporter(as_json=False) as report:
        report(step(1))
    assert log.getvalue() == "train-student: student distilled, seed 0: step 1/3000 (0 %)\n"


@pytest.mark.parametrize("width", [20, 45, 80, 200])
@pytest.mark.parametrize("job", ["store.zarr", "数" * 60, "\x1b[31m\n" + "a" * 300])
def test_a_bar_fits_a_terminal_of_any_width(clock, width, job):
    bars = Bars(terminal(width))
    for number in (1, 123_456):
        bars.report(step(number, 10**6, job, epoch=1, accuracy=0.9812, losses={"kd": 0.4}))
        clock.now += 10
    (line,) = drawn(bars)
    assert cell_len(line) <= width
    assert line.isprintable()


def test_a_whole_run_is_above_its_network(clock):
    whole = WholeRun(planned_jobs(RECIPE, ("train-teacher", "cache-teacher", "train-student")))
    bars = Bars(terminal(), whole)
    for number in (1, 1501):
        losses = {"hard_labels": 1.0, "kd_0": 2.0, "hint_1": 0.5}
        bars.report(step(number, 3000, "student alone, seed 1", accuracy=0.5, losses=losses))
        clock.now += 15
    first, second = drawn(bars)
    assert "stage 3 of 3, seed 2 of 2" in first and "4/6" in first and "left for all" in first
    assert "student alone, seed 1" in second and "100 steps/s" in second and "…" not in first + second
    line = progress.plain_line(step(1501, 3000, "student alone, seed 1"), Rate.start(1, 2, clock.now), whole)
    assert line.endswith("(stage 3 of 3, seed 2 of 2, about 30 s left for all)")


def test_a_bar_on_80_columns_has_name_steps_rate_and_time_left(clock):
    bars = Bars(terminal())
    for number in (1000, 1850):
        bars.report(step(number))
        clock.now += 10
    (line,) = drawn(bars)
    for part in ("student distilled, seed 0", "1850/3000", "85 steps/s", "14 s left"):
        assert part in line


def test_a_finished_job_becomes_one_line(clock):
    out = terminal()
    bars = Bars(out)
    for seed in range(20):
        for number in (1, 2, 3):
            bars.report(step(number, 3, f"student {seed}", **({"epoch": 0, "accuracy": 0.5} if number == 3 else {})))
            clock.now += 1
    bars.report(step(1, 3, "student 20"))
    printed = out.file.getvalue().splitlines()
    assert printed[0] == "student 0: 3 steps in 2 s, test accuracy 50.00 %"
    assert len(printed) == 20
    assert ["student 20" in line for line in drawn(bars)] == [True]


def test_jobs_without_further_events_do_not_fill_the_screen(clock):
    bars = Bars(terminal())
    for number in range(50):
        bars.report(step(1, 3, f"store {number}"))
    assert len(drawn(bars)) == MAX_BARS


def test_running_jobs_are_kept_as_lines_at_the_end(monkeypatch):
    screen = stderr_of(monkeypatch, tty=True)
    monkeypatch.setattr(progress, "console", lambda file: Console(file=file, force_terminal=True, width=80))
    with open_reporter(as_json=False) as report:
        report(step(7))
    assert screen.getvalue().endswith("train-student: student distilled, seed 0: step 7/3000 (0 %)\n")


def test_a_closed_stderr_is_not_interactive(monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: (_ for _ in ()).throw(ValueError())))
    assert not progress._is_interactive()
