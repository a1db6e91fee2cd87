"""Measure whole epochs: augmentation, tracking, and LAS with data, here and as in the published code."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import medians
from yardsticks import BATCH, CLASSES, MODELS, PublishedLas, learner

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.augmentation import Augmentation
from dfl_experiments.data.batches import Batches, EvaluationBatches, Normalise, random_stream
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.running.build import build
from dfl_experiments.running.device import layout_of
from dfl_experiments.running.epochs import State, train
from dfl_experiments.running.signals import Stop
from dfl_experiments.running.tracking import track


def augmentation_times(count: int, rounds: int) -> dict[str, float]:
    """Return microseconds per image of randaugment_cutout_flip on whole batches, and of torchvision image by image."""
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    pictures = [to_pil_image(image) for image in images]
    normalise = transforms.Normalize([0.5] * 3, [0.25] * 3)
    each = transforms.Compose(
        [transforms.RandAugment(), transforms.ToTensor(), normalise, transforms.RandomHorizontalFlip()]
    )
    whole = Augmentation(flip=0.5, randaugment=True, cutout=14)
    together = Normalise([0.5], [0.25])
    contenders = {
        "image by image": lambda: torch.stack([each(picture) for picture in pictures]),
        "whole batches": lambda: whole(images, together, random_stream(0)),
    }
    return {name: value / count * 1e6 for name, value in medians(contenders, rounds, torch.device("cpu")).items()}


def tracking_times(images: int, device: str, threads: int) -> dict[str, float]:
    """Return the seconds of an FC epoch with alignment at every iteration, with W&B disabled and offline.

    images: number of training images, of the size of MNIST.
    """
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {"disabled": [], "offline": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "mnist"
        data.mkdir()
        for split, count in (("train", images), ("test", 100)):
            np.save(data / f"{split}_images.npy", random.integers(0, 256, (count, 1, 28, 28), np.uint8))
            np.save(data / f"{split}_labels.npy", random.integers(0, 10, count))
        (data / "classes.json").write_text(json.dumps([str(digit) for digit in range(10)]))
        for mode in ("disabled", "offline") * 3:
            overrides = ["dataset=mnist", f"data_dir={folder}", "epochs=1", f"tracking={mode}", f"device={device}"]
            cfg = check(compose([*overrides, "protocol=paper", "sweep=benchmark", f"threads={threads}"]))
            run_dir = Path(tempfile.mkdtemp(dir=folder))
            parts, state = build(cfg), State()
            with track(cfg.settings.tracking, run_dir, cfg.values, parts.columns, None) as tracker:
                start = time.perf_counter()  # wall time, because W&B has threads and a process of its own
                train(parts, state, run_dir, cfg.config_digest, tracker, Stop())
                times[mode].append(time.perf_counter() - start)
    return {mode: min(values) for mode, values in times.items()}


def epoch_times(model: str, images: int, device: torch.device) -> dict[str, float]:
    """Return milliseconds per image of a LAS epoch with data, as published and here, and of an evaluation."""
    shape = MODELS[model][2]
    random = np.random.default_rng(0)
    arrays = random.integers(0, 256, (images, *shape), np.uint8), random.integers(0, CLASSES, images)
    pictures = [(to_picture(image), int(label)) for image, label in zip(*arrays, strict=True)]
    published = PublishedLas(learner("bp", model, device).net, pictures, BATCH)
    trainer = learner("las", model, device)
    layout = layout_of("auto", trainer.net, device, trainer.precision)
    step = CapturedStep(trainer, BATCH, device) if device.type == "cuda" else trainer.step
    x, labels = (torch.from_numpy(array).to(device) for array in arrays)
    normalise = Normalise([0.5], [0.25])
    batches = Batches(x, labels, normalise, Augmentation(), BATCH, 0, device, memory_format=layout)
    evaluation = EvaluationBatches(x, labels, normalise, device, memory_format=layout)

    def epoch() -> None:
        for x, target in batches.epoch(1):
            step(x, target)

    @torch.no_grad()
    def evaluate() -> None:
        for x, _ in evaluation:
            trainer.net(x)

    contenders = {"published way": published.epoch, "here": epoch, "evaluation": evaluate}
    return {name: seconds / images * 1e3 for name, seconds in medians(contenders, 3, device, calls=1).items()}


def to_picture(image: np.ndarray) -> Any:
    """Return a PIL image. image: (C, H, W) uint8."""
    from PIL import Image

    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
