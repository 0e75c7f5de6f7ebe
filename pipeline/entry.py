"""Start the command line: what must happen before anything is imported that takes time."""

from __future__ import annotations

from kdpipe.pipeline.session.signals import exit_at_signals
from kdpipe.pipeline.terminal.streams import set_up_streams


def main() -> None:
    """Run the console script `kdpipe`."""
    set_up_streams()
    exit_at_signals()
    from kdpipe.pipeline.main import main as run  # takes a tenth of a second

    run()
