"""Measure the speed of every method and of plain PyTorch, taking turns in one process.

    python scripts/benchmark.py [--quick] [--device cpu|cuda] [--threads 1] [--models fc-mnist,conv3,…]
                                [--methods bp,fa,…|all] [--precisions float32,bfloat16] [--out FILE]
    python scripts/benchmark.py --sweep 1000

It prints tables of medians and of ratios within this run, and writes them to a JSON file. Images are random, because
their content does not change the time. The contenders of a table take turns step by step, so that other load on the
machine affects all of them equally.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import medians, peak_mb, random_batch, sweep_times
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from whole_epochs import augmentation_times, epoch_times, tracking_times
from yardsticks import BATCH, CLASSES, MODELS, captured_plain, learner, plain_steps

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.errors import UserError
from dfl_experiments.running.device import layout_of, set_up
from dfl_experiments.running.provenance import device_name, git_commit, versions

PAPER = ("bp", "shallow", "dfa", "las", "ltas")
ADAM_BYTES = 32  # per weight: gradient written and read; weight and both moments read and written; float32


def contenders_of(
    model: str, methods: Sequence[str], device: torch.device, precision: str
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Return a step of every contender on a model, and the number of trained weights of those with a known floor."""
    x, target = random_batch(MODELS[model][2], CLASSES, BATCH, device)
    plain = plain_steps(model, device, precision)
    steps: dict[str, Callable[[], object]] = {name: partial(step, x, target) for name, step in plain.items()}
    weights = {"plain": 0}
    for method in methods:
        try:
            trainer = learner(method, model, device, precision)
        except UserError as error:
            print(f"{method} on {model}: {error}")
            continue
        feedback = [p for p in trainer.method.parameters() if p.requires_grad]
        weights[method] = sum(p.numel() for p in [*trainer.parameters, *feedback])
        layout = layout_of("auto", trainer.net, device, trainer.precision)
        x = x.contiguous(memory_format=layout)  # as the data of a run
        steps[method] = partial(trainer.step, x, target)
        if method != "bp":
            steps[f"{method} + alignment"] = partial(trainer.step, x, target, align=True)
        if device.type == "cuda":
            captured = CapturedStep(learner(method, model, device, precision), BATCH, device)
            steps[f"{method} captured"] = partial(captured, x, target)
            steps[f"{method} captured + alignment"] = partial(captured, x, target, align=True)
    if device.type == "cuda":
        steps |= {
            f"{name} captured": partial(captured_plain(plain[name], device), x, target)
            for name in plain
            if "compiled" not in name
        }
    if device.type == "cuda" and not model.startswith("fc"):
        chosen = x.is_contiguous(memory_format=torch.channels_last)
        other, layout = ("contiguous", torch.contiguous_format) if chosen else ("channels_last", torch.channels_last)
        captured = CapturedStep(learner("bp", model, device, precision, other), BATCH, device)
        steps[f"bp captured, {other}"] = partial(captured, x.contiguous(memory_format=layout), target)
    weights["plain"] = weights["bp"]
    return steps, weights


