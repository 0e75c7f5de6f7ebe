"""Made-up times of a trial."""

from collections.abc import Callable, Hashable, Mapping


def later_is_faster(
    runs: Mapping[Hashable, Callable[[], object]], device: object, **_: object
) -> dict[Hashable, float]:
    """Call each once, and return times of which each is a quarter of the one before."""
    for run in runs.values():
        run()
    return {name: 4.0**-number for number, name in enumerate(runs)}
