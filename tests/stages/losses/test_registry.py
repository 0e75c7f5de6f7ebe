"""Registered losses, references to losses, and the entries of recipes that name them."""

import json
import sys

import pytest
from jsonschema import Draft202012Validator
from support import user_losses

from kdpipe.losses import KD, LogitLoss
from kdpipe.pipeline.recipe.load import all_losses, parse_recipe, read_run_recipe, recipe_json
from kdpipe.pipeline.recipe.schema import recipe_json_schema
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.describe import find_loss, list_losses
from kdpipe.stages.losses.registry import LOSSES, UnknownLoss, loss_class, register_loss

RECIPE = {"name": "r", "teacher": {"model": {"name": "cnn"}, "train": {}}, "student": {"model": {"name": "cnn"}}}
REFERENCE = "python:support.user_losses:"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Forget what a test registers."""
    monkeypatch.setattr(LOSSES, "_registered", {})


def recipe(*entries, **sections):
    return parse_recipe(RECIPE | {"distill": list(entries)} | sections, "r.toml")


def fault(*entries, **sections):
    with pytest.raises(RecipeError) as refusal:
        recipe(*entries, **sections)
    return str(refusal.value)


def test_registered_loss_is_named_in_recipes():
    register_loss("mae")(user_losses.logit_mae)
    loss = recipe({"loss": "mae", "margin": 0.5}).distill[0]
    assert (loss.loss, loss.margin, loss.weight) == ("mae", 0.5, 1.0)
    assert isinstance(loss, loss_class("mae"))


def test_decorated_class_keeps_its_name_and_makes_entries():
    @register_loss
    class Mine(LogitLoss):
        """Mine."""

        slope: float = 1.0

        def compute(self, inputs):
            return self.slope * inputs.student.logits.sum(1)

    assert (Mine.__name__, Mine(slope=2).loss, LOSSES.get("Mine")) == ("Mine", "Mine", Mine)
    assert recipe({"loss": "Mine", "slope": 2}).distill == (Mine(slope=2.0),)


@pytest.mark.parametrize("name", ["logit_mae", "batch_spread", "Projected", "LogitMAE"])
def test_reference_needs_no_registration(name):
    read = recipe({"loss": REFERENCE + name, "weight": 2})
    assert read.distill[0].loss == REFERENCE + name
    assert parse_recipe(json.loads(json.dumps(recipe_json(read))), "again") == read


def test_reference_to_a_registered_class_is_that_class():
    mae = register_loss("mae")(user_losses.LogitMAE)
    kind = loss_class(REFERENCE + "LogitMAE")
    assert kind().source_digests() == mae().source_digests()
    assert issubclass(kind, user_losses.LogitMAE)


def test_compare_variants_take_losses_of_users():
    read = recipe(compare={"distill": {"distill": [{"loss": REFERENCE + "logit_mae", "margin": 1}]}})
    assert all_losses(read)["compare.distill.distill"][0].margin == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"loss": REFERENCE + "logit_mae", "margn": 1}, "unknown key 'distill.0.margn'; did you mean 'margin'?"),
        ({"loss": REFERENCE + "logit_mae", "margin": "x"}, "distill.0.margin = x: it must be a number."),
        ({"loss": REFERENCE + "ChannelMeans"}, "the key 'distill.0.layers' is missing: give it a value."),
        ({"loss": REFERENCE + "logit_mea"}, "support.user_losses has no function logit_mea; did you mean 'logit_mae'"),
        ({"loss": REFERENCE + "no_loss"}, "takes (images): it must take (student_logits, teacher_logits)"),
        ({"loss": REFERENCE + "nn"}, "has no function nn"),
        ({"loss": "python:no_such_module:f"}, "distill.0.loss='python:no_such_module:f': the module no_such_module"),
        ({"loss": "python:"}, "distill.0.loss='python:' must read python:package.module:function."),
        ({"loss": "python:os:system:echo"}, "has no function system:echo"),
        ({"loss": "magic"}, "distill.0: unknown loss 'magic'; choose from kd, dkd, "),
        ({"loss": "dkdd"}, "distill.0: unknown loss 'dkdd'; did you mean 'dkd'?"),
        ({"loss": ["kd"]}, "distill.0: "),
        ({"weight": 3}, "distill.0: the loss is missing: choose from kd, dkd, "),
    ],
)
def test_faults_of_entries_name_the_key(entry, message):
    text = fault(entry)
    assert text.startswith("r.toml: ")
    assert message in text
    assert "\n" not in text
    variant = fault(compare={"distill": {"distill": [entry]}})
    assert message.replace("distill.0", "compare.distill.distill.0") in variant


def test_registered_losses_are_listed_and_in_the_schema():
    register_loss("mae")(user_losses.LogitMAE)
    listed = {loss.name: loss for loss in list_losses()}
    assert listed["mae"].module == "support.user_losses"
    assert listed["mae"].origin == "Ours 2026, from support.user_losses"
    assert listed["kd"].module is None
    schema = recipe_json_schema()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for entry, is_valid in (
        ({"loss": "mae", "margin": 1}, True),
        ({"loss": "mae", "margn": 1}, False),
        ({"loss": REFERENCE + "x", "any": 1}, True),
        ({"loss": "mea"}, False),
    ):
        assert validator.is_valid(RECIPE | {"distill": [entry]}) == is_valid, entry


def test_names_are_unique_but_a_cell_may_run_twice():
    for _ in range(2):
        register_loss("mae")(user_losses.logit_mae)
    with pytest.raises(RecipeError, match="there is a loss called 'mae' already"):
        register_loss("mae")(user_losses.LogitMAE)
    with pytest.raises(RecipeError, match="there is a loss called 'kd' already"):
        register_loss("kd")(user_losses.logit_mae)


@pytest.mark.parametrize("name", ["python:a:b", "../x", "a b", "ä", "a\n", "-x"])
def test_odd_names_are_refused(name):
    with pytest.raises(RecipeError, match="cannot name a loss"):
        register_loss(name)(user_losses.logit_mae)


def test_unknown_reference_is_explained():
    with pytest.raises(RecipeError, match="the module nowhere cannot be imported"):
        find_loss("python:nowhere:f")


def test_recipe_of_a_run_is_read_without_importing_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange_losses.py").write_text("raise SystemExit('imported')")
    entries = [{"loss": "python:strange_losses:f", "weight": 2.0, "keys": [1]}, {"loss": "gone"}, {"loss": "kd"}]
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | {"distill": entries}))
    read = read_run_recipe(tmp_path)
    assert read.distill == (
        UnknownLoss(loss="python:strange_losses:f", weight=2.0, settings={"keys": [1]}),
        UnknownLoss(loss="gone", settings={}),
        KD(),
    )
    assert "strange_losses" not in sys.modules
