"""Callbacks: a user's own code that observes trainings, and may end one early."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

HOOKS = ("on_run_start", "on_step_end", "on_epoch_end", "on_checkpoint", "on_run_end")


@dataclass(frozen=True)
class CallbackState:
    """The state of a training, which every hook gets.

    Attributes:
        stage: The stage that trains, such as "train-student".
        job: The name of the training, such as "student distilled, seed 0".
        seed: Its seed.
        folder: Its folder, with checkpoint, metrics and, when it is finished, results.
        run_dir: The run folder, which holds the folders of all trainings.
        model: The network, to be read only.
        config: The resolved recipe; without one, as from Python, the settings of the training under `train`.
        epoch: The number of finished epochs.
        num_epochs: The number of epochs in the recipe.
        global_step: The number of steps done, over all epochs.
        steps_per_epoch: The number of steps of an epoch.
        history: The metrics of each finished epoch: `epoch` (from 0), `accuracy` and `cross_entropy` on the test
            images, or with `split` = "validation" on the validation images; `losses` by name, `lr` and `wall_s`. Of
            images without labels it has `metric` = "agreement", and `agreement` in place of `accuracy`.
        mean_losses: Returns the means of the current epoch's losses so far, by name; on a GPU it waits for the step.
        warn: Shows a sentence to the user.
        stop: Ends the training after the current epoch.
        error: In `on_run_end`, what interrupted the training; None if it has come to its end.
    """

    stage: str
    job: str
    seed: int
    folder: Path
    run_dir: Path
    model: nn.Module
    config: Mapping[str, Any]
    epoch: int
    num_epochs: int
    global_step: int
    steps_per_epoch: int
    history: Sequence[Mapping[str, Any]]
    mean_losses: Callable[[], dict[str, float]]
    warn: Callable[[str], None]
    stop: Callable[[], None] = field(default=lambda: None)
    error: BaseException | None = None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics of the last finished epoch; empty before."""
        return self.history[-1] if self.history else {}


class Callback:
    """A user's own code that observes trainings, and may end one early. All methods do nothing here.

    Every training of a command calls them: the teacher, each student alone and distilled, each hint stage, variant,
    generation, pruned and quantized student. A training that is finished already calls nothing.

    - Hooks are called in the first process only; `on_run_start` is called again when a stopped training continues, and
      `on_run_end` at every end, also after an error. A training that continues after a kill may repeat steps, and with
      them their hooks, since its last checkpoint.
    - The network must not be changed. It may be run in eval mode, under `torch.no_grad()`; its mode is restored. In
      `on_epoch_end` and `on_run_end` it has the weights that are evaluated, such as their moving average.
    - `state.stop()` ends the training after the current epoch, as if the recipe had that many epochs. The name of the
      callback is recorded in result.json as `stopped_by`.
    - An error in a hook ends the command; the checkpoint stays, so that the same command continues.
    - `state_dict` returns what must survive a kill, as JSON; it becomes part of each checkpoint. Before `on_run_start`,
      `load_state_dict` gets it back, or `{}` in a new training: one object sees all trainings of a command, one by one.
    - Callbacks are not part of what determines a job: a finished training stays finished if they are changed.

    Example:
        Stop when the accuracy no longer improves:

            class EarlyStopping(kd.Callback):
                def __init__(self, patience: int = 5) -> None:
                    self.patience = patience

                def state_dict(self):
                    return {"best": self.best, "waited": self.waited}

                def load_state_dict(self, saved):
                    self.best, self.waited = saved.get("best", 0.0), saved.get("waited", 0)

                def on_epoch_end(self, state):
                    if "accuracy" not in state.metrics:  # a hint stage
                        return
                    accuracy = state.metrics["accuracy"]
                    self.waited = 0 if accuracy > self.best else self.waited + 1
                    self.best = max(self.best, accuracy)
                    if self.waited >= self.patience:
                        state.stop()
    """

    @property
    def name(self) -> str:
        """The name in messages, checkpoints and results."""
        return type(self).__name__

    def on_run_start(self, state: CallbackState) -> None:
        """Observe the start of a training, or its continuation: then `state.global_step` is above 0."""

    def on_step_end(self, state: CallbackState) -> None:
        """Observe the end of a step."""

    def on_epoch_end(self, state: CallbackState) -> None:
        """Observe the end of an epoch, after its evaluation."""

    def on_checkpoint(self, state: CallbackState) -> None:
        """Observe that a checkpoint was written, to `state.folder`."""

    def on_run_end(self, state: CallbackState) -> None:
        """Observe the end of a training, before the network is exported; `state.error` is what interrupted it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to keep in checkpoints, a JSON object."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state; an empty one is that of a new training."""
