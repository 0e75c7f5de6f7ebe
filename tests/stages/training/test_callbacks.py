"""Callbacks: their hooks in order, stops that survive a kill, failures, and numbers that stay the same."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from types import SimpleNamespace

import pytest
import torch
from support.device import DEVICE
from support.tiny_run import STUDENT, TEACHER, TRAIN, StopAfter, make_tiny_store, open_tiny_spec, squares, tiny_context

from kdpipe.pipeline.steps import train_student, train_teacher
from kdpipe.stages.distillation.student_config import student_folder
from kdpipe.stages.errors import RunError, StoppedEarly
from kdpipe.stages.losses.features.fitnet import FitNet
from kdpipe.stages.models.weights.state_dict import weights_sha256
from kdpipe.stages.runtime.callbacks import HOOKS, Callback
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job_dir import JobDir

pytestmark = pytest.mark.usefixtures("without_onnx")

LONG = dataclasses.replace(TEACHER, train=dataclasses.replace(TRAIN, epochs=4))
STEPS = 9


class Recorder(Callback):
    """Records the state at each hook."""

    def __init__(self):
        self.states = []

    def calls(self, *hooks):
        return [(hook, state.epoch, state.global_step) for hook, state in self.states if hook in hooks]


def _recording(hook):
    return lambda self, state: self.states.append((hook, state))


for each in HOOKS:
    setattr(Recorder, each, _recording(each))


def stop_in(hook, epoch):
    """Return a callback that asks to stop in a hook, when so many epochs are finished."""

    def stop(self, state):
        if state.epoch == epoch:
            state.stop()

    return type("Stopper", (Callback,), {hook: stop})()


def train(folder, *callbacks, config=LONG, **more):
    return train_teacher(config, 0, tiny_context(folder, RunMonitor(callbacks=callbacks, **more)))


def train_in_pieces(folder, make, config=LONG):
    """Train with new callbacks after each stop; return the results and the number of stops."""
    for num_stops in range(100):
        try:
            return train(folder, *make(), config=config, should_stop=StopAfter(1 + num_stops % 4)), num_stops
        except StoppedEarly:
            continue
    raise AssertionError("it never ends")


def test_hooks_are_called_in_order_with_their_numbers(tmp_path):
    recorder = Recorder()
    train(tmp_path, recorder, config=TEACHER)
    assert recorder.calls("on_run_start", "on_epoch_end", "on_run_end") == [
        ("on_run_start", 0, 0),
        ("on_epoch_end", 1, STEPS),
        ("on_epoch_end", 2, 2 * STEPS),
        ("on_run_end", 2, 2 * STEPS),
    ]
    steps = [step for _, _, step in recorder.calls("on_step_end")]
    assert steps == list(range(1, 2 * STEPS + 1))
    saved = [step for _, _, step in recorder.calls("on_checkpoint")]
    assert saved == [*steps, 2 * STEPS]  # checkpoint_every_s = 0, and the last one
    _, last = recorder.states[-1]
    assert (last.stage, last.job, last.seed, last.folder) == ("train-teacher", "teacher", 0, tmp_path / "teacher")
    assert (last.num_epochs, last.steps_per_epoch, last.error) == (2, STEPS, None)
    assert last.metrics["accuracy"] == JobDir(tmp_path / "teacher").result()["accuracy"]
    assert set(last.metrics) - {"compute"} == {"epoch", "accuracy", "cross_entropy", "losses", "lr", "wall_s"}


def test_the_weights_are_those_that_are_evaluated(tmp_path):
    digests = {}

    class Digest(Callback):
        def on_step_end(self, state):
            digests["step"] = weights_sha256(state.model)

        def on_epoch_end(self, state):
            digests["epoch"] = weights_sha256(state.model)

        def on_run_end(self, state):
            digests["run"] = weights_sha256(state.model)

    config = dataclasses.replace(TEACHER, train=dataclasses.replace(TRAIN, ema_decay=0.9))
    exported = train(tmp_path, Digest(), config=config)["identity"]["weights_sha256"]
    assert digests["epoch"] == digests["run"] == exported != digests["step"]


def test_a_resumed_training_starts_its_callbacks_again(tmp_path):
    recorder = Recorder()
    with pytest.raises(StoppedEarly):
        train(tmp_path, recorder, should_stop=StopAfter(3))
    assert isinstance(recorder.states[-1][1].error, StoppedEarly)
    assert recorder.calls("on_run_start", "on_run_end") == [("on_run_start", 0, 0), ("on_run_end", 0, 3)]
    resumed = Recorder()
    train(tmp_path, resumed)
    assert resumed.calls("on_run_start") == [("on_run_start", 0, 3)]
    assert resumed.calls("on_step_end")[0] == ("on_step_end", 0, 4)
    finished = Recorder()
    train(tmp_path, finished)
    assert finished.states == []


@pytest.mark.parametrize(("hook", "epoch"), [("on_run_start", 0), ("on_step_end", 0), ("on_epoch_end", 1)])
def test_a_stop_ends_the_training_after_the_epoch(tmp_path, hook, epoch):
    result = train(tmp_path, stop_in(hook, epoch), Recorder())
    assert (result["num_epochs"], result["stopped_by"]) == (1, "Stopper")
    lines = JobDir(tmp_path / "teacher").metrics.read_text().splitlines()
    assert [json.loads(line)["stopped_by"] for line in lines] == ["Stopper"]
    again = Recorder()
    assert train(tmp_path, again) == result
    assert again.states == []


@pytest.mark.parametrize("validates", [False, True])
def test_a_stop_by_the_test_images_is_told(tmp_path, validates):
    said = []
    context = tiny_context(
        tmp_path, RunMonitor(lambda event: said.append(event.job), callbacks=[stop_in("on_epoch_end", 1)])
    )
    validation = dataclasses.replace(squares(40, 5), split="validation") if validates else None
    train_teacher(LONG, 0, dataclasses.replace(context, validation_set=validation))
    assert any("Stopper" in line and "data.validation_share" in line for line in said) != validates


def test_a_stop_in_the_last_epoch_changes_nothing(tmp_path):
    assert "stopped_by" not in train(tmp_path, stop_in("on_epoch_end", 4))


def test_a_stopped_training_in_pieces_is_bit_identical(tmp_path):
    whole = train(tmp_path / "whole", stop_in("on_step_end", 1))
    pieces, num_stops = train_in_pieces(tmp_path / "pieces", lambda: [stop_in("on_step_end", 1)])
    assert num_stops > 4
    assert (whole["num_epochs"], pieces["stopped_by"]) == (2, "Stopper")
    one, other = (JobDir(tmp_path / name / "teacher").model.read_bytes() for name in ("whole", "pieces"))
    assert one == other


def test_a_stop_survives_a_kill_before_the_results(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(JobDir, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stop_in("on_epoch_end", 1))
    recorder = Recorder()
    result = train(tmp_path, recorder)  # without the callback that stopped it
    assert (result["num_epochs"], result["stopped_by"]) == (1, "Stopper")
    assert recorder.calls("on_step_end") == []


class Meddler(Callback):
    """Draws random numbers, and runs the network in eval mode with gradients."""

    def on_step_end(self, state):
        torch.rand(3, device=DEVICE)
        state.model.eval()
        state.model(torch.rand(2, 1, 8, 8).to(DEVICE)).sum().backward()

    on_run_start = on_epoch_end = on_checkpoint = on_run_end = on_step_end


def test_callbacks_do_not_change_the_numbers(tmp_path):
    for folder, callbacks in (("without", ()), ("with", (Meddler(),))):
        context = tiny_context(tmp_path / folder, RunMonitor(callbacks=callbacks))
        path = make_tiny_store(tiny_context(tmp_path / folder))
        spec = open_tiny_spec(path, context)
        hint = FitNet(layers=(("stage2", "stage2"),), stage_epochs=1)
        train_student(STUDENT, 0, spec.with_losses([*spec.losses, hint]), context)
    one, other = (student_folder(tmp_path / name, "distilled", 0).model for name in ("without", "with"))
    assert one.read_bytes() == other.read_bytes()


def failing(hook):
    def fail(self, *_):
        raise ValueError("no disk")

    return type("Broken", (Callback,), {hook: fail})()


@pytest.mark.parametrize("hook", [*HOOKS, "load_state_dict", "state_dict"])
def test_a_failing_callback_is_named_and_work_is_kept(tmp_path, hook):
    recorder = Recorder()
    with pytest.raises(RunError, match=rf"the callback Broken failed in {hook} \(ValueError: no disk\)"):
        train(tmp_path, recorder, failing(hook))
    if hook in ("on_step_end", "on_epoch_end"):
        assert isinstance(recorder.states[-1][1].error, RunError)
    assert train(tmp_path)["num_epochs"] == 4


def test_a_state_that_is_not_json_is_refused(tmp_path):
    broken = type("Broken", (Callback,), {"state_dict": lambda self: {"tensor": torch.zeros(1)}})()
    with pytest.raises(RunError, match="Broken failed in state_dict .*not JSON serializable"):
        train(tmp_path, broken)


def early_stopping():
    """Return the class in the example of the contract."""
    example = inspect.getdoc(Callback).partition("improves:\n\n")[2]
    scope = {"kd": SimpleNamespace(Callback=Callback)}
    exec(textwrap.dedent(example), scope)
    return scope["EarlyStopping"]


def test_the_example_stops_alike_with_and_without_kills(tmp_path):
    kind, config = early_stopping(), dataclasses.replace(LONG, train=dataclasses.replace(TRAIN, epochs=30, lr=0.5))
    whole = train(tmp_path / "whole", kind(patience=2), config=config)
    assert whole["stopped_by"] == "EarlyStopping"
    assert whole["num_epochs"] == whole["best_epoch"] + 1 + 2 < 30
    pieces, num_stops = train_in_pieces(tmp_path / "pieces", lambda: [kind(patience=2)], config)
    assert num_stops > 4
    assert pieces["num_epochs"] == whole["num_epochs"]


def test_each_training_begins_with_an_empty_state(tmp_path):
    loaded = []

    class Counter(Callback):
        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, saved):
            loaded.append(dict(saved))
            self.count = saved.get("count", 0)

        def on_step_end(self, state):
            self.count += 1

    counter, twin = Counter(), Counter()
    with pytest.raises(StoppedEarly):
        train(tmp_path / "one", counter, twin, should_stop=StopAfter(3))
    train(tmp_path / "two", counter, twin)
    train(tmp_path / "one", counter, twin)
    assert loaded == [{}, {}, {}, {}, {"count": 3}, {"count": 3}]


def test_the_losses_so_far_can_be_read_at_each_step(tmp_path):
    seen = []

    class Reader(Callback):
        def on_step_end(self, state):
            seen.append(state.mean_losses()["hard_labels"])

    train(tmp_path, Reader(), config=TEACHER)
    lines = JobDir(tmp_path / "teacher").metrics.read_text().splitlines()
    assert [json.loads(line)["losses"]["hard_labels"] for line in lines] == [seen[STEPS - 1], seen[-1]]
