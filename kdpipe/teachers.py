"""Stage 0 and 1 from Python: train a teacher, cache its outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kdpipe import datasets
from kdpipe.arguments import Scaling, as_features, as_folder, as_run_options, as_scaling, as_settings, as_views, shown
from kdpipe.models import ModelInfo, given_model, info_of, network_of, remember
from kdpipe.pipeline import steps
from kdpipe.results import CompressedResult, Result, TeacherResult
from kdpipe.runs import CallbackLike, isolated
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.config import whole_number
from kdpipe.stages.context import StageContext, test_context
from kdpipe.stages.data.splits import VALIDATION, Part
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.evaluation.embeddings import with_probe
from kdpipe.stages.evaluation.evaluate import of_teacher
from kdpipe.stages.evaluation.metrics import evaluate_in_depth
from kdpipe.stages.given_teacher import known_scaling, require_accuracy
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.clone import evaluated_on, unwrap
from kdpipe.stages.models.normalization import Normalization, Numbers
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.models.weights.state_dict import weights_sha256
from kdpipe.stages.targets.open import part_store_path
from kdpipe.stages.teacher import TeacherConfig, build_teacher, teacher_fingerprint, teacher_folder
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import Views
from kdpipe.store import TargetStore, differences, is_url, open_store


@isolated
def train_teacher(
    model: nn.Module,
    dataset: Any,
    *,
    test: Any,
    validation: Any = None,
    views: Views | None = None,
    seed: int = 0,
    normalize: Scaling | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    run: str | Path | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: CallbackLike | Sequence[CallbackLike] | None = None,
    expected_accuracy: float | None = None,
    export: bool = True,
    **train: Any,
) -> TeacherResult:
    """Train a teacher in place, or load the result of a finished training with equal inputs.

    Args:
        model: The network, from `create_model` or your own.
        dataset: The training images: of `load_dataset`, or any map-style torch Dataset of (image, label).
        test: The test images, on which it is evaluated after each epoch.
        validation: Images for that in place of the test images, which are then looked at once, at the end.
        views: The augmentation. The teacher sees views of its own, not those that a store caches.
        seed: Decides the order of the samples and dropout.
        normalize: The input scaling: (mean, std), each a number or one for each channel, for pixels in [0, 1], or that
            of another network; by default the statistics of the training images.
        mean: The mean of the input scaling, in place of `normalize`.
        std: Its standard deviation.
        run: The run folder; by default one in `runs/`, named after a digest of all inputs. A stopped training resumes
            there, as `kdpipe train-teacher` does.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the trainings: `Callback` objects, or names such as "csv" and "wandb".
        expected_accuracy: The lowest accuracy on the test images, in percent, with which the teacher is accepted.
        export: Whether to write an ONNX file where that is possible.
        **train: Keys of a recipe's `train` section: `epochs`, `batch_size`, `lr`, `optimizer`, `schedule`, ...

    Raises:
        KdpipeError: An input does not fit, or the folder holds another job.
    """
    run_options, model = as_run_options(run, device, num_workers, progress, callbacks), _module(model)
    seed, train = whole_number("seed", seed), as_settings("train_teacher", train, {"seeds": "seed="})
    train_set = datasets.as_image_set(dataset)
    test_set = datasets.as_image_set(test, "test", like=train_set)
    scaling = as_scaling(normalize, mean, std, train_set.in_channels)
    config = TeacherConfig(
        model=given_model(model),
        train=TrainConfig(**train),
        mean=scaling.mean if scaling else None,
        std=scaling.std if scaling else None,
        expected_accuracy=expected_accuracy,
        export=export,
    )
    validation_set = datasets.as_validation(validation, train_set)
    context = run_options.context(train_set, test_set, as_views(views), validation_set=validation_set)
    teacher = build_teacher(config, seed, context)
    fingerprint, info = teacher_fingerprint(config, seed, teacher, context), info_of(model)
    if teacher.identity["weights_sha256"] == info.trained_sha256:  # the call is repeated with what it has trained
        fingerprint["starts_from"] = info.starts_from
        folder = teacher_folder(run_options.folder("teacher", fingerprint))
        if (figures := _finished_as(folder, fingerprint, info)) is not None:
            return TeacherResult(figures, folder.path, model)
        fingerprint["starts_from"] = teacher.identity
    with run_options.open(run_options.folder("teacher", fingerprint), context) as opened:
        figures = steps.train_teacher(config, seed, opened)
        folder = teacher_folder(opened.run_dir)
        model.load_state_dict(load_tensors(folder.model)[0])
        model.eval()
    remember(
        model,
        replace(
            info,
            normalize=Normalization.from_json(figures["identity"]),
            starts_from=teacher.identity,
            trained_sha256=weights_sha256(model),
        ),
    )
    return TeacherResult(figures, folder.path, model)


@isolated
def cache_teacher(
    teacher: nn.Module | ModelBundle | Result | CompressedResult,
    dataset: Any,
    path: str | Path,
    *,
    test: Any = None,
    validation: Any = None,
    views: Views | None = None,
    features: str | Sequence[str] | None = None,
    normalize: Scaling | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    expected_accuracy: float | None = None,
    classes: str | None = None,
    output: Literal["logits", "embeddings"] = "logits",
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    **cache: Any,
) -> TargetStore:
    """Run a teacher over every view of a data set, and cache its logits and features in a store.

    A store that lacks views, samples or features is extended in place; a complete one is opened.

    Args:
        teacher: The network with the weights to use: a module, what `load_student` returns, or a result. It keeps its
            device and its mode.
        dataset: The training images.
        path: The store's folder.
        test: The test images. With them, `PATH.test.zarr` gets the teacher's logits on them, against which students are
            compared.
        validation: Images beside `test` that decide in their place. `PATH.validation.zarr` gets the logits on them, by
            which several teachers of a student are weighed with options={"teachers": {"weights": "accuracy"}}.
        views: The augmented views to cache; by default the images as they are, once.
        features: Layers whose outputs are stored, by module path: `stage2` for the map, `stage2:pooled`,
            `stage2:attention` or `stage2:gram` for a statistic of it.
        normalize: The teacher's input scaling: (mean, std), each a number or one for each channel, for pixels in
            [0, 1]; that of its training if kdpipe trained or loaded it, or if its weights state it. Required for other
            networks.
        mean: The mean of the input scaling, in place of `normalize`.
        std: Its standard deviation.
        expected_accuracy: The accuracy on the test images that the network is known to have, in percent. A lower one is
            refused. Without it, a network that kdpipe did not train is refused at chance, or where another usual input
            scaling or order of the classes would raise its accuracy on the test images clearly.
        classes: For a network of more classes than the data: the path of a file with its classes, one a line, or a JSON
            list; a copy of it that keeps those of the data is cached.
        output: What the network returns and the store keeps: "logits", or the "embeddings" of one without a classifier,
            from which students learn by losses on features, such as `Cosine` and `RKD`.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        **cache: Keys of a recipe's `cache` section: `dtype`, `encoding`, `top_k`, `precision`, `batch_size`, ...

    Returns:
        The opened store.

    Raises:
        FingerprintMismatch: The store was made from another teacher, other images or other views.
        KdpipeError: An input does not fit, the teacher's outputs are not finite, or its accuracy is too low.
    """
    if is_url(path):
        raise RecipeError(f"{path} is a URL: name a folder, and upload the store when it is complete.")
    network, path = network_of(teacher, "the teacher"), as_folder("path", path)
    run_options = as_run_options(None, device, num_workers, progress)
    config = CacheConfig(**as_settings("cache_teacher", cache, {"layers": "features=", "store": "path"}))
    train_set, views, wanted = datasets.as_image_set(dataset), as_views(views), as_features(features)
    test_set = None if test is None else datasets.as_image_set(test, "test", like=train_set)
    if validation is not None and test_set is None:
        raise RecipeError("validation= is given without test=: give the test images, too.")
    context = run_options.context(
        train_set,
        test_set,
        views,
        store=path if path.exists() else None,
        validation_set=datasets.as_validation(validation, train_set),
    )
    if output not in ("logits", "embeddings"):
        raise RecipeError(f"output is {shown(output)}: give 'logits' or 'embeddings'.")
    headless = output == "embeddings"
    scaling = as_scaling(normalize, mean, std, train_set.in_channels)
    bundle = _bundle(network, context, scaling, classes, headless=headless)
    with evaluated_on(bundle.model, context.device), run_options.open(path.parent, context, is_shared=True) as opened:
        if test_set is not None and not path.exists() and (expected_accuracy is not None or not _is_known(network)):
            teacher_config = TeacherConfig(
                model=ModelConfig(name="teacher"), expected_accuracy=expected_accuracy, output=output
            )
            evaluation = opened.evaluation(bundle.normalize)
            if headless:
                evaluation, _ = with_probe(bundle.model, opened.labeled(bundle.normalize), evaluation)
            else:
                evaluation = of_teacher(evaluation, bundle.model)
            report = evaluate_in_depth(bundle.model, evaluation, opened.device)
            require_accuracy(teacher_config, bundle, report, evaluation)
        shard = opened.process_group.work_shard
        steps.cache_teacher(config, path, bundle, wanted, opened, work_shard=shard)
        others: dict[Part, StageContext] = {"test": opened} if test_set is not None else {}
        others |= {VALIDATION: opened.deciding} if opened.validation_set is not None else {}
        for part, other in others.items():
            place, images = Path(part_store_path(path, part)), test_context(other)
            steps.cache_teacher(config.for_test, place, bundle, [], images, work_shard=shard, like=path)
        opened.process_group.barrier()
    return open_store(path)


def _module(model: nn.Module) -> nn.Module:
    """Return the network itself, without what torch.compile and data parallelism wrap around it."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the teacher must be a torch.nn.Module, not {shown(model)}: build it with kdpipe.create_model."
        )
    return unwrap(model)


