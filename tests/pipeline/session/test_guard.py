import errno

import pytest
import typer

from kdpipe.pipeline.session.guard import guarded
from kdpipe.pipeline.terminal.streams import STDOUT

NO_SPACE = "No space left on device"


def closed_pipe():
    return BrokenPipeError(errno.EPIPE, "Broken pipe", STDOUT)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, NO_SPACE), f"kdpipe: error: {NO_SPACE}.\n"),
        (OSError(errno.ENOSPC, NO_SPACE, STDOUT), f"kdpipe: error: {NO_SPACE}: standard output.\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "kdpipe: error: Broken pipe.\n"),  # a process or server is gone
        (closed_pipe(), ""),
        (
            OSError(errno.ENOSPC, NO_SPACE, "/runs/a/model.onnx"),
            "kdpipe: error: the disk is full: /runs/a/model.onnx; make room, and run the same command again.\n",
        ),
    ],
)
def test_only_errors_of_stdout_are_blamed_on_it(capsys, error, sentence):
    with pytest.raises(typer.Exit) as ended, guarded():
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, NO_SPACE, "/dev/shm/torch_1"),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)"),
    ],
)
def test_full_shared_memory_has_its_cure(capsys, error):
    with pytest.raises(typer.Exit), guarded():
        raise error
    assert "docker run --shm-size=1g" in capsys.readouterr().err


def test_a_reader_that_is_gone_is_no_error_for_rich(capsys):
    with pytest.raises(typer.Exit), guarded():
        try:
            raise closed_pipe()
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 - as rich does
    assert capsys.readouterr().err == ""
