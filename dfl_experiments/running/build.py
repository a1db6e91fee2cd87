"""Build the parts of a run on its device: data, network, method, and the function that trains a batch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
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
    warn_of_channels_last,
    warn_of_empty_classes,
)
from dfl_experiments.data.sources import Arrays, kind_of
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
    warn_of_slow_bfloat16,
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
    classes: list[str]
    """Names of the classes."""
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
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.batches.labels)

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
    threads = settings.threads or threads
    set_up(device, settings.precision, settings.seed, settings.deterministic, threads)
    arrays, origin = load_arrays(configuration)
    loss = LOSSES[settings.loss]
    # Build the network on the CPU, so that a seed gives the same W on every device and for every method.
    net = build_net(configuration, arrays)
    method = components["method"].build(net=net, num_classes=arrays.num_classes, loss=loss)
    are_images = len(arrays.shape) == 3
    memory_format: MemoryFormat = settings.memory_format if are_images else "contiguous"
    layout = layout_of(memory_format, net, device, settings.precision)
    data = make_batches(configuration, arrays, device, layout)
    refuse_single_image(net, len(data.training.labels), settings.batch_size)
    if device.type == "cpu" and settings.precision == "bfloat16":
        refuse_wrong_gradients(net)
        warn_of_slow_bfloat16()
    optimizer = components["optimizer"].build()
    feedback_optimizer = components.get("optimizer.feedback", components["optimizer"]).build()
    extra_quantities = settings.alignment.quantities if settings.alignment.every else []
    net = net.to(device).to(memory_format=layout)
    method = method.to(device).to(memory_format=layout)
    learner = Learner(
        net, method, loss, optimizer, settings.precision, extra_quantities, feedback_optimizer, configuration.clip_norm
    )  # fmt: skip
    step: Callable[[Tensor, Tensor, bool], Tensor] = learner.step
    if device.type == "cuda" and settings.cuda_graph:
        if optimizer.captured and feedback_optimizer.captured:
            step = CapturedStep(learner, settings.batch_size, device)
        else:
            log.info("optimizer: cannot be captured in a CUDA graph, so each step runs without one")
    schedule = components["schedule"].build()
    feedback_schedule = components.get("schedule.feedback", components["schedule"]).build()
    # raises `UserError` before the training for a wrong factor of any batch
    for epoch in range(1, settings.epochs + 1):
        schedule.factors(epoch, settings.epochs, len(data.training))
        if "schedule.feedback" in components:
            feedback_schedule.factors(epoch, settings.epochs, len(data.training))
    return Parts(
        settings=settings,
        device=device,
        origin=origin,
        standardisation=data.standardisation,
        batches=data.training,
        validation=data.validation,
        test=data.test,
        classes=arrays.classes,
        memory_format=layout,
        schedule=schedule,
        feedback_schedule=feedback_schedule,
        learner=learner,
        step=step,
    )


def load_arrays(configuration: Configuration) -> tuple[Arrays, dict[str, Any]]:
    """Return the data set, and the entries `origin` of `Parts`. Log warnings about doubtful data."""
    settings, components = configuration.settings, configuration.components
    name, source = settings.dataset.name, components["dataset.source"].build()
    arrays, digest = load_with_digest(name, source, Path(settings.data_dir))
    repeated = test_images_in_training(name, arrays)
    warn_of_empty_classes(name, arrays)
    warn_of_channels_last(name, arrays)
    origin = {
        "samples": kind_of(arrays.train_images),
        "data": digest,
        "code": code_of(components),
        "test_images_in_training": repeated,
    }
    return arrays, origin


def build_net(configuration: Configuration, arrays: Arrays) -> BlockNet:
    """Return the network with its initial weights."""
    kind, model = kind_of(arrays.train_images), configuration.components["model"]
    refuse_shape(model, arrays.shape)
    net = model.build(kind, input_shape=arrays.shape, num_classes=arrays.num_classes)
    if kind == "tokens":
        highest = max(arrays.train_images.max(), arrays.test_images.max())
        net.example = torch.full((1, *arrays.shape), int(highest))
    initialise(net, configuration.weight_init)
    return net


class Data(NamedTuple):
    """The batches of a run. See `Parts` for the fields."""

    training: Batches
    validation: EvaluationBatches
    test: EvaluationBatches
    standardisation: dict[str, Tensor]


def make_batches(
    configuration: Configuration, arrays: Arrays, device: torch.device, layout: torch.memory_format
) -> Data:
    """Split, standardise and move the samples, and return their batches.

    Raises `UserError` if the options of the data set or the augmentation do not fit the samples.
    """
    settings = configuration.settings
    dataset, smoke = settings.dataset, settings.smoke
    images, labels = arrays.train_images, arrays.train_labels
    strata = labels if settings.validation_split == "stratified" else None
    indices = split(len(labels), settings.validation_fraction, settings.seed, strata)
    train, held_out = (index.numpy() for index in indices)
    train, held_out = train[:smoke][: settings.limit], held_out[:smoke]
    training = images[train]
    prepared = preparation(training, dataset.standardise)
    standardisation = {}
    if isinstance(prepared, Standardise):
        for name, statistic in (("mean", prepared.mean), ("std", prepared.std)):
            standardisation[name] = torch.from_numpy(statistic)
        if count := count_new_variation(training, arrays.test_images):
            text = "%s: %d features are constant in the training samples, but not in the test samples; not scaled"
            log.warning(text, dataset.name, count)
    augmentation = configuration.components["augmentation"].build()
    are_images = kind_of(images) == "images"
    augmentation.check(arrays.shape, are_images, configuration.values["augmentation"]["name"])
    normalise = Normalise(dataset.mean, dataset.std)
    normalise(torch.tensor(images[:1]))  # raises `UserError` for a wrong number of values

    def evaluation(images: np.ndarray, labels: np.ndarray) -> EvaluationBatches:
        samples = resident(prepared(images), labels, device)
        return EvaluationBatches(*samples, normalise, device, memory_format=layout)

    batches = Batches(
        *resident(prepared(training), labels[train], device),
        normalise, augmentation, settings.batch_size, settings.seed, device, memory_format=layout,
    )  # fmt: skip
    validation = evaluation(images[held_out], labels[held_out])
    test = evaluation(arrays.test_images[:smoke], arrays.test_labels[:smoke])
    return Data(batches, validation, test, standardisation)


def refuse_shape(model: Component, shape: tuple[int, ...]) -> None:
    """Raise `UserError` if the samples have the wrong number of axes for the model.

    shape: shape of a sample. The type hint of the model's parameter `input_shape` tells how many axes the model needs.
    """
    axes = get_args(get_type_hints(model.target).get("input_shape"))
    if axes and Ellipsis not in axes and len(axes) != len(shape):
        raise UserError(
            f"model={model.target.__name__}: needs samples with {len(axes)} axes, but their shape is {shape}"
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