def _finished_as(folder: JobDir, fingerprint: Mapping[str, Any], info: ModelInfo) -> dict[str, Any] | None:
    """Return the results of the finished job with this fingerprint whose weights are those remembered, else None."""
    stored, figures = read_json_file(folder.path / "job.json"), folder.result()
    if figures is None or differences(stored, json.loads(json.dumps(fingerprint))):
        return None
    return figures if figures["identity"]["weights_sha256"] == info.trained_sha256 else None


def _bundle(
    teacher: nn.Module | ModelBundle,
    context: StageContext,
    scaling: Normalization | None,
    classes: str | None = None,
    *,
    headless: bool = False,
) -> ModelBundle:
    """Return the teacher with its record and input scaling."""
    if isinstance(teacher, ModelBundle):
        channels, *size = context.image_shape
        num_classes = 0 if headless else context.train_set.num_classes
        wanted = {"num_classes": num_classes, "in_channels": channels, "image_size": size}
        if found := differences({key: teacher.architecture.get(key) for key in wanted}, wanted):
            faults = "; ".join(f"{key} {own}, wanted {other}" for key, own, other in found)
            raise ModelError(f"the teacher does not fit data set {context.train_set.name}: it has {faults}.")
        return replace(teacher, normalize=scaling or teacher.normalize)
    config, info = replace(given_model(teacher), classes=classes), info_of(teacher)
    if not (known := scaling or info.normalize):
        known = known_scaling(config, teacher, context)
    if known is None:
        raise ModelError(
            f"the input normalization of this {type(teacher).__name__} is unknown, and with a wrong one its accuracy "
            "would drop silently: give normalize=(mean, std) of its training, for pixels in [0, 1]."
        )
    built = context.build_model(config, 0, headless=headless)  # raises ModelError if images or classes do not fit
    if info.drawn_sha256 is not None and info.drawn_sha256 == weights_sha256(teacher):
        raise ModelError("the teacher's classifier is new and random, as its weights are of other classes: train it.")
    # The copy returns its main logits alone, has fewer classes, or is known to return embeddings.
    network = teacher if classes is None and not headless and type(built) is type(teacher) else built
    return ModelBundle(network, context.architecture(config, headless=headless), known)


def _is_known(teacher: nn.Module | ModelBundle) -> bool:
    """Return whether kdpipe trained or loaded a network, and its weights are still those."""
    if isinstance(teacher, ModelBundle):
        return True
    trained = info_of(teacher).trained_sha256
    return trained is not None and trained == weights_sha256(teacher)
