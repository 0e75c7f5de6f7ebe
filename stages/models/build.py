"""Building the network of a recipe's [model] section, with seeded weights, checked against the data."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.config import PathStr, section
from kdpipe.stages.data.tasks import CLASSIFICATION, REGRESSION, Task
from kdpipe.stages.errors import ModelError, NotLogitsError, UnknownModelError, cause
from kdpipe.stages.models.clone import clone_without_hooks, unwrap, unwrap_all
from kdpipe.stages.models.joint_networks import JOINT_NETWORKS, build_joint_network
from kdpipe.stages.models.libraries.by_name import BY_PREFIX, num_published_classes, prefix_of
from kdpipe.stages.models.libraries.torchvision import WITH_AUXILIARY_HEADS, build_classifier, classifier_names, refusal
from kdpipe.stages.models.libraries.transformers import PREFIX as HF
from kdpipe.stages.models.libraries.transformers import recorded_args
from kdpipe.stages.models.main_logits import keep_main_logits, require_repeatable
from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS, build_small_image_network
from kdpipe.stages.models.tokens import HEADLESS, is_headless
from kdpipe.stages.models.user_models import MODELS, build_user_model, is_user_model, model_source_sha256
from kdpipe.stages.models.weights.match import remove_head
from kdpipe.stages.models.weights.state_dict import load_weights
from kdpipe.stages.numerics import PROBABILITIES, kinds_of_outputs
from kdpipe.stages.plugins.user_source import network_sha256
from kdpipe.store.errors import did_you_mean

TORCHVISION = "torchvision:"
OBJECT = "object:"
"""Prefix of the name, in records, of a network object whose class is in no registry."""

PUBLISHED = "published"

SAME_VALUES = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Alias", "Transpose")
) | {"SqueezeBackward1"}
"""Operations, by torch's names of their derivatives, whose outputs are the values of their inputs."""


@section
class ModelConfig:
    """Configuration of a network and its initial weights.

    Attributes:
        name: One of `list_models()`, registered ones among them, `torchvision:NAME` where the plain name is a
            small-image network's, `timm:NAME`, `hf:OWNER/NAME` or `hf:FOLDER`, or `python:package.module:factory`.
        args: The network's own arguments, such as a width.
        weights: None (random), "published" (the library's own), or the path of a .safetensors file or torch state dict.
        classes: The names of the classes that the weights are of, where they are more than the data's or in another
            order: "published", or the path of a file with one class a line. The rows of the data's classes are kept.
        weights_key: The key in the file, and prefix, of the weights to take, where there are several:
            `state_dict_ema`, `model.module.student`.
        fresh_head: Whether the classifier is new, for weights from a file of other classes; it has to be trained.
    """

    name: PathStr
    args: dict[str, Any] = field(default_factory=dict)
    weights: PathStr | None = None
    classes: PathStr | None = None
    weights_key: PathStr | None = None
    fresh_head: bool = False


@dataclass(frozen=True, kw_only=True)
class GivenModel(ModelConfig):
    """A network object with its current weights in place of a recipe's section; copies of it are trained."""

    module: nn.Module


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    seed: int,
    notify: Callable[[str], None] = lambda notice: None,
    task: Task = CLASSIFICATION,
) -> nn.Module:
    """Build the network on the CPU, in training mode: images [B, in_channels, *image_size] -> logits [B, num_classes].

    With `num_classes` 0 it has no classifier, and returns embeddings [B, D]. With the task "regression" it returns any
    numbers [B, num_classes], else probabilities are refused.

    Equal seeds give equal weights, and torch's global generators are left unchanged. `notify` receives sentences on
    what was changed or chosen: main logits of several outputs, the entries of a weights file. Raises ModelError for an
    unknown name, unknown arguments, images that do not fit the network, or weights that cannot be loaded.
    """
    image_shape = (in_channels, *image_size)
    if isinstance(config, GivenModel):
        name = type(config.module).__name__
        given = _copy(name, config.module)
        keep_main_logits(name, given, image_shape, notify)
        _check_fit(name, given, num_classes, image_shape, task)
        require_repeatable(name, given, image_shape)
        return given
    # On the CPU only: torch.manual_seed would also reset the generators of every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _construct(config, num_classes, in_channels, image_size, notify)
        if _may_return_more(config.name):
            is_known = prefix_of(config.name) is not None  # transformers always returns an object
            keep_main_logits(config.name, model, image_shape, _silent if is_known else notify)
        _check_fit(config.name, model, num_classes, image_shape, task)
    if config.weights is not None and config.weights != PUBLISHED:
        load_weights(
            model,
            weights_path(config.weights),
            weights_key=config.weights_key,
            fresh_head=num_classes if config.fresh_head else None,
            without_head=num_classes == 0,
            notify=notify,
        )
    if is_user_model(config.name):
        require_repeatable(config.name, model, image_shape)
    return model


