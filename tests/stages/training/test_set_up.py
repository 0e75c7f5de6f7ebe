"""Tests of how a student's steps are computed: precision, memory format, and the trial that chooses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.device import needs_cpu
from support.tiny_training import equal_weights, tiny_job, tiny_network, trained, trained_in_pieces
from support.trials import later_is_faster
from torch import nn

from kdpipe.stages.compute import settings as compute
from kdpipe.stages.compute import threads
from kdpipe.stages.compute.settings import EXACT, ComputeSettings
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.events import WARNING, RunMonitor
from kdpipe.stages.training import set_up
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.set_up import candidates, compile_key, require_compilable, resumed_settings
from kdpipe.stages.training.task import TrainingTask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CHANNELS_LAST = ComputeSettings(memory_format="channels_last")


@pytest.fixture(autouse=True)
def has_bfloat16(monkeypatch):
    monkeypatch.setattr(compute, "has_bfloat16", lambda: True)


@pytest.fixture
def trial(monkeypatch):
    """Let every job have a trial, whose last candidate is the fastest; returns the candidates of each."""
    trials = []
    monkeypatch.setattr(set_up, "is_worth_a_trial", lambda num_macs, device: True)

    def fake_times(runs, device, **_):
        trials.append(list(runs))
        return later_is_faster(runs, device)

    monkeypatch.setattr(set_up, "time_on_one_thread", fake_times)
    return trials


@pytest.fixture
def cores(monkeypatch):
    """Let the process have 2 cores, and leave the number of threads to its jobs."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "num_cores", lambda: 2)
    threads.set_up_threads(None)
    yield 2
    threads.set_up_threads(before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "keys", [{"precision": "bfloat16"}, {"memory_format": "channels_last"}], ids=["bfloat16", "channels_last"]
)
def test_equal_runs_and_resumed_ones_have_equal_bits(tmp_path, keys, optimizer):
    keys = {**keys, "optimizer": optimizer, "ema_decay": 0.9}
    whole, history = trained(tmp_path / "whole", **keys)
    again, again_history = trained(tmp_path / "again", **keys)
    pieces, pieces_history = trained_in_pieces(tmp_path / "pieces", **keys)
    assert equal_weights(whole, again)
    assert equal_weights(whole, pieces)
    assert history == again_history == pieces_history
    exact, _ = trained(tmp_path / "exact", **{**keys, "precision": "float32", "memory_format": "contiguous"})
    assert "bfloat16" not in keys.values() or not equal_weights(whole, exact)
    assert all(parameter.is_contiguous() for parameter in whole.parameters())


@pytest.mark.usefixtures("traced")
def test_compiled_trainings_equal_plain_and_resumed_ones(tmp_path):
    said = []
    monitor = RunMonitor(lambda event: said.append(event.job) if event.unit == WARNING else None)
    whole, history = trained(tmp_path / "whole", monitor, compile=True)
    pieces, _ = trained_in_pieces(tmp_path / "pieces", compile=True)
    plain, plain_history = trained(tmp_path / "plain")
    assert equal_weights(whole, pieces) and equal_weights(whole, plain)  # traced, not fused: the same operations
    assert [line["losses"] for line in history] == [line["losses"] for line in plain_history]
    assert all(parameter.grad is None for parameter in whole.parameters())  # a CUDA graph's would be overwritten
    assert history[0]["compute"]["compile"] and "compute" not in plain_history[0]
    assert said == ["train.compile = true: the first step compiles the network, which may take a minute."]


def test_a_loss_on_the_gradient_by_pixels_is_not_compiled(tmp_path):
    job = tiny_job(tmp_path, tiny_network(), compile=True)
    task = replace(job.task, distillation=SimpleNamespace(configs={"at": SimpleNamespace(input_gradient=True)}))
    with pytest.raises(RecipeError, match=r"second derivative: set train\.compile = false"):
        compile_key(replace(job, task=task), CPU, RunMonitor())


def test_trainings_of_several_processes_are_not_compiled():
    with pytest.raises(RecipeError, match=r"this one has 2: set student\.train\.compile = false"):
        require_compilable("student.train.compile", CPU, 2)


@needs_cpu("there is no trial on CUDA")
def test_small_jobs_have_no_trial_and_count_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "count_macs", lambda model, shape: pytest.fail("counting takes seconds"))
    (_, history), (_, plain) = trained(tmp_path / "auto"), trained(tmp_path / "plain", memory_format="contiguous")
    assert history == plain
    assert "compute" not in history[0]


@needs_cpu("there is no trial on CUDA")
def test_a_trial_leaves_no_trace_and_is_recorded(tmp_path, trial, monkeypatch):
    chosen, history = trained(tmp_path / "auto")
    fast = ComputeSettings("bfloat16", "channels_last")
    assert trial == [[EXACT, CHANNELS_LAST, fast]]
    assert history[0]["compute"] == fast.to_json()
    explicit, _ = trained(tmp_path / "explicit", precision="bfloat16")
    assert equal_weights(chosen, explicit)


