"""Measure the speed of every method and of plain PyTorch in one process.

    python scripts/benchmark.py [--quick] [--device cpu|cuda] [--threads 1] [--models fc-mnist,conv3,…]
                                [--methods bp,fa,…|all] [--precisions float32,bfloat16] [--out FILE]
    python scripts/benchmark.py --sweep 1000

The script prints tables of median times and of their ratios, and writes the measurements to a JSON file. Images are
random, because the content of an image does not change the time. The contenders of a table (the methods and plain
PyTorch) take turns after every step. If other programs slow the machine down, they slow down all contenders equally.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measuring import Call, Calls, Numbers, medians, peak_mb, random_batch, sweep_times
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from whole_epochs import augmentation_times, epoch_times, tracking_times
from yardsticks import BATCH, CLASSES, MODELS, Setting, captured_plain, learner, plain_steps

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.errors import UserError
from dfl_experiments.running.device import layout_of, set_up
from dfl_experiments.running.provenance import device_name, git_commit, versions

PAPER = ("bp", "shallow", "dfa", "las", "ltas")
# bytes per weight in float32: 4 to read and 4 to write, for gradient, weight and both moments
ADAM_BYTES = 32


def contenders_of(setting: Setting, methods: Sequence[str]) -> tuple[Calls, dict[str, int]]:
    """Return a training step of every contender, and the number of trained weights of some contenders.

    A contender without a number of weights gets no `floor_ms`.
    """
    x, target = random_batch(MODELS[setting.model][2], CLASSES, BATCH, setting.device)
    plain = plain_steps(setting)
    steps: Calls = {name: partial(step, x, target) for name, step in plain.items()}
    weights: dict[str, int] = {}
    for method in methods:
        try:
            trainer = learner(method, setting)
        except UserError as error:
            print(f"{method} on {setting.model}: {error}")
            continue
        feedback = [p for p in trainer.method.parameters() if p.requires_grad]
        weights[method] = sum(p.numel() for p in [*trainer.parameters, *feedback])
        layout = layout_of("auto", trainer.net, setting.device, trainer.precision)
        x = x.contiguous(memory_format=layout)  # the memory format of a run
        steps[method] = partial(trainer.step, x, target)
        if method != "bp":
            steps[f"{method} + alignment"] = partial(trainer.step, x, target, align=True)
        if setting.on_gpu:
            captured = CapturedStep(learner(method, setting), BATCH, setting.device)
            steps[f"{method} captured"] = partial(captured, x, target)
            steps[f"{method} captured + alignment"] = partial(captured, x, target, align=True)
    weights["plain"] = weights["bp"]
    if setting.on_gpu:
        for name, step in plain.items():
            if "compiled" not in name:
                steps[f"{name} captured"] = partial(captured_plain(step, setting.device), x, target)
    if setting.on_gpu and not setting.is_fc:
        steps |= bp_in_other_format(setting, x, target)
    return steps, weights


def bp_in_other_format(setting: Setting, x: Tensor, target: Tensor) -> Calls:
    """Return BP's step as a CUDA graph, in the memory format that `auto` does not choose.

    x: images in the memory format that `auto` chooses.
    """
    name, layout = "channels_last", torch.channels_last
    if x.is_contiguous(memory_format=layout):
        name, layout = "contiguous", torch.contiguous_format
    captured = CapturedStep(learner("bp", setting, name), BATCH, setting.device)
    return {f"bp captured, {name}": partial(captured, x.contiguous(memory_format=layout), target)}


def step_times(
    setting: Setting, methods: Sequence[str], rounds: int, instances: int
) -> dict[str, Numbers]:
    """Return the measured numbers of every contender.

        ms: milliseconds per step.
        peak_mb: peak memory in MB. Compiled and captured steps lack this number.
        gflop: floating-point operations of the step, divided by 10⁹.
        optimizer_mb: MB that the optimizer reads and writes.

    Only contenders with a number of trained weights have `gflop` and `optimizer_mb`.

    rounds: number of steps of each contender, over all instances.
    instances: how often all contenders are created. The time of a small network changes by several per cent with the
        memory addresses of its weights. The result is therefore the median over the instances.
    """
    times: list[Numbers] = []
    for _ in range(instances):
        steps, weights = contenders_of(setting, methods)
        times.append(medians(steps, rounds // instances, setting.device))
    result: dict[str, Numbers] = {}
    for name, step in steps.items():
        seconds = statistics.median(of_instance[name] for of_instance in times)
        result[name] = {"ms": seconds * 1e3}
        # tensors of compiled or captured steps cannot be counted
        if "compiled" not in name and "captured" not in name:
            result[name]["peak_mb"] = peak_mb(step, setting.device)
    for name, count in weights.items():
        with FlopCounterMode(display=False) as counter:
            steps[name]()
        result[name]["gflop"] = counter.get_total_flops() / 1e9
        result[name]["optimizer_mb"] = count * ADAM_BYTES / 1e6
    return result


@dataclass(frozen=True)
class Operation:
    """An operation whose rate is measured."""

    kind: str
    """One of product, convolution, bytes_per_s."""
    call: Call
    amount: float
    """Floating-point operations, or bytes."""


def operations_of(device: torch.device, dtype: torch.dtype) -> list[Operation]:
    """Return matrix products, convolutions, copies and sums that can reach the highest rates of the machine.

    Their memory formats are those of the models. Their sizes are those of the models, or larger. No training step of a
    model can have higher rates than the best of these operations.
    """
    sizes, megabytes = [(2048, 2048), (BATCH, 1024), (BATCH, 4096), (1024, BATCH)], [4, 64]
    if device.type == "cuda":
        sizes.append((8192, 8192))
        megabytes.append(1024)
    operations = []
    for rows, width in sizes:
        a = torch.randn(rows, width, device=device).to(dtype)
        b = torch.randn(width, width, device=device).to(dtype)
        operations.append(Operation("product", partial(torch.mm, a, b), 2.0 * rows * width**2))
    for layout in (torch.contiguous_format, torch.channels_last):
        for planes, side, size in ((96, 16, 5), (64, 32, 3)):
            images = torch.randn(BATCH, planes, side, side, device=device)
            kernels = torch.randn(128, planes, size, size, device=device)
            images, kernels = (
                tensor.to(dtype, memory_format=layout) for tensor in (images, kernels)
            )
            call = partial(F.conv2d, images, kernels, padding=size // 2)
            operations.append(Operation("convolution", call, 2.0 * images.numel() * 128 * size**2))
    for size in megabytes:
        source = torch.randn(size * 2**18, device=device)
        copy, add = torch.empty_like(source).copy_, torch.empty_like(source).add_
        operations.append(Operation("bytes_per_s", partial(copy, source), 2.0 * source.nbytes))
        operations.append(Operation("bytes_per_s", partial(add, source), 3.0 * source.nbytes))
    return operations


def rates(device: torch.device, precision: str) -> Numbers:
    """Return the machine's highest rates: operations per second of products and convolutions, and bytes per second."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    operations = operations_of(device, dtype)
    calls = {str(index): operation.call for index, operation in enumerate(operations)}
    seconds = medians(calls, 15, device, min)
    best = {"product": 0.0, "convolution": 0.0, "bytes_per_s": 0.0}
    for operation, value in zip(operations, seconds.values(), strict=True):
        best[operation.kind] = max(best[operation.kind], operation.amount / value)
    return best


