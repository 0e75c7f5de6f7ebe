"""Register what you bring under a name, for recipes and for the Python API.

Each is a decorator, with or without a name: `@register_model` uses that of the function. In a recipe,
`python:package.module:name` names the same object without registration. A package registers its own where a module
named by an entry point of the group `kdpipe.plugins` is imported. The source of what is registered is part of what
decides a job: an edited one neither resumes a job nor extends a store.
"""

from __future__ import annotations

from kdpipe.pipeline.callbacks.registry import CALLBACKS
from kdpipe.stages.data.sources.user_function import DATASETS
from kdpipe.stages.losses.registry import register_loss
from kdpipe.stages.models.user_models import MODELS
from kdpipe.stages.training.optimization.optimizers import OPTIMIZERS
from kdpipe.stages.training.optimization.schedules import SCHEDULES

__all__ = [
    "register_callback",
    "register_dataset",
    "register_loss",
    "register_model",
    "register_optimizer",
    "register_schedule",
]

register_model = MODELS.register
"""Register a function that returns an nn.Module, or a class of modules.

It is called with those of `num_classes`, `in_channels` and `image_size` (H, W) that it names, and the recipe's `args`.

Example:
    @kd.register_model
    def linear(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], num_classes))
"""

register_dataset = DATASETS.register
"""Register a function of the split ("train" or "test") that returns (images, labels[, ids[, class_names]]).

Images are uint8 [N, H, W] or [N, H, W, C], labels integers [N], as numpy arrays or tensors; or it returns a map-style
torch Dataset of (image, label). It gets the recipe's `data.root` if it names `root`.
"""

register_optimizer = OPTIMIZERS.register
"""Register a class of torch optimizers, or a function that returns one.

It is called with the parameter groups, `lr`, those of the recipe's other keys that it names (`weight_decay`,
`momentum`, `betas`, ...), and `optimizer_args`.
"""

register_schedule = SCHEDULES.register
"""Register a function that returns the learning rate at a point of the training.

It is called with those that it names of `progress` (0 after the warm-up, 1 at the end), `epoch` (with a fraction),
`step`, `steps_per_epoch`, the recipe's `lr`, `min_lr`, `epochs`, ..., and `schedule_args`. It must be a pure function
of them, so that a resumed job needs no state.
"""

register_callback = CALLBACKS.register
"""Register a class of `Callback`, or a function that returns one; it is called with the recipe's arguments."""
