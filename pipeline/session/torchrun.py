"""`torchrun` that ends as kdpipe does, for batch systems that requeue a job by its exit status.

torchrun itself ends with 1 whatever its processes end with, also with 75, "stopped early, run me again"; asked to stop,
it gives them 30 seconds, and ends with 1 as well. Here signals go on to the processes, and their status is its own:

    kdpipe-torchrun --nproc-per-node 4 --no-python kdpipe train-student recipe.toml

The arguments are torchrun's. srun, which starts the processes itself, passes their status on and needs nothing of this.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipeline.session.signals import SIGNALS
from pipeline.terminal.exit_codes import STOPPED_EARLY, USAGE
from pipeline.terminal.output import say

NEVER_SENT = "SIGWINCH"
"""torchrun's own handling of signals is turned to one that tells of windows, and that no batch job gets."""

SAVING_S = "120"
"""How long the other processes may take to end after the first."""


def main() -> None:
    """The console script."""
    sys.exit(launch(sys.argv[1:]))


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments` in this process; returns the exit status for the batch system."""
    with signals_passed_on() as asked:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import get_args_parser, run

        os.environ.setdefault("TORCHELASTIC_SHUTDOWN_TIMEOUT", SAVING_S)
        parser = get_args_parser()
        parser.allow_abbrev = False  # else it takes kdpipe's --run for its own --run-path
        parsed = parser.parse_args(["--signals-to-handle", NEVER_SENT, *arguments])
        if int(parsed.max_restarts):
            say("error: --max-restarts would start again what is asked to stop: leave it out, and requeue on 75.")
            return USAGE
        try:
            run(parsed)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            return status_of([failure.exitcode for failure in error.failures.values()], asked_to_stop=bool(asked))
    return 0


def status_of(codes: Sequence[int], *, asked_to_stop: bool = False) -> int:
    """One exit status for those of the processes that failed, in which minus a signal says that it ended one.

    That is where the others' trouble comes from, unless it is the one that asked a process to stop that was about to
    start; after it, what a user can mend; and last that they stopped as asked.
    """
    early = {STOPPED_EARLY, -signal.SIGTERM} if asked_to_stop else {STOPPED_EARLY}
    failed = [code for code in codes if code not in early]
    if killed := [-code for code in failed if code < 0]:
        say(f"error: a process of this job was ended by {signal.Signals(killed[0]).name}. Run the same command again.")
        return 128 + killed[0]
    return max(failed) if failed else STOPPED_EARLY


@contextmanager
def signals_passed_on() -> Iterator[list[int]]:
    """Within the block, what asks this process to stop asks its children, and ends it where it has none yet. Yields the
    list of what was received.

    They get SIGTERM: a terminal sends its SIGINT to them as well, and a second one would have them abort.
    """
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        to = children()
        if not to:
            sys.exit(STOPPED_EARLY)
        for child in to:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def children() -> list[int]:
    """The processes that this one has started, on Linux."""
    threads = Path("/proc/self/task").glob("*/children")
    return [int(pid) for thread in threads for pid in thread.read_text().split()]


if __name__ == "__main__":
    main()
