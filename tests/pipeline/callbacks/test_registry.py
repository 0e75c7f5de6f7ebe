"""Callbacks in a recipe: faults that `recipe check` finds, and those that are built."""

import pytest
from support.kdpipe_process import RECIPE

from kdpipe.pipeline.callbacks.files import CSVLogger
from kdpipe.pipeline.callbacks.registry import CALLBACKS, build_callbacks, callback_faults
from kdpipe.pipeline.callbacks.tracker import Tracker
from kdpipe.pipeline.recipe.check import check_recipe
from kdpipe.stages.errors import RecipeError

MODULE = """
from kdpipe.stages.runtime.callbacks import Callback

class EarlyStopping(Callback):
    def __init__(self, patience, metric="accuracy"):
        if patience < 1:
            raise ValueError("patience is too low")
        self.patience = patience

class Nothing:
    pass

def quiet(**settings):
    return EarlyStopping(**settings)
"""
STOPPING = "python:my_callbacks:EarlyStopping"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    (tmp_path / "my_callbacks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def test_names_and_tables_are_built_in_order():
    entries = ["csv", {"name": STOPPING, "patience": 3}, {"name": "wandb", "entity": "me"}]
    first, second, third = build_callbacks(entries)
    assert (type(first), second.patience) == (CSVLogger, 3)
    assert (type(third), third.name, third.settings) == (Tracker, "wandb", {"entity": "me"})
    assert build_callbacks([{"name": "python:my_callbacks:quiet", "patience": 2}])[0].patience == 2


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("csw", "callbacks: there is no callback 'csw'; did you mean 'csv'"),
        ({"name": STOPPING, "patienc": 3}, "EarlyStopping has no argument 'patienc'; did you mean 'patience'?"),
        ({"name": "csv", "path": "x"}, "callbacks.0: csv has no argument 'path'; it takes none."),
        (STOPPING, "EarlyStopping needs the argument 'patience'"),
        ("python:my_callbacks:EarlyStop", "my_callbacks has no function EarlyStop; did you mean 'EarlyStopping'"),
        (CSVLogger, "give a callback object, a name, or a table"),
        ("python:no_such_module:X", "the module no_such_module cannot be imported"),
    ],
)
def test_faults_are_found_before_anything_is_built(entry, fault):
    (found,) = callback_faults([entry])
    assert fault in found
    with pytest.raises(RecipeError) as caught:
        build_callbacks([entry])
    assert str(caught.value) == found


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"name": STOPPING, "patience": 0}, r"callbacks.0 .* cannot be built \(ValueError: patience is too low\)"),
        ("python:my_callbacks:Nothing", "is a Nothing, not a callback: derive it from kdpipe.Callback"),
    ],
)
def test_what_is_no_callback_is_refused(entry, fault):
    with pytest.raises(RecipeError, match=fault):
        build_callbacks([entry])


@pytest.mark.parametrize("value", ["3", "[{}]", "[{ name = 3 }]", '[""]', "[[]]"])
def test_recipe_check_names_a_callback_without_a_name(tmp_path, value):
    assert "callbacks" in faults(tmp_path, value)


def test_recipe_check_finds_a_wrong_argument(tmp_path):
    assert "did you mean 'patience'?" in faults(tmp_path, f'["csv", {{ name = "{STOPPING}", patiense = 3 }}]')


def faults(folder, value):
    """The faults of a recipe with these callbacks."""
    (folder / "r.toml").write_text(f"callbacks = {value}\n{RECIPE}")
    found = check_recipe(folder / "r.toml", (), {}).faults
    assert len(found) == 1, found
    return found[0]


def test_a_registered_callback_is_found_by_name():
    CALLBACKS.register("mine")(CSVLogger)
    try:
        assert type(build_callbacks(["mine"])[0]) is CSVLogger
    finally:
        del CALLBACKS._registered["mine"]
