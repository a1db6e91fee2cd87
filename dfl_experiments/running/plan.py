"""List the runs of a command and estimate their time, for `--dry-run`. Nothing is started or written."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import Configuration
from dfl_experiments.errors import UserError, printable
from dfl_experiments.running.outcome import Sweep
from dfl_experiments.running.point_counter import duration
from dfl_experiments.running.result import DONE, read_result, read_status, status_left
from dfl_experiments.running.summary import swept_keys, values_by_key

# number of batches before a time measurement, and largest number of batches in it
WARM_UP, TIMED = 3, 20
SECONDS_OF_TIMING = 2.0  # longest duration of a time measurement
# Seconds that a run needs to start and to end, mostly for Hydra and W&B. Measured on one core of an AMD EPYC.
BESIDE_TRAINING = 2.0


class PlannedRun(NamedTuple):
    """A run that a command would start."""

    folder: Path
    """The run directory."""
    description: str
    """Text that distinguishes the run from the command's other runs."""
    configuration: Configuration
    """The checked configuration."""
    overrides: Sequence[str] = ()
    """The overrides of the run."""

    @property
    def kind(self) -> str:
        """The overrides that can change the training time. Seed, optimizer options and schedule do not change it."""
        without_effect = ("seed=", "optimizer.", "schedule")
        return " ".join(text for text in self.overrides if not text.startswith(without_effect))


def planned_runs(sweep: Sweep) -> list[PlannedRun]:
    """Return the runs of a sweep. The description of a run is its folder and the values that differ between runs."""
    values = {name: values_by_key(point.overrides) for name, point in sweep.points.items()}
    keys = swept_keys([*values.values()])
    runs = []
    for name, (overrides, configuration) in sweep.points.items():
        words = [f"{key}={values[name].get(key, '')}" for key in keys]
        description = "  ".join([name, *words])
        runs.append(PlannedRun(sweep.folder / name, description, configuration, overrides))
    return runs


def planned_status(run: PlannedRun, force: bool) -> str:
    """Return `done`, `interrupted`, `failed` or `new`. Return `running` or `damaged` for a run that cannot start now.

    Raises `UserError` if the command will refuse the run, because it has another configuration, other data or code.
    """
    status, _, _ = read_status(run.folder)
    if status in ("running", "damaged"):
        return status
    earlier = None if force else status_left(run.folder)
    if earlier is None:
        is_failed = status == "failed" and not force
        return "failed" if is_failed else "new"
    refuse_other(run.folder, run.configuration)
    return "done" if earlier in DONE else earlier


def refuse_other(run_dir: Path, configuration: Configuration) -> None:
    """Raise `UserError` if the run in a directory has another configuration, other data or code."""
    from dfl_experiments.running.checkpoint import load_checkpoint
    from dfl_experiments.running.earlier_run import (
        data_digest,
        refuse_changes,
        refuse_configuration,
    )
    from dfl_experiments.running.provenance import code_of

    before = read_result(run_dir)
    if before is None:  # the run was killed, so it has only a checkpoint
        before = load_checkpoint(run_dir, configuration.values)["training"]
    else:
        refuse_configuration(run_dir, before, configuration)
    # the digest of data that are not packed would need a pack
    data = None if missing_pack(configuration) else data_digest(configuration)
    refuse_changes(run_dir, before, {"data": data, "code": code_of(configuration.components)})


def show_plan(runs: Sequence[PlannedRun], force: bool) -> None:
    """Print every run with its status, and the estimated time of all runs that are not done.

    force: train runs again even if they are done.
    """
    waiting, refusals = [], []
    for run in runs:
        try:
            status = planned_status(run, force)
        except UserError as error:
            status = "refused"
            refusals.append(str(error))
        print(printable(f"  {status:11}  {run.description}"))
        if status not in ("done", "refused"):
            waiting.append(run)
    print(f"{len(waiting)} of {len(runs)} to train", flush=True)
    if refusals:
        print(printable(f"{len(refusals)} will be refused; the first: {refusals[0]}"))
    if waiting:
        print_time(waiting)