def step_times(
    model: str, methods: Sequence[str], rounds: int, instances: int, device: torch.device, precision: str
) -> dict[str, dict[str, float]]:
    """Return for every contender the milliseconds per step, the operations and the bytes of the weights.

    rounds: steps of each contender.
    instances: how often all contenders are made anew. The addresses of a small network's weights change its time by
        several per cent, so the median over the instances counts.
    """
    times: list[dict[str, float]] = []
    for _ in range(instances):
        steps, weights = contenders_of(model, methods, device, precision)
        times.append(medians(steps, rounds // instances, device))
    result = {name: {"ms": statistics.median(of_instance[name] for of_instance in times) * 1e3} for name in steps}
    for name, step in steps.items():
        if "compiled" not in name and "captured" not in name:  # their tensors cannot be watched
            result[name]["peak_mb"] = peak_mb(step, device)
    for name, count in weights.items():
        with FlopCounterMode(display=False) as counter:
            steps[name]()
        result[name] |= {"gflop": counter.get_total_flops() / 1e9, "optimizer_mb": count * ADAM_BYTES / 1e6}
    return result


def rates(device: torch.device, precision: str) -> dict[str, float]:
    """Return the highest rates of this machine: operations per second of products and convolutions, bytes of copies.

    The sizes and memory formats are those of the models, and larger ones, so that the floor is a true lower bound.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    contenders: dict[str, Callable[[], object]] = {}
    amounts: dict[str, float] = {}
    largest = [(8192, 8192)] if device.type == "cuda" else []
    for rows, width in ((2048, 2048), (BATCH, 1024), (BATCH, 4096), (1024, BATCH), *largest):
        a, b = (torch.randn(size, device=device).to(dtype) for size in ((rows, width), (width, width)))
        contenders[f"product {rows} {width}"] = partial(torch.mm, a, b)
        amounts[f"product {rows} {width}"] = 2.0 * rows * width**2
    for layout in (torch.contiguous_format, torch.channels_last):
        for planes, side, kernel in ((96, 16, 5), (64, 32, 3)):
            images = torch.randn(BATCH, planes, side, side, device=device).to(dtype, memory_format=layout)
            kernels = torch.randn(128, planes, kernel, kernel, device=device).to(dtype, memory_format=layout)
            name = f"convolution {layout} {kernel}"
            contenders[name] = partial(F.conv2d, images, kernels, padding=kernel // 2)
            amounts[name] = 2.0 * images.numel() * 128 * kernel**2
    for megabytes in (4, 64, *([1024] if device.type == "cuda" else [])):
        source = torch.randn(megabytes * 2**18, device=device)
        contenders[f"bytes_per_s {megabytes}"] = partial(torch.empty_like(source).copy_, source)
        amounts[f"bytes_per_s {megabytes}"] = 2.0 * source.nbytes
        contenders[f"bytes_per_s of a sum {megabytes}"] = partial(torch.empty_like(source).add_, source)
        amounts[f"bytes_per_s of a sum {megabytes}"] = 3.0 * source.nbytes
    best: dict[str, float] = {}
    for name, seconds in medians(contenders, 15, device, min).items():
        kind = name.partition(" ")[0]
        best[kind] = max(best.get(kind, 0.0), amounts[name] / seconds)
    return best


def show_steps(model: str, precision: str, steps: dict[str, dict[str, float]], rate: dict[str, float]) -> None:
    """Print the table of a model. Column "/ plain": time relative to the fastest variant of plain PyTorch."""
    best_plain = min(values["ms"] for name, values in steps.items() if name.startswith("plain"))
    print(f"\n{model}, {precision}, batch {BATCH}")
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
            floor, reached = f"{seconds * 1e3:.3f}", f"{seconds * 1e3 / values['ms']:.0%}"
        print(
            f"{name:28} {values['ms']:9.3f} {values['ms'] / best_plain:8.3f} "
            f"{values['ms'] / steps['bp']['ms']:7.3f} {ratio:>10} {floor:>9} {reached:>8} "
            f"{values.get('peak_mb', float('nan')):8.1f}"
        )


def main() -> None:
    """Measure, print the tables, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; takes under a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--models", default="", help=f"any of {', '.join(MODELS)} (default: all; the first with --quick)"
    )
    parser.add_argument("--methods", default=",".join(PAPER), help="methods beside BP, or all (default: %(default)s)")
    parser.add_argument("--precisions", default="float32", help="float32, bfloat16, tf32 (default: %(default)s)")
    parser.add_argument("--sweep", type=int, metavar="N", help="measure only a sweep of N points on the digits")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark.json"))
    options = parser.parse_args()
    if options.sweep:
        print({name: round(value, 3) for name, value in sweep_times(options.sweep).items()})
        return
    device = torch.device(options.device)
    models = options.models.split(",") if options.models else list(MODELS)[: 1 if options.quick else None]
    names = group_options("method") if options.methods == "all" else options.methods.split(",")
    methods = ["bp", *(method for method in names if method != "bp")]
    precisions = options.precisions.split(",")
    # the same settings as in a run, for plain PyTorch too
    as_a_run = partial(set_up, device, seed=0, deterministic=False, threads=options.threads)
    rate = {}
    for precision in precisions:
        as_a_run(precision)
        rate[precision] = rates(device, precision)
    for precision, best in rate.items():
        gflops = {name: round(best[name] / 1e9) for name in ("product", "convolution")}
        print(f"{device_name(device)}, {precision}: Gflop/s {gflops}, copy {best['bytes_per_s'] / 1e9:.1f} GB/s")
    report: dict[str, Any] = {
        "device": device_name(device), "machine": platform.platform(), "versions": versions(),
        "git_commit": git_commit(), "rates": rate, "steps": {}, "epochs": {},
    }  # fmt: skip
    for model in models:
        rounds, instances = {"fc-mnist": (350, 7), "fc-cifar10": (18, 3)}.get(model, (12, 1))
        if options.quick:
            rounds, instances = rounds // 2, min(instances, 3)
        if device.type == "cuda":  # addresses matter less, and compilation takes longer
            rounds, instances = min(rounds, 20), 1
        for precision in precisions:
            as_a_run(precision)
            steps = step_times(model, methods, rounds, instances, device, precision)
            show_steps(model, precision, steps, rate[precision])
            report["steps"] |= {f"{model} {precision}": steps}
        images = (12800 if model == "fc-mnist" or device.type == "cuda" else 640) // (4 if options.quick else 1)
        report["epochs"][model] = times = epoch_times(model, images, device)
        print("whole epochs of las, ms an image: ", {name: round(value, 4) for name, value in times.items()})
        print(f"  published way / here {times['published way'] / times['here']:.2f}", end="")
        print(f", evaluation {times['evaluation'] / times['here']:.0%} of as many images' training")
    report["augmentation_us_per_image"] = times = augmentation_times(256 if options.quick else 2048, 3)
    print("\nrandaugment_cutout_flip, µs per image: ", {name: round(value, 1) for name, value in times.items()})
    print(f"  {times['image by image'] / times['whole batches']:.1f} × faster")
    report["tracking_s"] = times = tracking_times(6400 if options.quick else 60000, options.device, options.threads)
    print("\none epoch of las on FC-MNIST, s: ", {name: round(value, 2) for name, value in times.items()})
    print(f"  offline / disabled {times['offline'] / times['disabled']:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
