"""Advice on encodings: what fits the losses, and what is recommended."""

import numpy as np
import pytest

from kdpipe.stages.distillation.encoding_advice import compare_encodings, gradient_cosine, recommended
from kdpipe.stages.losses.logits.dkd import DKD
from kdpipe.stages.losses.logits.kd import KD, LogitMSE
from kdpipe.store.format.encodings.sampled import probabilities

EXACT = (3 * np.random.default_rng(0).standard_normal((300, 100))).astype(np.float32)


def reports_of(*losses):
    found = compare_encodings(EXACT, [(f"distill.{number}", loss) for number, loss in enumerate(losses)])
    return {one.name: one for one in found}


def test_bytes_and_fidelity_of_each_encoding():
    found = reports_of(KD(temperature=1.0), KD(temperature=4.0))
    sizes = {"float16": 200, "int8": 104, "int4": 54, "top-k, 5": 35, "top-k, 50": 164, "sampled, 12": 35}
    assert {name: found[name].row_bytes for name in sizes} == sizes
    assert set(found["int8"].kl) == {"1", "4"}
    assert found["int8"].max_kl() < found["int4"].max_kl() < found["top-k, 5"].max_kl()
    assert found["float16"].gradient_cosine["4"] == pytest.approx(1, abs=1e-6)
    assert found["top-k, 5"].gradient_cosine["4"] < found["int4"].gradient_cosine["4"]
    assert all(one.rows_per_s > 0 for one in found.values())


@pytest.mark.parametrize(
    ("loss", "refused"),
    [
        (KD(temperature=1.0), set()),
        (KD(temperature=2.0), {"sampled"}),
        (DKD(), {"sampled"}),
        (LogitMSE(), {"sampled", "top-k"}),
    ],
)
def test_encodings_that_a_loss_refuses_say_why(loss, refused):
    found = reports_of(loss)
    assert {name.partition(",")[0] for name, one in found.items() if one.refusal} == refused
    assert all("distill.0" in one.refusal or "T = 1" in one.refusal for one in found.values() if one.refusal)


def test_the_smallest_faithful_encoding_is_recommended():
    found = list(reports_of(LogitMSE(), KD(temperature=1.0)).values())
    assert recommended(found, 1e-3).name == "int8"
    assert recommended(found, 1e-1).name == "int4"
    assert recommended(found, 1e-9).name == "float16"  # none is, this is nearest


def test_gradient_is_that_of_a_linear_student():
    exact, decoded = EXACT[:256], EXACT[:256] + np.random.default_rng(1).standard_normal((256, 100), np.float32)
    student = probabilities(exact / np.float32(4))
    ours, right = (exact.T @ (student - probabilities(one / np.float32(2))) for one in (decoded, exact))
    expected = (ours * right).sum() / np.sqrt((ours**2).sum() * (right**2).sum())
    assert gradient_cosine(exact, decoded, 2.0) == pytest.approx(expected, rel=1e-5)
