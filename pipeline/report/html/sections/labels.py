"""Average precision of each label, of networks whose images have several."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.pipeline.report.formatting import mean_std
from kdpipe.pipeline.report.html.read import Network, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.report.rows import mean_and_std
from kdpipe.pipeline.terminal.tables import Table
from kdpipe.stages.evaluation.main_metric import MAP


def has_labels(run: PageRun) -> bool:
    """Return whether the run's networks are judged by their mean average precision."""
    return any(row.metric == MAP.name for row in run.report.rows)


def average_precision(run: PageRun) -> dict[str, object]:
    """Return the table of the labels' average precision in percent, mean over the seeds.

    Raises:
        LeftOutError: If none was recorded.
    """
    found = {network.name: columns for network in run.networks if (columns := _by_label(network))}
    if not found:
        raise LeftOutError("It is recorded when a network is finished: none of this run has it yet.")
    names = next(iter(found.values()))
    cells = [[name, *(mean_std(*mean_and_std(columns.get(name, []))) for columns in found.values())] for name in names]
    caption = "Average precision in percent, mean over seeds; - where no test image has the label"
    return {"precision": Table(caption, ["label", *found], cells)}


def _by_label(network: Network) -> dict[str, Sequence[float]]:
    """Return the average precision of each label in percent, by seed; {} if it was not recorded."""
    recorded = [(job.examined or {}).get("average_precision") or {} for job in network.done]
    return {
        str(name): [100 * float(one[name]) for one in recorded if one.get(name) is not None]
        for name in next(filter(None, recorded), {})
    }
