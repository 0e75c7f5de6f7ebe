"""Run `torchrun` and exit as kdpipe does, for batch systems that requeue a job by its exit status.

torchrun exits with 1 for every failure, 75 ("stopped early, run again") included, and gives its processes 30 seconds
after a signal. This launcher passes signals on and returns the status of the processes:

    kdpipe-torchrun --nproc-per-node 4 --no-python kdpipe train-student recipe.toml

The arguments are those of torchrun. srun starts the processes itself and passes their status on: it does not need this.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from kdpipe.pipeline.session.signals import signal_handlers
from kdpipe.pipeline.terminal.exit_codes import STOPPED_EARLY, USAGE
from kdpipe.pipeline.terminal.output import print_line

UNUSED_SIGNAL = "SIGWINCH"
"""A signal that no batch job gets, to turn off torchrun's own signal handling."""

SHUTDOWN_TIMEOUT_S = "120"
"""Time for the other processes to end after the first."""


def main() -> None:
    """Run the console script `kdpipe-torchrun`."""
    sys.exit(launch(sys.argv[1:]))


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments` in this process; return the exit status for the batch system."""
    with forward_signals() as received:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import get_args_parser, run

        os.environ.setdefault("TORCHELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT_S)
        parser = get_args_parser()
        parser.allow_abbrev = False  # else it takes kdpipe's --run for its own --run-path
        parsed = parser.parse_args(["--signals-to-handle", UNUSED_SIGNAL, *arguments])
        if int(parsed.max_restarts):
            print_line("error: --max-restarts would restart jobs that were asked to stop: omit it and requeue on 75.")
            return USAGE
        try:
            run(parsed)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            return status_of([failure.exitcode for failure in error.failures.values()], asked_to_stop=bool(received))
    return 0


def status_of(codes: Sequence[int], *, asked_to_stop: bool = False) -> int:
    """Return one exit status for those of the failed processes; -N means ended by signal N.

    Precedence: a process ended by a signal (except SIGTERM during startup if asked to stop), then errors, then 75.
    """
    early = {STOPPED_EARLY, -signal.SIGTERM} if asked_to_stop else {STOPPED_EARLY}
    failed = [code for code in codes if code not in early]
    if killed := [-code for code in failed if code < 0]:
        name = signal.Signals(killed[0]).name
        print_line(f"error: a process of this job was ended by {name}. Run the same command again.")
        return 128 + killed[0]
    return max(failed) if failed else STOPPED_EARLY


@contextmanager
def forward_signals() -> Iterator[list[int]]:
    """Yield the list of signals received within the block; each sends SIGTERM to the children, or exits without any.

    Not SIGINT: a terminal sends it to the children as well, and a second one would abort them.
    """
    import psutil

    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        running = psutil.Process().children()
        if not running:
            sys.exit(STOPPED_EARLY)
        for child in running:
            with suppress(psutil.NoSuchProcess):
                child.terminate()

    with signal_handlers(handle):
        yield received


if __name__ == "__main__":
    main()
