"""The course of a search on the page: Optuna's plots in the page's colors, and why they are left out."""

import re

import pytest
from support.report_page import made_run, page_of

optuna = pytest.importorskip("optuna")


def searched(folder, num_trials):
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    run = made_run(folder)
    (run / "search").mkdir()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = JournalStorage(JournalFileBackend(str(run / "search" / "journal.log")))
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=journal, study_name="made", direction="maximize", sampler=sampler)
    for _ in range(num_trials):
        trial = study.ask()
        value = trial.suggest_float("distill.0.temperature", 1, 20, log=True) / 40
        loss = trial.suggest_categorical("distill.1.loss", ["hint", "<b>off</b>"])
        study.tell(trial, value + 0.1 * (loss == "hint"))
    return run


def test_the_charts_of_a_search_are_on_the_page(tmp_path):
    run = searched(tmp_path / "run", 8)
    text, _, messages = page_of(run)
    section = text[text.index("Course of the search</h") :]
    charts = re.findall(r'<svg class="chart".*?</svg>', section, flags=re.DOTALL)[:4]
    titles = ["Trials, and the best so far", "Importance (PED-ANOVA)", "Trials by their settings", "by each setting"]
    for chart, title in zip(charts, titles, strict=True):
        assert title in chart and set(re.findall(r"(?:fill|stroke): #(\w+)", chart)) == set(), chart[:300]
        assert "<b>" not in chart
    assert "temperature" in charts[2] and "distill.0" not in charts[2]
    assert not any("Course of the search" in message for message in messages)
    assert page_of(run, file=tmp_path / "again.html")[0] == text


@pytest.mark.parametrize(("content", "why"), [(None, "0 trials of the search are complete"), ("{}\n", "damaged")])
def test_a_search_without_charts_says_why(tmp_path, content, why):
    run = searched(tmp_path / "run", 0)
    if content is not None:
        (run / "search" / "journal.log").write_text(content)
    assert why in page_of(run)[0]
