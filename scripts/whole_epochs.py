"""Measure the time of augmentation, of tracking, and of whole epochs of LAS.

The epochs of LAS are measured twice: as this project trains, and as published code trains.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import CPU, Numbers, medians
from yardsticks import BATCH, CLASSES, MODELS, PublishedLas, Setting, learner

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.augmentation import Augmentation
from dfl_experiments.data.batches import Batches, EvaluationBatches, Normalise, random_stream
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.running.build import build
from dfl_experiments.running.device import layout_of
from dfl_experiments.running.epochs import State, Training
from dfl_experiments.running.signals import Stop
from dfl_experiments.running.tracking import track


def augmentation_times(count: int, rounds: int) -> Numbers:
    """Return the microseconds per image of randaugment_cutout_flip, and of torchvision's transforms.

    randaugment_cutout_flip works on whole batches, and torchvision on single images.
    """
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    pictures = [to_pil_image(image) for image in images]
    normalise = transforms.Normalize([0.5] * 3, [0.25] * 3)
    each = transforms.Compose(
        [
            transforms.RandAugment(),
            transforms.ToTensor(),
            normalise,
            transforms.RandomHorizontalFlip(),
        ]
    )
    whole = Augmentation(flip=0.5, randaugment=True, cutout=14)
    together = Normalise([0.5], [0.25])
    contenders = {
        "image by image": lambda: torch.stack([each(picture) for picture in pictures]),
        "whole batches": lambda: whole(images, together, random_stream(0)),
    }
    seconds = medians(contenders, rounds, CPU)
    return {name: value / count * 1e6 for name, value in seconds.items()}


def random_data(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random images of type uint8 and their labels.

    shape: shape of one image. count: number of images.
    """
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, *shape), np.uint8)
    return images, random.integers(0, CLASSES, count)


def tracking_times(count: int, device: torch.device, threads: int) -> Numbers:
    """Return the seconds of one epoch of an FC net that measures alignment at every iteration.

    The epoch is timed with W&B disabled and with W&B offline.

    count: number of training images. They have the size of MNIST images.
    """
    times: dict[str, list[float]] = {"disabled": [], "offline": []}
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder) / "mnist", count)
        for mode in ("disabled", "offline") * 3:
            overrides = [
                "dataset=mnist",
                f"data_dir={folder}",
                "epochs=1",
                "protocol=paper",
                "sweep=benchmark",
            ]
            overrides += [f"tracking={mode}", f"device={device}", f"threads={threads}"]
            cfg = check(compose(overrides))
            run_dir = Path(tempfile.mkdtemp(dir=folder))
            parts, state = build(cfg), State()
            with track(cfg.settings.tracking, run_dir, cfg.values, parts.columns, None) as tracker:
                # wall time, because W&B has its own threads and process
                start = time.perf_counter()
                Training(parts, state, run_dir, cfg.config_digest, tracker, Stop()).run()
                times[mode].append(time.perf_counter() - start)
    return {mode: min(values) for mode, values in times.items()}


def write_mnist(folder: Path, count: int) -> None:
    """Write random images and labels in the format of the MNIST data set.

    count: number of training images.
    """
    folder.mkdir()
    for split, size, seed in (("train", count, 0), ("test", 100, 1)):
        images, labels = random_data((1, 28, 28), size, seed)
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)
    (folder / "classes.json").write_text(json.dumps(list("0123456789")))


def epoch_times(model: str, count: int, device: torch.device) -> Numbers:
    """Return three times: a LAS epoch of the published code, a LAS epoch of this project, and an evaluation.

    The times are in milliseconds per image.

    count: number of images.
    """
    setting = Setting(model, device)
    images, labels = random_data(MODELS[model][2], count)
    pictures = [
        (to_picture(image), int(label)) for image, label in zip(images, labels, strict=True)
    ]
    published = PublishedLas(learner("bp", setting).net, pictures, BATCH)
    trainer = learner("las", setting)
    layout = layout_of("auto", trainer.net, device, trainer.precision)
    step = CapturedStep(trainer, BATCH, device) if setting.on_gpu else trainer.step
    x, targets = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    normalise = Normalise([0.5], [0.25])
    batches = Batches(x, targets, normalise, Augmentation(), BATCH, 0, device, memory_format=layout)
    evaluation = EvaluationBatches(x, targets, normalise, device, memory_format=layout)

    def epoch() -> None:
        for x, target in batches.epoch(1):
            step(x, target)

    @torch.no_grad()
    def evaluate() -> None:
        for x, _ in evaluation:
            trainer.net(x)

    contenders = {"published way": published.epoch, "here": epoch, "evaluation": evaluate}
    seconds = medians(contenders, 3, device, calls=1)
    return {name: value / count * 1e3 for name, value in seconds.items()}


def to_picture(image: np.ndarray) -> Any:
    """Convert an image to a PIL image. The image has shape (C, H, W) and type uint8."""
    from PIL import Image

    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