def architecture(
    config: ModelConfig, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Return the network's description without weights, as JSON.

    Defaults of small-image networks are included, and the digest of the source of a user's own network. Raises
    ModelError if there is no source, or `args` are no JSON.
    """
    args = recorded_args(config.name, config.args) if config.name.startswith(HF) else config.args
    args = _default_args(config.name) | args
    own = network_sha256(config.module) if isinstance(config, GivenModel) and config.name.startswith(OBJECT) else {}
    try:
        args = json.loads(json.dumps(args, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the args of {config.name} must be numbers, strings, lists and tables ({cause(error)})."
        ) from error
    source = model_source_sha256(config.name)
    return {
        "model": config.name,
        "args": args,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": list(image_size),
        **({"source_sha256": source} if source else {}),
        **own,
    }


def _copy(name: str, model: nn.Module) -> nn.Module:
    """Return a copy of a network object on the CPU, without hooks. Raises ModelError if it cannot be copied or run."""
    _refuse_scripted(name, model)
    if wrapped := [path for path, module in model.named_modules() if unwrap(module) is not module]:
        raise ModelError(
            f"{name}: {wrapped[0]} is compiled or parallel on its own: wrap the whole network, or nothing."
        )
    for what, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name}: {what} has no values yet: initialize the network on the CPU first.")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(f"{name}: {what} is {tensor.dtype}, wanted torch.float32: call .float() first.")
        if tensor.is_inference():
            raise ModelError(f"{name} was built in torch.inference_mode: build it outside.")
    try:
        return clone_without_hooks(model).cpu()
    except Exception as error:  # attributes of the user's
        raise ModelError(f"{name} cannot be copied ({cause(error)}): remove what cannot be, such as locks.") from error


def _refuse_scripted(name: str, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"{name} has a TorchScript module, {path}" if path else f"{name} is a TorchScript module"
            raise ModelError(f"{what}, which can neither be copied nor exported: use the nn.Module it was made from.")


def list_models() -> list[str]:
    """List the names that ModelConfig accepts: registered and small-image networks, then torchvision's."""
    plain = [*MODELS.registered(), *sorted(SMALL_IMAGE_NETWORKS)]
    return plain + [TORCHVISION + name if name in SMALL_IMAGE_NETWORKS else name for name in classifier_names()]


def _construct(
    config: ModelConfig,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    notify: Callable[[str], None],
) -> nn.Module:
    name, is_published = config.name.removeprefix(TORCHVISION), config.weights == PUBLISHED
    if num_classes == 0 and not prefix_of(config.name) and not is_user_model(config.name):
        count = num_published_classes(name, config.args) if is_published and name in classifier_names() else 1
        model = _construct(config, count, in_channels, image_size, notify)
        remove_head(model)
        return model
    if config.name in JOINT_NETWORKS:

        def construct(name: str, args: Mapping[str, Any]) -> nn.Module:
            return _construct(ModelConfig(name=name, args=dict(args)), num_classes, in_channels, image_size, notify)

        return build_joint_network(config.name, config.args, construct, (in_channels, *image_size))
    if prefix := prefix_of(config.name):
        return BY_PREFIX[prefix](
            config.name,
            config.args,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            published=is_published,
            fresh_head=config.fresh_head,
            notify=notify,
        )
    is_small, is_own = config.name in SMALL_IMAGE_NETWORKS, is_user_model(config.name)
    if not is_small and not is_own and name in classifier_names():
        return build_classifier(
            name,
            config.args,
            num_classes=num_classes,
            in_channels=in_channels,
            published=is_published,
            fresh_head=config.fresh_head,
            notify=notify,
        )
    if not is_small and not is_own:
        raise refusal(name) or _unknown(config.name)
    if is_published:
        raise ModelError(
            f"there are no published weights of {config.name}: give the path of a file, or leave weights out."
        )
    offered: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    if is_own:
        built = build_user_model(config.name, config.args, offered)
        _refuse_scripted(config.name, built)
        if (model := unwrap_all(built)) is not built:
            notify(f"{config.name} returns {type(built).__name__}: the {type(model).__name__} inside is used.")
        return model.cpu()  # DataParallel moves what it wraps to a GPU
    return build_small_image_network(config.name, config.args, **offered)


def _silent(notice: str) -> None:
    pass


def _may_return_more(name: str) -> bool:
    """Return whether a network may return more than its logits."""
    return is_user_model(name) or bool(prefix_of(name)) or name.removeprefix(TORCHVISION) in WITH_AUXILIARY_HEADS


def _unknown(name: str) -> ModelError:
    known = [TORCHVISION + known for known in classifier_names()] if name.startswith(TORCHVISION) else list_models()
    otherwise = "name your own network as python:package.module:factory, or import the module that registers it."
    hint = did_you_mean(name, known, limit=3, otherwise=otherwise)
    return UnknownModelError(f"no model is called {name!r}; {hint}")


def _default_args(name: str) -> dict[str, Any]:
    if name not in SMALL_IMAGE_NETWORKS:
        return {}
    parameters = inspect.signature(SMALL_IMAGE_NETWORKS[name].build).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _check_fit(name: str, model: nn.Module, num_classes: int, image_shape: tuple[int, int, int], task: Task) -> None:
    """Run two black images through the network, to find a misfit before any data is read."""
    images = " x ".join(str(side) for side in image_shape)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *image_shape))
    except Exception as error:  # networks may raise anything on a misfit
        raise ModelError(f"{name} cannot take images of {images} ({cause(error)}).") from error
    model.train()
    kind, width = ("logits", str(num_classes)) if num_classes else ("embeddings", "D")
    if not isinstance(logits, Tensor):
        raise ModelError(f"{name} returns {type(logits).__name__}, wanted a tensor of {kind} [B, {width}].")
    are_vectors = logits.dim() == 2 and len(logits) == 2
    if are_vectors and num_classes == 0:
        setattr(model, HEADLESS, True)
        return
    if is_headless(model):
        setattr(model, HEADLESS, False)
    if list(logits.shape) != [2, num_classes]:
        advice = " If these are a teacher's embeddings, set teacher.output = 'embeddings'." * are_vectors
        raise ModelError(
            f"{name} makes {list(logits.shape)} of two images of {images}, wanted {kind} [2, {width}].{advice}"
        )
    may_be_probabilities = task != REGRESSION and not logits.is_meta and bool(((logits >= 0) & (logits <= 1)).all())
    if may_be_probabilities and (last := _probabilities_of(model, image_shape)):
        raise NotLogitsError(
            f"{name} ends in a {last}: its outputs are probabilities, and losses and stores take logits. Return what "
            f"goes into the {last}."
        )


def _probabilities_of(model: nn.Module, image_shape: tuple[int, int, int]) -> str | None:
    """Return "softmax" or "sigmoid" if the network's last operation is one, else None."""
    ramp = torch.linspace(-1, 1, math.prod(image_shape)).view(1, *image_shape)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            outputs = model(torch.cat([ramp, ramp.flip(1, 2, 3)]).requires_grad_().clone())
    except Exception:  # it cannot be differentiated
        return None
    finally:
        model.train(was_training)
    if PROBABILITIES in kinds_of_outputs(outputs.detach()) and not torch.equal(*outputs.detach()):
        return "softmax"
    node = outputs.grad_fn
    while node is not None and node.name() in SAME_VALUES:
        node = node.next_functions[0][0]
    return "sigmoid" if node is not None and node.name() == "SigmoidBackward0" else None


def weights_path(text: str) -> Path:
    """Return the path of a weights file as the recipe writes it. Raises ModelError for `~` without a home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ModelError(f"weights = {text!r}: there is no home folder, give the absolute path.") from error
