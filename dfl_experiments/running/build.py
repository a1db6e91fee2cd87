"""Build the parts of a run on its device: data, network, method, and the function that trains a batch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from dfl_experiments.configuration.components import Component
from dfl_experiments.configuration.schema import Configuration, Settings
from dfl_experiments.data.batches import (
    Batches,
    EvaluationBatches,
    Normalise,
    Standardise,
    count_new_variation,
    preparation,
    resident,
    split,
)
from dfl_experiments.data.packs import (
    load_with_digest,
    test_images_in_training,
    warn_of_empty_classes,
)
from dfl_experiments.data.sources import kind_of
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.crossings import copy_of
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.engine.initialise import initialise
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.errors import UserError, reason
from dfl_experiments.ranges import MemoryFormat
from dfl_experiments.running.device import (
    ALL_THREADS,
    choose_device,
    layout_of,
    refuse_wrong_gradients,
    set_up,
)
from dfl_experiments.running.provenance import code_of
from dfl_experiments.running.run_directory import epoch_columns, iteration_columns
from dfl_experiments.schedules import Schedule

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """All objects that training needs."""

    settings: Settings
    """The checked settings of the run."""
    device: torch.device
    """Device of the network and its batches."""
    origin: dict[str, Any]
    """Entries of result.json: kind of samples, digests of data and code, number of test images in the training set."""
    standardisation: dict[str, Tensor]
    """Mean and std with which float features are standardised; empty if the run standardises nothing."""
    batches: Batches
    """Batches of the training images."""
    validation: EvaluationBatches
    """Batches of the validation images; may be empty."""
    test: EvaluationBatches
    """Batches of the test images."""
    train_size: int
    """Number of training images."""
    num_classes: int
    """Number of classes."""
    memory_format: torch.memory_format
    """Memory format of images in convolutional nets, as `layout_of` chose it."""
    schedule: Schedule
    """Schedule of W's learning rate."""
    feedback_schedule: Schedule
    """Schedule of B's learning rate."""
    learner: Learner
    """Network, method and their optimizers."""
    step: Callable[[Tensor, Tensor, bool], Tensor]
    """Function that trains a batch: `Learner.step`, or a CUDA graph that was captured from it."""

    @property
    def columns(self) -> dict[str, list[str]]:
        """Column names of the run's tables. The first column of each table counts its rows."""
        metric_names, depth = self.learner.metric_names, self.learner.net.depth
        return {
            "iterations": iteration_columns(metric_names),
            "epochs": epoch_columns(depth, self.learner.extra_quantities),
        }