@needs_cpu("there is no trial on CUDA")
def test_a_resumed_job_continues_as_it_began(tmp_path, trial):
    pieces, _ = trained_in_pieces(tmp_path / "pieces")
    assert len(trial) == 1
    assert equal_weights(pieces, trained(tmp_path / "explicit", precision="bfloat16")[0])


@needs_cpu("there is no trial on CUDA")
def test_settings_in_which_a_network_fails_are_left_out(tmp_path, trial):
    class Contiguous(nn.Module):
        def forward(self, images):
            return images.view(len(images), -1)

    told, layers = [], list(tiny_network())
    layers[3] = Contiguous()
    job = tiny_job(tmp_path / "run", nn.Sequential(*layers))
    batches = job.task.stream(0, 32, epoch=0, step=0, epochs=2)
    chosen, _ = set_up.chosen_settings(job, CPU, batches, RunMonitor(told.append))
    assert chosen == EXACT
    assert [event.unit for event in told] == [WARNING, WARNING]
    assert told[0].job.startswith("test does not run in float32, channels_last (RuntimeError: view size")


def test_what_the_device_only_emulates_is_refused(tmp_path):
    with pytest.raises(
        RecipeError, match=r"train.precision = 'float16' is not .* 'auto' or one of float32, bfloat16\."
    ):
        candidates(tiny_job(tmp_path, tiny_network(), precision="float16"), CPU)


@pytest.mark.parametrize(
    ("fast", "precision"), [(("float16",), "float16"), (("tf32", "float16", "bfloat16"), "bfloat16")]
)
def test_cuda_takes_the_mixed_precision_of_its_hardware(tmp_path, monkeypatch, fast, precision):
    monkeypatch.setattr(set_up, "fast_precisions", lambda device: fast)
    assert candidates(tiny_job(tmp_path, tiny_network()), CUDA) == [ComputeSettings(precision, "channels_last")]
    assert candidates(tiny_job(tmp_path, nn.Linear(2, 2)), CUDA) == [ComputeSettings(precision)]


def test_a_loss_on_the_input_gradient_is_not_in_float16(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "fast_precisions", lambda device: ("float16",))
    monkeypatch.setattr(TrainingTask, "needs_input_gradient", True)
    job = tiny_job(tmp_path, nn.Linear(2, 2))
    assert candidates(job, CUDA) == [EXACT]
    with pytest.raises(RecipeError, match="or a loss cannot use it"):
        candidates(replace(job, config=TrainConfig(precision="float16")), CUDA)


def test_checkpoints_of_older_versions_are_contiguous(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "fast_precisions", lambda device: ("bfloat16",))
    job = tiny_job(tmp_path / "run", tiny_network())
    assert resumed_settings({}, job, CUDA, RunMonitor()) == ComputeSettings("bfloat16")
    assert resumed_settings({}, job, CPU, RunMonitor()) == EXACT


def test_another_device_continues_in_what_it_computes(tmp_path):
    told, job = [], tiny_job(tmp_path / "run", tiny_network())
    began = {"compute": ComputeSettings("float16", "channels_last").to_json()}
    assert resumed_settings(json.loads(json.dumps(began)), job, CPU, RunMonitor(told.append)) == EXACT
    assert told[0].job.startswith("test began in float16, which this device (cpu) does not compute in hardware")


def test_network_that_needs_contiguous_maps_has_them(tmp_path):
    class Viewed(nn.Module):
        def forward(self, images):
            return images.view(len(images), -1)

    layers = list(tiny_network())
    layers[3] = Viewed()
    (chosen,) = candidates(tiny_job(tmp_path, nn.Sequential(*layers), precision="bfloat16"), CPU)
    assert chosen == ComputeSettings("bfloat16")


@needs_cpu("there is no trial on CUDA")
def test_only_a_large_job_may_choose_more_threads(tmp_path, monkeypatch, cores):
    used = []
    monitor = RunMonitor(lambda event: used.append(torch.get_num_threads()))
    torch.set_num_threads(cores)
    trained(tmp_path / "small", monitor)
    assert set(used) == {1} and torch.get_num_threads() == cores, "for this job only"
    monkeypatch.setattr(set_up, "is_worth_a_trial", lambda num_macs, device: True)
    monkeypatch.setattr(threads, "time_in_turn", later_is_faster)
    del used[:]
    model, _ = trained(tmp_path / "large", monitor, precision="float32", memory_format="contiguous")
    assert set(used) == {cores}
    threads.set_up_threads(cores)
    of_set, _ = trained(tmp_path / "set", precision="float32", memory_format="contiguous")
    assert equal_weights(model, of_set), "the trial leaves no trace"
