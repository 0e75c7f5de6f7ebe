"""Training samples and test images with the predictions of the teacher and the students."""

from __future__ import annotations

from pipeline.report.html.read import PageRun
from pipeline.report.html.sections.samples_data import (
    NUM_CANDIDATES,
    instructive,
    open_walk,
    predict_test,
    students_of,
    training_samples,
)
from pipeline.report.html.templating import LeftOutError
from store import KdpipeError


def samples(run: PageRun) -> dict[str, object]:
    """Return the images and predictions.

    Raises:
        LeftOutError: If the images cannot be read, or no student is finished.
    """
    try:
        walk, students = open_walk(run), students_of(run)
        if not students:
            raise LeftOutError("No student is finished yet.")
        training = training_samples(walk, students)
        num_macs = sum(int((one.result or {}).get("num_macs") or 0) for net in run.main[1:] for one in net.done[:1])
        predicted = predict_test(walk, students, num_macs)
        test = instructive(walk, predicted)
    except (KdpipeError, OSError) as error:
        raise LeftOutError(f"The images could not be shown: {error}") from error
    return {
        "training": training,
        "num_candidates": NUM_CANDIDATES,
        "test": test,
        "num_test": f"{len(predicted.labels):,}",
    }
