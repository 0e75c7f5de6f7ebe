"""Tests of the main metric in results."""

import pytest

from kdpipe.stages.evaluation.main_metric import ACCURACY, AGREEMENT, best_value, deciding, main_value, metric_of

AGREES = {"metric": "agreement", "agreement": 0.5, "best_agreement": 0.625}


def test_accuracy_needs_no_name():
    assert ACCURACY.record(0.5) == {"accuracy": 0.5}
    assert AGREEMENT.record(0.5) == {"metric": "agreement", "agreement": 0.5}
    assert [metric_of({"accuracy": 0.5}), metric_of(AGREES)] == [ACCURACY, AGREEMENT]


def test_best_value_is_of_the_deciding_images():
    assert (main_value(AGREES), best_value(AGREES)) == (0.5, 0.625)
    validated = {"accuracy": 0.25, "best_agreement": 0.75, "validation": AGREES}
    assert (main_value(validated), main_value(deciding(validated)), best_value(validated)) == (0.25, 0.5, 0.75)


@pytest.mark.parametrize("record", [{}, {"metric": "x"}, {"metric": []}, {"accuracy": 7}, {"accuracy": float("nan")}])
def test_a_damaged_record_is_an_error(record):
    with pytest.raises(ValueError, match="metric =|accuracy ="):
        main_value(record)
