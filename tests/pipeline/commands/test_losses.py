"""`kdpipe losses` lists the losses as a table and as JSON."""

import json

import pytest
from support.kdpipe_process import kdpipe_here

from kdpipe.stages.losses.registry import LOSSES

NAMES = ("kd", "dkd", "dist", "nkd", "mlld", "logit_mse", "hint", "fitnet", "at", "at_gradient", "nst", "vid")
NAMES += ("review_kd", "simkd", "rkd", "sp", "pkt", "cc", "crd", "ttm", "wttm", "wsld", "hard_distillation")
NAMES += ("pefd", "srd", "vkd", "cwd", "wkd_f", "ab", "fsp", "ofd", "gkl", "ft", "kdsvd", "srrl", "wkd_l", "cat_kd")


@pytest.fixture(scope="module")
def listed():
    """Return all losses by name, from the JSON document on stdout."""
    document = json.loads(kdpipe_here("losses", "--json").stdout)
    assert document["command"] == "losses"
    return {loss["name"]: loss for loss in document["losses"]}


def keys(loss):
    return {key["name"]: key for key in loss["keys"]}


def text_of(*arguments):
    """Return the printed text without line breaks."""
    ended = kdpipe_here("losses", *arguments)
    assert ended.exit_code == 0
    return " ".join(ended.stdout.split())


def test_every_loss_is_listed_with_its_paper(listed):
    assert [loss["paper"] for loss in listed.values()] == [kind.paper for kind in LOSSES.builtin.values()]
    assert set(NAMES) <= set(listed)
    assert listed["kd"]["paper"] == "Hinton et al. 2015, arXiv 1503.02531"


def test_table_has_one_row_per_loss_and_fits_120_columns(listed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = kdpipe_here("losses").stdout.splitlines()
    first_words = [line.split()[0] for line in lines if line.startswith("  ") and line[2:].strip() and line[2] != " "]
    assert [word for word in first_words if word in listed] == list(listed)
    assert max(map(len, lines)) <= 120


def test_descriptions_start_with_a_sentence(listed):
    assert all(loss["description"].partition("\n")[0].endswith(".") for loss in listed.values())


def test_every_key_has_a_description_from_the_docstrings(listed):
    for loss in listed.values():
        assert all(key["text"] for key in loss["keys"])
        assert "Attributes" not in loss["description"]
    assert keys(listed["sp"])["layers"]["text"].startswith("pairs of (student layer, teacher layer)")
    assert keys(listed["crd"])["samples.fraction"]["text"] == 'share of the batch that "hard" selects.'


@pytest.mark.parametrize(
    ("name", "requires"),
    [
        ("kd", "logits"),
        ("logit_mse", "logits of all classes"),
        ("at", "attention map [H, W] of each layer, at the student's size at most"),
        ("at_gradient", "input gradient's attention map [H, W]"),
        ("pkt", "pooled vector [C] of each layer"),
        ("sp", "map [C, H, W] of each layer"),
    ],
)
def test_required_outputs_of_the_teacher_are_listed(listed, name, requires):
    assert listed[name]["requires"] == requires
    assert f"Required of the teacher: {requires}." in text_of(name)


def test_properties_of_losses_are_listed(listed):
    assert {name for name in NAMES if not listed[name]["per_sample"]} == {
        *("dist", "mlld", "gkl", "rkd", "sp", "pkt", "cc", "srd")
    }
    assert {name for name in NAMES if listed[name]["one_label"]} == {"dkd", "nkd", "crd", "wsld", "gkl", "wkd_l"}
    assert [name for name in NAMES if listed[name]["whole_logits"]] == ["logit_mse", "gkl"]
    assert [name for name in NAMES if listed[name]["input_gradient"]] == ["at_gradient"]


def test_keys_have_defaults_and_types(listed):
    kd, crd = keys(listed["kd"]), keys(listed["crd"])
    assert (kd["weight"]["default"], kd["weight"]["type"]) == (0.9, "number >= 0 or schedule")
    assert (kd["temperature"]["default"], kd["temperature"]["type"]) == (4.0, "number > 0 or schedule")
    assert (crd["memory"]["default"], crd["memory"]["type"]) == ("store", '"store" or "bank"')
    assert (crd["dim"]["default"], crd["dim"]["type"]) == (128, "whole number >= 1")
    assert (crd["momentum"]["default"], crd["momentum"]["type"]) == (0.5, "number >= 0 and < 1")
    assert (crd["layers"]["required"], crd["layers"]["type"]) == (True, "list of [text, text], 1 or more")
    assert keys(listed["mlld"])["temperature_list"]["default"] == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert keys(listed["review_kd"])["mid_channels"]["default"] is None


def test_shared_keys_are_marked(listed):
    every = {"weight", "store", "samples.filter", "samples.fraction", "samples.weighting"}
    every |= {"view", "target_view", "target"}
    for name, loss in listed.items():
        shared = {key["name"]: key["shared_by"] for key in loss["keys"] if key["shared_by"]}
        assert {key for key, whose in shared.items() if whose == "every entry"} == every, name
        on_logits = {key for key, whose in shared.items() if whose == "losses on logits"}
        assert on_logits == ({"standardize", "rest"} if "logits" in loss["requires"] else set()), name


def test_one_loss_is_printed_in_full(listed):
    text = text_of("dkd")
    assert text.startswith("dkd: Zhao et al. 2022, arXiv 2203.08679 ")
    assert " ".join(listed["dkd"]["description"].split()) in text
    for key in ("warmup_epochs 20 whole number >= 0", "standardize false true or false", "beta 8.0 number >= 0"):
        assert key in text
    assert "not for mixed samples" in text
    assert "beta: weight of the divergence among the other classes (NCKD)." in text


@pytest.mark.parametrize("name", NAMES)
def test_printed_loss_starts_with_its_paper(listed, name):
    assert text_of(name).startswith(f"{name}: {listed[name]['paper']} ")


def test_shapes_are_not_parsed_as_markup():
    assert "list of [text, text], 1 or more" in text_of("hint")
    assert "classifier not set text" in text_of("simkd")


def test_one_loss_as_json(listed):
    ended = kdpipe_here("losses", "crd", "--json")
    assert json.loads(ended.stdout) == {"command": "losses", "losses": [listed["crd"]]}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("dkdd", "did you mean 'dkd'"), ("review-kd", "did you mean 'review_kd'"), ("CRD", "did you mean 'crd'")],
)
def test_unknown_loss_error_has_the_nearest_names(name, hint):
    ended = kdpipe_here("losses", name)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"kdpipe: error: unknown loss {name!r}; {hint}")
    assert ended.stderr.count("\n") == 1


def test_unknown_loss_error_without_near_names_lists_all():
    known = kdpipe_here("losses", "zzzzzz").stderr.partition("available: ")[2]
    assert set(NAMES) <= set(known.rstrip(".\n").split(", "))


def test_loss_of_a_reference_is_explained():
    text = text_of("python:support.user_losses:LogitMAE")
    assert text.startswith("python:support.user_losses:LogitMAE: Ours 2026, from support.user_losses ")
    assert "margin: errors up to this size are ignored." in text


@pytest.mark.parametrize("name", ["python:support.user_losses:NUMBER", "python:support.user_losses:no_loss", "python:"])
def test_reference_to_no_loss_is_an_error(name):
    ended = kdpipe_here("losses", name)
    assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
