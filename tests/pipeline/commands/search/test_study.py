"""The study of a search without its trainings: who takes which trial, with which settings, and what ends it early."""

import tomllib
from types import SimpleNamespace

import pytest
from support.kdpipe_process import RECIPE

from kdpipe.pipeline.commands.search.study import open_study
from kdpipe.pipeline.commands.search.trials import TrialWatch
from kdpipe.pipeline.recipe.load import parse_recipe
from kdpipe.stages.errors import RunError
from kdpipe.stages.runtime.events import RunMonitor

optuna = pytest.importorskip("optuna")

VALIDATED = RECIPE.replace("num_train = 200 }", "num_train = 200, validation_share = 0.2 }")
SPACE = """
distill.0.temperature = { low = 1, high = 20, log = true }
distill.1.loss = ["hint", "rkd", "off"]
distill.1.layers = { when = { "distill.1.loss" = ["hint"] }, choices = [[["stage1", "stage1"]]] }
student.train.epochs = { low = 2, high = 6, step = 2 }
"""


def opened(folder, more="", space=SPACE, num_epochs=6):
    folder.mkdir(exist_ok=True)
    recipe = parse_recipe(tomllib.loads(f"{VALIDATED}\n[search]\n{more}\n[search.space]\n{space}"), "r.toml")
    return open_study(folder, "tiny", recipe.search, recipe.space, num_epochs)


def told(search, value=0.5):
    """Take a trial and complete it with a value that depends on its settings; return them."""
    taken = search.take()
    settings = search.settings_of(search.trials()[taken.number])
    search.study.tell(taken.trial, value + settings["distill.0.temperature"] / 100)
    taken.give_back()
    return settings


def test_the_same_seed_makes_the_same_trials(tmp_path):
    first, again = opened(tmp_path / "a"), opened(tmp_path / "b")
    whole = [told(first) for _ in range(14)]  # more than TPE's random ones
    stopped = [told(again) for _ in range(5)] + [told(opened(tmp_path / "b")) for _ in range(9)]
    assert whole == stopped
    assert whole != [told(other) for other in [opened(tmp_path / "c", "seed = 1")] for _ in range(14)]


def test_settings_are_those_of_the_space(tmp_path):
    search = opened(tmp_path, 'sampler = "random"\ntrials = 30')
    for settings in (told(search) for _ in range(30)):
        assert 1 <= settings["distill.0.temperature"] <= 20 and settings["student.train.epochs"] in (2, 4, 6)
        assert ("distill.1.layers" in settings) == (settings["distill.1.loss"] == "hint")
        search.space.point(settings, "")  # a list, not its JSON text
    assert search.take() is None


def test_a_trial_is_one_worker_s_until_that_dies(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    taken, other = first.take(), second.take()
    assert (taken.number, other.number) == (0, 1)
    taken.give_back()  # as the system does when its process is killed
    again = second.take()
    assert again.number == 0
    assert second.settings_of(second.trials()[0]) == first.settings_of(first.trials()[0])
    assert first.take().number == 2


def test_a_worker_that_was_killed_while_it_chose_chooses_the_same(tmp_path):
    whole = told(opened(tmp_path / "a"))
    search = opened(tmp_path / "b")
    search.study.ask()  # no settings yet
    assert told(opened(tmp_path / "b")) == whole


def test_a_grid_tries_each_combination_once(tmp_path):
    space = 'distill.0.temperature = [1, 4]\nstudent.train.lr = [0.1, 0.2]\ndistill.1.loss = ["hint", "off"]'
    search = opened(tmp_path, 'sampler = "grid"', space)
    found = [told(search) for _ in range(search.num_trials)]
    assert len(found) == 8 and all(found.count(settings) == 1 for settings in found) and search.take() is None


def history(*accuracies):
    return [{"epoch": epoch, "accuracy": accuracy} for epoch, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
def test_hopeless_trials_end_and_others_do_not(tmp_path, pruner):
    search = opened(tmp_path, f'pruner = "{pruner}"\nreduction_factor = 2')
    watch, ended = TrialWatch(SimpleNamespace(monitor=RunMonitor()), prunes=True), []
    for number in range(8):
        taken = search.take()
        watch.begin(taken.trial, tmp_path)
        for epoch in range(6):
            watch.observe(history(*[0.9 - 0.1 * number] * (epoch + 1)), 6)
        ended.append(watch.is_pruned)
        state = optuna.trial.TrialState["PRUNED" if watch.is_pruned else "COMPLETE"]
        search.study.tell(taken.trial, None if watch.is_pruned else 0.9, state=state)
        taken.give_back()
    assert not ended[0] and any(ended) and watch() == ended[-1]


def test_an_interrupted_trial_reports_no_epoch_twice(tmp_path):
    search = opened(tmp_path)
    taken = search.take()
    watch = TrialWatch(SimpleNamespace(monitor=RunMonitor()), prunes=True)
    for lines in (history(0.1, 0.2), history(0.1, 0.2, 0.3)):
        watch.begin(taken.trial, tmp_path)  # the second time as another process that took it over
        watch.observe(lines, 6)
    assert search.trials()[0].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}


def test_a_damaged_journal_is_told_in_a_sentence(tmp_path):
    told(opened(tmp_path))
    with (tmp_path / "journal.log").open("a") as file:
        file.write('{"op_code": 4, "wor\n{}\n')
    with pytest.raises(RunError, match=r"journal\.log is damaged .*: remove its last line"):
        opened(tmp_path)
