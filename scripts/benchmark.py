"""The one place where time is judged: every method beside plain PyTorch, interleaved, in one process.

    python scripts/benchmark.py [--quick] [--device cpu|cuda] [--threads 1] [--models fc-mnist,conv3,…]
                                [--methods bp,fa,…|all] [--grid DATA_DIR] [--out FILE]

Prints tables of medians and of ratios within this run, and writes them to a JSON file. Images are random: their content
changes no time. Contenders of one table take turns step by step, so that what else the machine does hits all alike.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import grid, learner_of, medians, peak_mb, random_batch, start_up
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dfl_experiments.configuration.composition import compose, group_options
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.augmentation import Augmentation
from dfl_experiments.data.batches import Normalise, random_stream
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.engine.learner import Learner
from dfl_experiments.errors import UserError
from dfl_experiments.running.build import build
from dfl_experiments.running.device import reuse_memory
from dfl_experiments.running.epochs import State, train
from dfl_experiments.running.provenance import device_name, git_commit, versions
from dfl_experiments.running.signals import Stop
from dfl_experiments.running.tracking import track

BATCH = 64
MODELS = {
    "fc-mnist": ("fc", "mnist", (1, 28, 28)),
    "fc-cifar10": ("fc", "cifar10", (3, 32, 32)),
    "conv3": ("conv3", "cifar10", (3, 32, 32)),
    "conv3_bn": ("conv3_bn", "cifar10", (3, 32, 32)),
    "resnet18": ("resnet18", "cifar10", (3, 32, 32)),
}
PAPER = ("bp", "shallow", "dfa", "las", "ltas")
ADAM_BYTES = 32  # per weight: gradient written and read; weight and both moments read and written; float32
Step = Callable[[Tensor, Tensor], object]


def learner(method: str, model: str, device: torch.device) -> Learner:
    """A method on a model of the paper's size."""
    name, dataset, shape = MODELS[model]
    cfg = check(compose([f"method={method}", f"model={name}", f"dataset={dataset}"]))
    return learner_of(cfg, shape, 10, device)


