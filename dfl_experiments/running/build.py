"""Build the parts of a run from its configuration, on its device: data, network, method, and the step that trains."""

import copy
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
from dfl_experiments.data.batches import Batches, EvaluationBatches, Normalise, preparation, resident, split
from dfl_experiments.data.packs import load_with_digest, test_images_in_training
from dfl_experiments.data.sources import kind_of
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.engine.initialise import initialise
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.errors import UserError, reason
from dfl_experiments.ranges import MemoryFormat
from dfl_experiments.running.device import ALL_THREADS, choose_device, layout_of, set_up
from dfl_experiments.running.provenance import code_of
from dfl_experiments.running.run_directory import epoch_columns, iteration_columns
from dfl_experiments.schedules import Schedule

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """Everything that the epochs need."""

    settings: Settings
    """The checked settings of the run."""
    device: torch.device
    """Where the network and its batches are."""
    origin: dict[str, Any]
    """Digests of the data and of the user's own code, and the count of test images in training, for result.json."""
    batches: Batches
    """Training batches of every epoch."""
    validation: EvaluationBatches
    """Held-out images; may be empty."""
    test: EvaluationBatches
    """Test images."""
    train_size: int
    """Number of training images."""
    num_classes: int
    """Number of classes."""
    memory_format: torch.memory_format
    """Memory format of images in convolutional nets, with `auto` resolved."""
    schedule: Schedule
    """Gives the factor of the learning rates in every iteration."""
    learner: Learner
    """Network, method and their optimizers."""
    step: Callable[[Tensor, Tensor, bool], Tensor]
    """Trains a batch, as `Learner.step` does; a captured CUDA graph where that is used."""

    @property
    def columns(self) -> dict[str, list[str]]:
        """Column names of the run's tables; the first column of each counts its rows."""
        metric_names, depth = self.learner.metric_names, self.learner.net.depth
        return {
            "iterations": iteration_columns(metric_names),
            "epochs": epoch_columns(depth, self.learner.extra_quantities),
        }


def build(configuration: Configuration, device_name: str | None = None, threads: int = ALL_THREADS) -> Parts:
    """Build the parts of a run.

    device_name: device to use in place of the configured one.
    threads: CPU threads, if the configuration does not say.
    Raises `UserError` for missing data, and for parts that do not fit together.
    """
    settings, components = configuration.settings, configuration.components
    device = choose_device(device_name or settings.device)
    set_up(device, settings.precision, settings.seed, settings.deterministic, settings.threads or threads)
    dataset = settings.dataset
    source, data_dir = components["dataset.source"].build(), Path(settings.data_dir)
    arrays, data = load_with_digest(dataset.name, source, data_dir)
    repeated = test_images_in_training(dataset.name, arrays)
    origin = {"data": data, "code": code_of(components), "test_images_in_training": repeated}
    strata = arrays.train_labels if settings.validation_split == "stratified" else None
    indices = split(len(arrays.train_labels), settings.validation_fraction, settings.seed, strata)
    train, held_out = (index.numpy() for index in indices)
    loss = LOSSES[settings.loss]
    # built on the CPU: a seed gives the same weights on every device, and every method the same W
    refuse_shape(components["model"], arrays.shape)
    net = components["model"].build(input_shape=arrays.shape, num_classes=arrays.num_classes)
    kind = kind_of(arrays.train_images)
    if kind == "tokens":
        highest = max(arrays.train_images.max(), arrays.test_images.max())
        net.example = torch.full((1, *arrays.shape), int(highest))
    initialise(net, configuration.weight_init)
    method = components["method"].build(net=net, num_classes=arrays.num_classes, loss=loss)
    memory_format: MemoryFormat = settings.memory_format if len(arrays.shape) == 3 else "contiguous"
    layout = layout_of(memory_format, net, device, settings.precision)
    most = settings.smoke
    train, held_out = train[:most][: settings.limit], held_out[:most]
    normalise = Normalise(dataset.mean, dataset.std)
    images, labels = arrays.train_images, arrays.train_labels
    training = images[train]
    prepared = preparation(training, dataset.standardise)
    evaluation = partial(EvaluationBatches, normalise=normalise, device=device, memory_format=layout)
    validation = evaluation(*resident(prepared(images[held_out]), labels[held_out], device))
    test = evaluation(*resident(prepared(arrays.test_images[:most]), arrays.test_labels[:most], device))
    augmentation = components["augmentation"].build()
    augmentation.check(arrays.shape, kind == "images", configuration.values["augmentation"]["name"])
    batches = Batches(
        *resident(prepared(training), labels[train], device),
        normalise, augmentation, settings.batch_size, settings.seed, device, memory_format=layout,
    )  # fmt: skip
    refuse_single_image(net, len(train), settings.batch_size)
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
            log.info("optimizer: its step cannot be part of a CUDA graph, so the whole step runs eagerly")
    return Parts(
        settings, device, origin, batches, validation, test, len(train), arrays.num_classes, layout,
        components["schedule"].build(), learner, step,
    )  # fmt: skip


def refuse_shape(model: Component, shape: tuple[int, ...]) -> None:
    """Raise `UserError` if the model's annotation of `input_shape` has another number of axes than the samples."""
    axes = get_args(get_type_hints(model.target).get("input_shape"))
    if axes and Ellipsis not in axes and len(axes) != len(shape):
        raise UserError(f"model={model.target.__name__}: needs samples with {len(axes)} axes, but they are {shape}")


@torch.no_grad()
def refuse_single_image(net: BlockNet, train_size: int, batch_size: int) -> None:
    """Raise `UserError` if the last batch has one image and the network cannot normalise a batch of one."""
    if (train_size % batch_size or batch_size) > 1:
        return
    try:
        copy.deepcopy(net).train()(net.blank())
    except ValueError as error:  # raised by PyTorch's batch normalisation
        problem = f"the last batch of {train_size} images has one image ({reason(error)})"
        raise UserError(f"batch_size={batch_size}: {problem}; choose another batch_size or limit") from error