def add_floor(setting: Setting, values: Numbers, rate: Numbers) -> None:
    """Add `floor_ms`, the least time that the operations and bytes of a step take."""
    best = rate["product"] if setting.is_fc else max(rate["product"], rate["convolution"])
    seconds = values["gflop"] * 1e9 / best + values["optimizer_mb"] * 1e6 / rate["bytes_per_s"]
    values["floor_ms"] = seconds * 1e3


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
    table["floor ms"] = values.floor_ms
    table["reached"] = values.floor_ms / ms
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


def shown(times: Numbers, digits: int) -> Numbers:
    """Return rounded numbers."""
    return {name: round(value, digits) for name, value in times.items()}


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
        help="methods beside BP, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--precisions", default="float32", help="float32, bfloat16, tf32 (default: %(default)s)"
    )
    parser.add_argument(
        "--sweep", type=int, metavar="N", help="measure only a sweep of N points on the digits"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmark.json"), help="default: %(default)s"
    )
    options = parser.parse_args()
    if options.sweep:
        print(shown(sweep_times(options.sweep), 3))
        return
    device, quick, on_gpu = options.device, options.quick, options.device.type == "cuda"
    models = options.models.split(",") if options.models else list(MODELS)[: 1 if quick else None]
    names = group_options("method") if options.methods == "all" else options.methods.split(",")
    methods = ["bp", *(method for method in names if method != "bp")]
    precisions = options.precisions.split(",")
    # Set up PyTorch as a training run does, also for the steps in plain PyTorch.
    as_a_run = partial(set_up, device, seed=0, deterministic=False, threads=options.threads)
    rate = {}
    for precision in precisions:
        as_a_run(precision)
        rate[precision] = best = rates(device, precision)
        gflops = {name: round(best[name] / 1e9) for name in ("product", "convolution")}
        print(
            f"{device_name(device)}, {precision}: Gflop/s {gflops}, copy {best['bytes_per_s'] / 1e9:.1f} GB/s"
        )
    report: dict[str, Any] = {
        "device": device_name(device), "machine": platform.platform(), "versions": versions(),
        "git_commit": git_commit(), "rates": rate, "steps": {}, "epochs": {},
    }  # fmt: skip
    for model in models:
        rounds, instances = rounds_of(model, quick, on_gpu)
        for precision in precisions:
            as_a_run(precision)
            setting = Setting(model, device, precision)
            steps = step_times(setting, methods, rounds, instances)
            for values in steps.values():
                if "gflop" in values:
                    add_floor(setting, values, rate[precision])
            show_steps(setting, steps)
            report["steps"][f"{model} {precision}"] = steps
        images = 12800 if model == "fc-mnist" or on_gpu else 640
        report["epochs"][model] = times = epoch_times(
            model, images // 4 if quick else images, device
        )
        print("whole epochs of las, ms an image: ", shown(times, 4))
        print(f"  published way / here {times['published way'] / times['here']:.2f}", end="")
        print(f", evaluation takes {times['evaluation'] / times['here']:.0%} of the training time")
    report["augmentation_us_per_image"] = times = augmentation_times(256 if quick else 2048, 3)
    print("\nrandaugment_cutout_flip, µs per image: ", shown(times, 1))
    print(f"  {times['image by image'] / times['whole batches']:.1f} × faster")
    report["tracking_s"] = times = tracking_times(6400 if quick else 60000, device, options.threads)
    print("\none epoch of las on FC-MNIST, s: ", shown(times, 2))
    print(f"  offline / disabled {times['offline'] / times['disabled']:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