def print_time(runs: Sequence[PlannedRun]) -> None:
    """Print the estimated time of runs. Only one run of each kind is measured.

    For kinds whose time cannot be measured, print the reasons. The estimate is then for the other runs.
    """
    kinds = {run.kind: run for run in runs}
    seconds: dict[str, float] = {}
    unknown: dict[str, list[PlannedRun]] = {}
    for kind, measured in kinds.items():
        try:
            seconds[kind] = seconds_of_run(measured.configuration)
        except (*MISTAKES, RuntimeError) as error:
            same = [run for run in runs if run.kind == kind]
            unknown.setdefault(one_line(error), []).extend(same)
    for problem, without_time in unknown.items():
        which = ""
        if len(without_time) < len(runs):
            which = f" for {len(without_time)} of them, such as {without_time[0].folder.name}"
        print(f"time unknown{which}: {problem}")
    if not seconds:
        return
    timed = [run for run in runs if run.kind in seconds]
    total = sum(seconds[run.kind] + BESIDE_TRAINING for run in timed)
    beside = f"{BESIDE_TRAINING:g} s of each run are for its start and end"
    others = " for the others" if unknown else ""
    order = ", one run after another" if len(timed) > 1 else ""
    print(f"about {duration(total)}{others} on this machine{order}; {beside}")


def seconds_of_run(configuration: Configuration) -> float:
    """Estimate the seconds of a run from the time of some training steps and evaluation batches.

    Raises `UserError` if the data set is not packed on this machine, or the parts of the run do not fit together.
    """
    from dfl_experiments.running.build import build
    from dfl_experiments.running.device import usual_torch
    from dfl_experiments.running.epochs import evaluate
    from dfl_experiments.running.stability import Activations

    if folder := missing_pack(configuration):  # a dry run neither downloads nor packs
        name = configuration.settings.dataset.name
        raise UserError(f"dataset {name} is not in {folder}; run `dfl-data prepare dataset={name}`")
    with usual_torch():
        parts = build(configuration)
        every = parts.settings.alignment.every

        def train(index: int, batch: Any) -> None:
            x, target = batch
            parts.step(x, target, every > 0 and index % every == 0).cpu()  # wait for the device

        def test(index: int, batch: Any) -> None:
            evaluate(parts, [batch], activations=Activations(parts.learner.net))

        training = itertools.chain.from_iterable(
            parts.batches.epoch(epoch) for epoch in itertools.count(1)
        )
        testing = itertools.cycle(itertools.islice(parts.test, 2))
        epoch = len(parts.batches) * seconds_per_batch(training, train)
        epoch += (len(parts.test) + len(parts.validation)) * seconds_per_batch(testing, test)
    return parts.settings.epochs * epoch


def seconds_per_batch(batches: Iterator[Any], work: Callable[[int, Any], None]) -> float:
    """Return the mean time of a batch, including its preparation. The first `WARM_UP` batches do not count."""
    for index, batch in enumerate(itertools.islice(batches, WARM_UP + TIMED)):
        if index == WARM_UP:
            start = time.perf_counter()
        work(index, batch)
        if index > WARM_UP and time.perf_counter() - start > SECONDS_OF_TIMING:
            break
    return (time.perf_counter() - start) / (index + 1 - WARM_UP)


def missing_pack(configuration: Configuration) -> Path | None:
    """Return the folder in which the pack of the data set is missing; None if training needs no packing."""
    from dfl_experiments.data.packs import is_packed

    settings = configuration.settings
    cache = configuration.components["dataset.source"].build().cache_name(settings.dataset.name)
    folder = Path(settings.data_dir).expanduser() / (cache or "")
    return None if cache is None or is_packed(folder) else folder
