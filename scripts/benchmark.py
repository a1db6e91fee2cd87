"""Measure the speed of every method and of plain PyTorch in one process.

    python scripts/benchmark.py [--quick] [--device cpu|cuda] [--threads 1] [--models fc-mnist,conv3,…]
                                [--methods bp,fa,…|all] [--precisions float32,bfloat16] [--out FILE]

The script prints tables of median times and of their ratios, and writes the measurements to a JSON file. Images are
random, because the content of an image does not change the time. The contenders of a table (the methods and plain
PyTorch) take turns after every step. If other programs slow the machine down, they slow down all contenders equally.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from measuring import Calls, Numbers, medians, peak_mb, random_batch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from yardsticks import (
    BATCH,
    CLASSES,
    MODELS,
    PublishedLas,
    Setting,
    captured_plain,
    learner,
    plain_steps,
)

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.data.augmentation import Augmentation
from dfl_experiments.data.batches import Batches, EvaluationBatches, Normalise
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Precision
from dfl_experiments.running.device import layout_of, set_up
from dfl_experiments.running.provenance import device_name, git_commit, versions

PAPER = ("bp", "shallow", "dfa", "las", "ltas")


def contenders_of(setting: Setting, methods: Sequence[str]) -> Calls:
    """Return a training step of every contender."""
    x, target = random_batch(MODELS[setting.model][2], CLASSES, BATCH, setting.device)
    plain = plain_steps(setting)
    steps: Calls = {name: partial(step, x, target) for name, step in plain.items()}
    for method in methods:
        try:
            trainer = learner(method, setting)
        except UserError as error:
            print(f"{method} on {setting.model}: {error}")
            continue
        layout = layout_of("auto", trainer.net, setting.device, trainer.precision)
        x = x.contiguous(memory_format=layout)  # the memory format of a run
        steps[method] = partial(trainer.step, x, target)
        if method != "bp":
            steps[f"{method} + alignment"] = partial(trainer.step, x, target, align=True)
        if setting.on_gpu:
            captured = CapturedStep(learner(method, setting), BATCH, setting.device)
            steps[f"{method} captured"] = partial(captured, x, target)
            steps[f"{method} captured + alignment"] = partial(captured, x, target, align=True)
    if setting.on_gpu:
        for name, step in plain.items():
            if "compiled" not in name:
                steps[f"{name} captured"] = partial(captured_plain(step, setting.device), x, target)
    return steps


def step_times(
    setting: Setting, methods: Sequence[str], rounds: int, instances: int
) -> dict[str, Numbers]:
    """Return the measured numbers of every contender.

        ms: milliseconds per step.
        peak_mb: peak memory in MB. Compiled and captured steps lack this number.
        gflop: floating-point operations of the step, divided by 10⁹. Only plain PyTorch and the methods have it.

    rounds: number of steps of each contender, over all instances.
    instances: how often all contenders are created. The time of a small network changes by several per cent with the
        memory addresses of its weights. The result is therefore the median over the instances.
    """
    times: list[Numbers] = []
    for _ in range(instances):
        steps = contenders_of(setting, methods)
        times.append(medians(steps, rounds // instances, setting.device))
    result: dict[str, Numbers] = {}
    for name, step in steps.items():
        seconds = statistics.median(of_instance[name] for of_instance in times)
        result[name] = {"ms": seconds * 1e3}
        # tensors of compiled or captured steps cannot be counted
        if "compiled" not in name and "captured" not in name:
            result[name]["peak_mb"] = peak_mb(step, setting.device)
    for name in ("plain", *methods):
        if name in steps:
            with FlopCounterMode(display=False) as counter:
                steps[name]()
            result[name]["gflop"] = counter.get_total_flops() / 1e9
    return result


def epoch_times(model: str, count: int, device: torch.device) -> Numbers:
    """Return three times: a LAS epoch of the published code, a LAS epoch of this project, and an evaluation.

    The times are in milliseconds per image.

    count: number of images.
    """
    setting = Setting(model, device)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, *MODELS[model][2]), np.uint8)
    labels = random.integers(0, CLASSES, count)
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
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def show_steps(setting: Setting, steps: dict[str, Numbers]) -> None:
    """Print the table of a model.

    The column "/ plain" is the time divided by that of the fastest step in plain PyTorch.
    """
    values = pd.DataFrame.from_dict(steps, orient="index")
    ms, base = values.ms, values.index.str.removesuffix(" + alignment")
    table = pd.DataFrame({"ms": ms})
    table["/ plain"] = ms / ms[ms.index.str.startswith("plain")].min()
    table["/ bp"] = ms / ms["bp"]
    table["alignment"] = (ms / ms[base].array).where(base != ms.index)
    table["Gflop"] = values.gflop
    table["peak MB"] = values.peak_mb
    print(f"\n{setting.model}, {setting.precision}, batch {BATCH}")
    print(table.to_string(float_format="%.3f", na_rep=""))


def rounds_of(model: str, quick: bool, on_gpu: bool) -> tuple[int, int]:
    """Return the number of rounds and the number of instances for `step_times`."""
    rounds, instances = {"fc-mnist": (350, 7), "fc-cifar10": (18, 3)}.get(model, (12, 1))
    if quick:
        rounds, instances = rounds // 2, min(instances, 3)
    if on_gpu:  # one instance: addresses matter less on a GPU, and compilation takes longer
        rounds, instances = min(rounds, 20), 1
    return rounds, instances


def main() -> None:
    """Measure, print the tables, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds; takes under a minute")
    parser.add_argument(
        "--device", type=torch.device, default="cpu", help="cpu or cuda (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    choices = ", ".join(MODELS)
    parser.add_argument(
        "--models", default="", help=f"any of {choices} (default: all; the first with --quick)"
    )
    parser.add_argument(
        "--methods",
        default=",".join(PAPER),
        help="methods in addition to BP, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--precisions", default="float32", help="float32, bfloat16, tf32 (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmark.json"), help="default: %(default)s"
    )
    options = parser.parse_args()
    device, quick, on_gpu = options.device, options.quick, options.device.type == "cuda"
    models = options.models.split(",") if options.models else list(MODELS)[: 1 if quick else None]
    names = group_options("method") if options.methods == "all" else options.methods.split(",")
    methods = ["bp", *(method for method in names if method != "bp")]
    precisions = options.precisions.split(",")
    known = {*MODELS, *group_options("method"), *get_args(Precision)}
    for name in (*models, *methods, *precisions):
        if name not in known:
            parser.error(f"{name}: unknown; --help lists the models, methods and precisions")
    # Set up PyTorch as a training run does, also for the steps in plain PyTorch.
    as_a_run = partial(set_up, device, seed=0, deterministic=False, threads=options.threads)
    report: dict[str, Any] = {
        "device": device_name(device), "machine": platform.platform(), "versions": versions(),
        "git_commit": git_commit(), "steps": {}, "epochs": {},
    }  # fmt: skip
    for model in models:
        rounds, instances = rounds_of(model, quick, on_gpu)
        for precision in precisions:
            as_a_run(precision)
            setting = Setting(model, device, precision)
            steps = step_times(setting, methods, rounds, instances)
            show_steps(setting, steps)
            report["steps"][f"{model} {precision}"] = steps
        images = 12800 if model == "fc-mnist" or on_gpu else 640
        report["epochs"][model] = times = epoch_times(
            model, images // 4 if quick else images, device
        )
        print("whole epochs of las, ms an image:", *(f"{k} {v:.4f}" for k, v in times.items()))
        print(f"  published way / here {times['published way'] / times['here']:.2f}", end="")
        print(f", evaluation takes {times['evaluation'] / times['here']:.0%} of the training time")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