def plain(model: str, device: torch.device) -> Step:
    """The same net as people write it: nn.Sequential, loss.backward(), a fused optimizer."""
    blocks = learner("bp", model, device).net
    net = nn.Sequential(*(nn.Sequential(*block.children()) for block in blocks.blocks), blocks.head)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def step(x: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()
        optimizer.step()

    return step


def contenders_of(model: str, methods: Sequence[str], device: torch.device) -> tuple[dict[str, Step], dict[str, int]]:
    """A step of every contender on a model, and how many weights it trains."""
    steps: dict[str, Step] = {"plain": plain(model, device)}
    weights = {"plain": 0}
    for method in methods:
        try:
            one = learner(method, model, device)
        except UserError as error:
            print(f"{method} on {model}: {error}")
            continue
        trained = [*one.parameters, *(p for p in one.method.parameters() if p.requires_grad)]
        weights[method] = sum(p.numel() for p in trained)
        steps[method] = one.step
        if method != "bp":
            steps[f"{method} + alignment"] = partial(one.step, align=True)
        if device.type == "cuda":
            captured = CapturedStep(learner(method, model, device), BATCH, device)
            steps[f"{method} captured"] = captured
            steps[f"{method} captured + alignment"] = partial(captured, align=True)
    weights["plain"] = weights["bp"]
    return steps, weights


def step_times(
    model: str, methods: Sequence[str], rounds: int, instances: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds per step of every contender, and its operations and bytes of weights.

    instances: how many times all are made anew, for where the allocator puts a small network's weights moves its time
    by some per cent; the median over all is taken.
    """
    shape = MODELS[model][2]
    x, target = random_batch(shape, 10, BATCH, device)

    def call(step: Step) -> Callable[[], object]:
        return lambda: step(x, target)

    found: list[dict[str, float]] = []
    for _ in range(instances):
        steps, weights = contenders_of(model, methods, device)
        found.append(medians({name: call(step) for name, step in steps.items()}, rounds // instances, device))
    result = {name: {"ms": statistics.median(times[name] for times in found) * 1e3} for name in steps}
    for name, step in steps.items():
        result[name]["peak_mb"] = peak_mb(call(step), device)
    for name, count in weights.items():
        with FlopCounterMode(display=False) as counter:
            steps[name](x, target)
        result[name] |= {"gflop": counter.get_total_flops() / 1e9, "optimizer_mb": count * ADAM_BYTES / 1e6}
    return result


def rates(device: torch.device) -> dict[str, float]:
    """What this machine's matrix product, convolution and copy reach: operations and bytes per second."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    source = torch.randn(64 * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    images, kernels = torch.randn(BATCH, 96, 16, 16, device=device), torch.randn(128, 96, 5, 5, device=device)
    contenders = {
        "product": lambda: a @ b,
        "convolution": lambda: F.conv2d(images, kernels, padding=2),
        "copy": lambda: target.copy_(source),
    }
    found = medians(contenders, 5, device)
    products = 2 * 2048**3 / found["product"]
    convolutions = 2 * images.numel() * 128 * 25 / found["convolution"]
    return {"product": products, "convolution": convolutions, "bytes_per_s": 2 * source.nbytes / found["copy"]}


def augmentation_times(count: int, rounds: int) -> dict[str, float]:
    """Microseconds per image of randaugment_cutout_flip: whole batches, and torchvision's pipeline image by image."""
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
    """Seconds of an epoch of FC on MNIST-sized images with alignment at every iteration: W&B off and offline."""
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
                start = time.perf_counter()  # W&B has threads and a process of its own
                train(parts, state, run_dir, cfg.science, tracker, Stop())
                times[mode].append(time.perf_counter() - start)
    return {mode: min(values) for mode, values in times.items()}


def show_steps(model: str, steps: dict[str, dict[str, float]], rate: dict[str, float]) -> None:
    """One model's table."""
    print(f"\n{model}, batch {BATCH}")
    print(
        f"{'':28} {'ms':>9} {'/ plain':>8} {'/ bp':>7} {'alignment':>10} {'floor ms':>9} {'reached':>8} {'peak MB':>8}"
    )
    for name, values in steps.items():
        base = name.removesuffix(" + alignment")
        ratio = f"{values['ms'] / steps[base]['ms']:.3f}" if base != name else ""
        floor, reached = "", ""
        if "gflop" in values:
            best = rate["product"] if model.startswith("fc") else max(rate["product"], rate["convolution"])
            seconds = values["gflop"] * 1e9 / best + values["optimizer_mb"] * 1e6 / rate["bytes_per_s"]
            values["floor_ms"] = seconds * 1e3
            floor, reached = f"{seconds * 1e3:.2f}", f"{seconds * 1e3 / values['ms']:.0%}"
        print(
            f"{name:28} {values['ms']:9.2f} {values['ms'] / steps['plain']['ms']:8.3f} "
            f"{values['ms'] / steps['bp']['ms']:7.3f} {ratio:>10} {floor:>9} {reached:>8} "
            f"{values['peak_mb']:8.1f}"
        )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", default="", help=f"of {', '.join(MODELS)} (default: all, with --quick the first)")
    parser.add_argument("--methods", default=",".join(PAPER), help="beside BP, or all (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark.json"))
    parser.add_argument("--grid", metavar="DATA_DIR", help="also run a 16-point grid on the MNIST there (minutes)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        reuse_memory()  # as a run does; it serves plain PyTorch as well
    device = torch.device(options.device)
    models = options.models.split(",") if options.models else list(MODELS)[: 1 if options.quick else None]
    asked = group_options("method") if options.methods == "all" else options.methods.split(",")
    methods = ["bp", *(method for method in asked if method != "bp")]
    rate = rates(device)
    gflops = {name: round(rate[name] / 1e9) for name in ("product", "convolution")}
    print(f"{device_name(device)}: Gflop/s {gflops}, copy {rate['bytes_per_s'] / 1e9:.1f} GB/s")
    report: dict[str, Any] = {
        "device": device_name(device), "machine": platform.platform(), "versions": versions(),
        "git_commit": git_commit(), "rates": rate, "steps": {},
    }  # fmt: skip
    for model in models:
        rounds, instances = (350, 7) if model == "fc-mnist" else (12, 1)
        if options.quick:
            rounds, instances = rounds // 2, min(instances, 3)
        steps = step_times(model, methods, rounds, instances, device)
        show_steps(model, steps, rate)
        report["steps"] |= {model: steps}
    report["augmentation_us_per_image"] = found = augmentation_times(256 if options.quick else 2048, 3)
    print("\nrandaugment_cutout_flip, µs per image: ", {name: round(value, 1) for name, value in found.items()})
    print(f"  {found['image by image'] / found['whole batches']:.1f} × faster")
    report["tracking_s"] = found = tracking_times(6400 if options.quick else 60000, options.device, options.threads)
    print("\none epoch of las on FC-MNIST, s: ", {name: round(value, 2) for name, value in found.items()})
    print(f"  offline / disabled {found['offline'] / found['disabled']:.3f}")
    if not options.quick:
        report["start_up_s"] = found = start_up()
        print(
            "\na one-step run on the digits, start to end, s: ",
            {name: round(value, 2) for name, value in found.items()},
        )
    if options.grid:
        report["runs_per_hour"] = found = grid(options.grid)
        print(
            "\n16 points on MNIST, 2 epochs each, runs per hour: ",
            {name: round(value) for name, value in found.items()},
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
