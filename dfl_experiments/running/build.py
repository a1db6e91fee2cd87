"""What a configuration names, built and on its device: the data, the network, the method, and the step that trains."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfl_experiments.configuration.schema import Configuration, Settings
from dfl_experiments.data.batches import Batches, EvaluationBatches, Normalise, resident, split
from dfl_experiments.data.packs import load_known, test_images_in_training
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.errors import UserError, reason
from dfl_experiments.optimizers import OptimizerFactory
from dfl_experiments.running.device import ALL_THREADS, choose_device, layout_of, set_up
from dfl_experiments.running.provenance import code_of
from dfl_experiments.running.run_directory import epoch_columns, iteration_columns


@dataclass
class Parts:
    """Everything that the epochs need.

    origin: what result.json says of the data set and of one's own code; train_size: images to train on; memory_format:
    as used; step: calls like `Learner.step`.
    """

    settings: Settings
    device: torch.device
    origin: dict[str, Any]
    batches: Batches
    validation: EvaluationBatches
    test: EvaluationBatches
    train_size: int
    num_classes: int
    memory_format: torch.memory_format
    schedule: OptimizerFactory
    learner: Learner
    step: Callable[[Tensor, Tensor, bool], Tensor]

    @property
    def columns(self) -> dict[str, list[str]]:
        """Those of the tables that the run leaves, by the table's name; the first one counts the rows."""
        numbers, depth = self.learner.numbers, self.learner.net.depth
        return {"iterations": iteration_columns(numbers), "epochs": epoch_columns(depth, self.learner.more)}


def build(configuration: Configuration, device_name: str | None = None, threads: int = ALL_THREADS) -> Parts:
    """The parts of a run. device_name, threads: what to use where the settings leave it open.

    Raises `UserError` for data that cannot be had, and for parts that do not fit together.
    """
    settings, components = configuration.settings, configuration.components
    device = choose_device(device_name or settings.device)
    set_up(device, settings.precision, settings.seed, settings.deterministic, settings.threads or threads)
    dataset = settings.dataset
    source, data_dir = components["dataset.source"].build(), Path(settings.data_dir)
    arrays, data = load_known(dataset.name, source, data_dir)
    seen = test_images_in_training(dataset.name, arrays)
    origin = {"data": data, "code": code_of(components), "test_images_in_training": seen}
    indices = split(len(arrays.train_labels), settings.validation_fraction, settings.seed)
    train, held_out = (index.numpy() for index in indices)
    loss = LOSSES[settings.loss]
    # built on the CPU: a seed means the same weights on every device, and the same W for every method
    net = components["model"].build(input_shape=arrays.shape, num_classes=arrays.num_classes)
    method = components["method"].build(net=net, num_classes=arrays.num_classes, loss=loss)
    layout = layout_of(settings.memory_format, net, device, settings.precision)
    few = settings.smoke
    train, held_out = train[:few][: settings.limit], held_out[:few]
    normalise = Normalise(dataset.mean, dataset.std)
    images, labels = arrays.train_images, arrays.train_labels
    evaluation = partial(EvaluationBatches, normalise=normalise, device=device, memory_format=layout)
    validation = evaluation(*resident(images[held_out], labels[held_out], device))
    test = evaluation(*resident(arrays.test_images[:few], arrays.test_labels[:few], device))
    augmentation = components["augmentation"].build()
    batches = Batches(
        *resident(images[train], labels[train], device),
        normalise, augmentation, settings.batch_size, settings.seed, device, memory_format=layout,
    )  # fmt: skip
    check_batches(net, len(train), settings.batch_size)
    schedule = components["optimizer"].build()
    more = settings.alignment.quantities if settings.alignment.every else []
    net, method = (module.to(device=device, memory_format=layout) for module in (net, method))
    learner = Learner(net, method, loss, schedule, settings.precision, more)
    step: Callable[[Tensor, Tensor, bool], Tensor] = learner.step
    if device.type == "cuda" and settings.cuda_graph:
        step = CapturedStep(learner, settings.batch_size, device)
    return Parts(
        settings, device, origin, batches, validation, test, len(train), arrays.num_classes, layout, schedule, learner,
        step,
    )  # fmt: skip


@torch.no_grad()
def check_batches(net: BlockNet, train_size: int, batch_size: int) -> None:
    """Raise `UserError` where batch normalisation would have a single number per channel to normalise."""
    if (train_size % batch_size or batch_size) > 1:
        return
    try:
        copy.deepcopy(net).train()(torch.zeros(1, *net.input_shape))
    except ValueError as error:  # PyTorch's word for it
        told = f"the last batch of {train_size} images holds one ({reason(error)}); choose another batch_size or limit"
        raise UserError(f"batch_size={batch_size}: {told}") from error