def build(
    configuration: Configuration, device_name: str | None = None, threads: int = ALL_THREADS
) -> Parts:
    """Build the parts of a run.

    device_name: device to use in place of the configured one.
    threads: number of CPU threads if the configuration does not set it.
    Raises `UserError` for missing data, and for parts that do not fit together.
    """
    settings, components = configuration.settings, configuration.components
    device = choose_device(device_name or settings.device)
    set_up(
        device,
        settings.precision,
        settings.seed,
        settings.deterministic,
        settings.threads or threads,
    )
    dataset = settings.dataset
    source, data_dir = components["dataset.source"].build(), Path(settings.data_dir)
    arrays, data = load_with_digest(dataset.name, source, data_dir)
    repeated = test_images_in_training(dataset.name, arrays)
    warn_of_empty_classes(dataset.name, arrays)
    kind = kind_of(arrays.train_images)
    origin = {
        "samples": kind,
        "data": data,
        "code": code_of(components),
        "test_images_in_training": repeated,
    }
    strata = arrays.train_labels if settings.validation_split == "stratified" else None
    indices = split(len(arrays.train_labels), settings.validation_fraction, settings.seed, strata)
    train, held_out = (index.numpy() for index in indices)
    loss = LOSSES[settings.loss]
    # Build the network on the CPU, so that a seed gives the same W on every device and for every method.
    refuse_shape(components["model"], arrays.shape)
    net = components["model"].build(kind, input_shape=arrays.shape, num_classes=arrays.num_classes)
    if kind == "tokens":
        highest = max(arrays.train_images.max(), arrays.test_images.max())
        net.example = torch.full((1, *arrays.shape), int(highest))
    initialise(net, configuration.weight_init)
    method = components["method"].build(net=net, num_classes=arrays.num_classes, loss=loss)
    memory_format: MemoryFormat = settings.memory_format if len(arrays.shape) == 3 else "contiguous"
    layout = layout_of(memory_format, net, device, settings.precision)
    smoke = settings.smoke
    train, held_out = train[:smoke][: settings.limit], held_out[:smoke]
    normalise = Normalise(dataset.mean, dataset.std)
    images, labels = arrays.train_images, arrays.train_labels
    training = images[train]
    prepared = preparation(training, dataset.standardise)
    standardisation = {}
    if isinstance(prepared, Standardise):
        standardisation = {
            "mean": torch.from_numpy(prepared.mean),
            "std": torch.from_numpy(prepared.std),
        }
        if count := count_new_variation(training, arrays.test_images):
            text = "%s: %d features are constant in the training samples, but not in the test samples; not scaled"
            log.warning(text, dataset.name, count)
    evaluation = partial(
        EvaluationBatches, normalise=normalise, device=device, memory_format=layout
    )
    validation = evaluation(*resident(prepared(images[held_out]), labels[held_out], device))
    test = evaluation(
        *resident(prepared(arrays.test_images[:smoke]), arrays.test_labels[:smoke], device)
    )
    augmentation = components["augmentation"].build()
    augmentation.check(arrays.shape, kind == "images", configuration.values["augmentation"]["name"])
    batches = Batches(
        *resident(prepared(training), labels[train], device),
        normalise, augmentation, settings.batch_size, settings.seed, device, memory_format=layout,
    )  # fmt: skip
    refuse_single_image(net, len(train), settings.batch_size)
    if device.type == "cpu" and settings.precision == "bfloat16":
        refuse_wrong_gradients(net)
    optimizer = components["optimizer"].build()
    feedback_optimizer = components.get("optimizer.feedback", components["optimizer"]).build()
    extra_quantities = settings.alignment.quantities if settings.alignment.every else []
    net, method = (module.to(device=device, memory_format=layout) for module in (net, method))
    learner = Learner(
        net, method, loss, optimizer, settings.precision, extra_quantities, feedback_optimizer, configuration.clip_norm
    )  # fmt: skip
    step: Callable[[Tensor, Tensor, bool], Tensor] = learner.step
    if device.type == "cuda" and settings.cuda_graph:
        if optimizer.captured and feedback_optimizer.captured:
            step = CapturedStep(learner, settings.batch_size, device)
        else:
            log.info(
                "optimizer: cannot be captured in a CUDA graph, so each training step runs without one"
            )
    return Parts(
        settings, device, origin, standardisation, batches, validation, test, len(train), arrays.num_classes, layout,
        components["schedule"].build(),
        components.get("schedule.feedback", components["schedule"]).build(),
        learner,
        step,
    )  # fmt: skip


def refuse_shape(model: Component, shape: tuple[int, ...]) -> None:
    """Raise `UserError` if the samples have the wrong number of axes for the model.

    shape: shape of a sample. The type hint of the model's parameter `input_shape` tells how many axes the model needs.
    """
    axes = get_args(get_type_hints(model.target).get("input_shape"))
    if axes and Ellipsis not in axes and len(axes) != len(shape):
        raise UserError(
            f"model={model.target.__name__}: needs samples with {len(axes)} axes, but gets {shape}"
        )


@torch.no_grad()
def refuse_single_image(net: BlockNet, train_size: int, batch_size: int) -> None:
    """Raise `UserError` if the last batch has only one image and batch normalisation fails for it."""
    last_batch = train_size % batch_size or batch_size
    if last_batch > 1:
        return
    try:
        copy_of(net).train()(net.blank())
    except ValueError as error:  # raised by PyTorch's batch normalisation
        problem = f"the last batch of {train_size} images has one image ({reason(error)})"
        raise UserError(
            f"batch_size={batch_size}: {problem}; choose another batch_size or limit"
        ) from error
