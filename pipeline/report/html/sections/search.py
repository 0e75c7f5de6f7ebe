"""The course of a search, by Optuna's own plots in the page's colors: history, importances, slices, coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kdpipe.pipeline.recipe.sweep import short_names
from kdpipe.pipeline.report.chart import color, drawing, log_axis, svg
from kdpipe.pipeline.report.formatting import shortened
from kdpipe.pipeline.report.html.read import PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.report.variants import SEARCH_JOURNAL

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

MIN_TRIALS = 2
MAX_LETTERS = 18
MAX_LABEL = 17
"""Letters of a key that Optuna keeps in a label."""

WIDTH, HEIGHT = 520.0, 250.0
PANEL_WIDTH = 150.0
"""Width of a chart's part for each key, in user units."""

SHADES = ("faint", "quiet", "student")
"""The colors of the lower, middle and upper third of what trials reached, or of their numbers."""


def has_search(run: PageRun) -> bool:
    return (run.path / SEARCH_JOURNAL).is_file()


def search(run: PageRun) -> dict[str, object]:
    """Return the charts of a run's search.

    Raises:
        LeftOutError: Optuna is not installed, or too few trials are complete.
    """
    try:
        study = _load(run.path / SEARCH_JOURNAL)
    except ImportError as error:
        raise LeftOutError("The charts of a search need Optuna: pip install 'kdpipe[search]'.") from error
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if len(done) < MIN_TRIALS:
        raise LeftOutError(f"{len(done)} trials of the search are complete: charts need {MIN_TRIALS}.")
    keys = list(dict.fromkeys(key for trial in done for key in trial.params))
    names = short_names(keys)
    cut = {f"{key[:MAX_LABEL]}...": name for key, name in names.items() if len(key) >= MAX_LABEL + 3}
    return {"charts": list(_charts(study, cut | names))}


def _load(journal: Path) -> optuna.Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(journal))))


def _charts(study: optuna.Study, names: Mapping[str, str]) -> Iterator[Markup]:
    from optuna.visualization import matplotlib as plots

    named = f"validation {study.metric_names[0] if study.metric_names else 'value'}"
    first: dict[str, Any] = {"target_name": named}
    if len(study.directions) > 1:
        first["target"] = lambda trial: trial.values[0]
        yield _drawn(lambda: plots.plot_pareto_front(study), "Pareto front", WIDTH, names)
    wide = PANEL_WIDTH * (1 + len(set(names.values())))
    yield _drawn(lambda: plots.plot_optimization_history(study, **first), "Trials, and the best so far", WIDTH, names)
    yield _drawn(lambda: plots.plot_param_importances(study, **first), "Importance (PED-ANOVA)", WIDTH, names)
    yield _drawn(lambda: plots.plot_parallel_coordinate(study, **first), "Trials by their settings", wide, names)
    yield _drawn(lambda: plots.plot_slice(study, **first), f"{named} by each setting", wide, names)


@drawing()
def _drawn(plot: Callable[[], Any], title: str, width: float, names: Mapping[str, str]) -> Markup:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    try:
        plot()
        figure = pyplot.gcf()
        figure.set_size_inches(width / 72, HEIGHT / 72)
        figure.suptitle(title, x=0.02, ha="left", fontsize=12)
        _restyle(figure, names)
        figure.set_layout_engine("tight")
        return svg(figure, title)
    finally:
        pyplot.close("all")


def _restyle(figure: Figure, names: Mapping[str, str]) -> None:
    """Give a figure of Optuna's the page's colors and short names of keys; the scales of its colors go."""
    from matplotlib.text import Text

    figure.patch.set_visible(False)
    for axes in list(figure.axes):
        if axes.get_label() == "<colorbar>":
            axes.remove()
            continue
        axes.set_title("")
        axes.set_title("", loc="left")
        for name, scale in {"x": axes.get_xscale(), "y": axes.get_yscale()}.items():
            if scale == "log":
                low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
                log_axis(axes, name, low, high, "{:g}".format)
        axes.set_facecolor("none")
        axes.grid(color=color("faint"))
        if (legend := axes.get_legend()) is not None:
            legend.remove()
        axes.tick_params(colors=color("quiet"), labelsize=9)
        for spine in axes.spines.values():
            spine.set_color(color("faint"))
        for line, shade in zip(axes.lines, ("student", "alone", "pruned"), strict=False):
            line.set_color(color(shade))
        for patch in axes.patches:
            patch.set_facecolor(color("student"))
        for collection in axes.collections:
            _shade(collection)
    for text in figure.findobj(Text):
        text.set_color(color("quiet"))
        text.set_text(_short(text.get_text(), names))
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            _shorten_ticks(axis, names)


def _shade(collection: Any) -> None:
    """Color points or lines by the third of the values that they are in; those without values alike."""
    import numpy as np
    from matplotlib.colors import BoundaryNorm, ListedColormap

    values = collection.get_array()
    if values is None or not len(values):
        collection.set_color(color("student"))
        return
    low, high = float(np.min(values)), float(np.max(values))
    bounds = np.linspace(low, high if high > low else low + 1, len(SHADES) + 1)
    collection.set_cmap(ListedColormap([color(shade) for shade in SHADES]))
    collection.set_norm(BoundaryNorm(bounds, len(SHADES)))
    if (
        hasattr(collection, "set_edgecolor")
        and hasattr(collection, "get_offsets")
        and len(collection.get_offsets()) > 1
    ):
        collection.set_edgecolor("none")


def _shorten_ticks(axis: Any, names: Mapping[str, str]) -> None:
    texts = [label.get_text() for label in axis.get_ticklabels()]
    if any(_short(text, names) != text for text in texts):
        axis.set_ticks(axis.get_ticklocs(), [_short(text, names) for text in texts])


def _short(text: str, names: Mapping[str, str]) -> str:
    """Return the short name of a key, or a value without its quotes."""
    if text in names:
        return names[text]
    plain = text[1:-1] if len(text) > 2 and text[0] == text[-1] == "'" else text
    return shortened(plain, MAX_LETTERS) if plain != text or plain[:1] in '[{"' else text
