"""List the runs of a command and estimate their time, for `--dry-run`. Nothing is started or written."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import Configuration
from dfl_experiments.errors import UserError, printable
from dfl_experiments.running.outcome import Sweep
from dfl_experiments.running.point_counter import duration
from dfl_experiments.running.result import DONE, read_status
from dfl_experiments.running.run_directory import LAST, PREVIOUS
from dfl_experiments.running.summary import swept_keys, values_by_key

# number of batches before a time measurement, and largest number of batches in it
WARM_UP, TIMED = 3, 20
SECONDS_OF_TIMING = 2.0  # longest duration of a time measurement
# Seconds that a run needs to start and to end, mostly for Hydra and W&B. Measured on one core of an AMD EPYC.
BESIDE_TRAINING = 2.0
BESIDE = f"{BESIDE_TRAINING:g} s of each run are for its start and end"


class PlannedRun(NamedTuple):
    """A run that a command would start."""

    folder: Path
    """The run directory."""
    description: str
    """Text that distinguishes the run from the command's other runs."""
    overrides: list[str]
    """The overrides of the run."""

    @property
    def kind(self) -> str:
        """The overrides that can change the training time. Seed, optimizer options and schedule do not change it."""
        return " ".join(
            text
            for text in self.overrides
            if not text.startswith(("seed=", "optimizer.", "schedule"))
        )


def planned_runs(sweep: Sweep) -> list[PlannedRun]:
    """Return the runs of a sweep. The description of a run is its folder and the values that differ between runs."""
    values = {name: values_by_key(point.overrides) for name, point in sweep.points.items()}
    keys = swept_keys([*values.values()])
    runs = []
    for name, point in sweep.points.items():
        words = [f"{key}={values[name].get(key, '')}" for key in keys]
        runs.append(PlannedRun(sweep.folder / name, "  ".join([name, *words]), point.overrides))
    return runs


def planned_status(
    run: PlannedRun, force: bool, compose: Callable[[list[str]], Configuration]
) -> str:
    """Return `done`, `interrupted` or `new`. Return `running` or `damaged` for a run that cannot start now.

    Raises `UserError` if the command will refuse the run, because it has another configuration, other data or code.
    """
    status, _, before = read_status(run.folder)
    if status in ("running", "damaged"):
        return status
    if force or status == "not started":
        return "new"
    has_checkpoint = any((run.folder / name).exists() for name in (LAST, PREVIOUS))
    if status not in DONE and not has_checkpoint:
        return "new"
    refuse_other(run.folder, before, compose(run.overrides))
    return "done" if status in DONE else "interrupted"


def refuse_other(
    run_dir: Path, before: Mapping[str, Any] | None, configuration: Configuration
) -> None:
    """Raise `UserError` if the run in a directory has another configuration, other data or code.

    before: content of the run's result.json; None for a killed run, which has only a checkpoint.
    """
    from dfl_experiments.running.checkpoint import load_checkpoint
    from dfl_experiments.running.provenance import code_of
    from dfl_experiments.running.run import data_digest, refuse_changes, refuse_configuration

    if before is None:
        before = load_checkpoint(run_dir, configuration.config_digest)["training"]
    else:
        refuse_configuration(run_dir, before, configuration)
    # the digest of data that are not packed would need a pack
    data = None if missing_pack(configuration) else data_digest(configuration)
    refuse_changes(run_dir, before, {"data": data, "code": code_of(configuration.components)})


def show_plan(
    runs: Sequence[PlannedRun], force: bool, compose: Callable[[list[str]], Configuration]
) -> None:
    """Print every run with its status, and the estimated time of all runs that are not done.

    force: train runs again even if they are done.
    compose: function that returns the checked configuration for a run's overrides.
    """
    waiting, refusals = [], []
    for run in runs:
        try:
            status = planned_status(run, force, compose)
        except UserError as error:
            status = "refused"
            refusals.append(str(error))
        print(printable(f"  {status:11}  {run.description}"))
        if status not in ("done", "refused"):
            waiting.append(run)
    print(f"{len(waiting)} of {len(runs)} to train", flush=True)
    if refusals:
        print(printable(f"{len(refusals)} will be refused; the first: {refusals[0]}"))
    if not waiting:
        return
    kinds = {run.kind: run for run in waiting}
    try:
        seconds = {kind: seconds_of_run(compose(run.overrides)) for kind, run in kinds.items()}
    except (*MISTAKES, RuntimeError) as error:
        print(f"time unknown: {one_line(error)}")
        return
    total = sum(seconds[run.kind] + BESIDE_TRAINING for run in waiting)
    print(f"about {duration(total)} on this machine, one run after another; {BESIDE}")


def show_search(n_trials: int | None, configuration: Configuration) -> None:
    """Print what is known of a sweep whose sweeper chooses the points: the number of runs, and the time of one.

    n_trials: largest number of runs; None if it is unknown.
    configuration: the checked configuration of a job.
    """
    runs = "" if n_trials is None else f", up to {n_trials} runs"
    print(f"the sweeper chooses the points as it goes{runs}", flush=True)
    try:
        seconds = seconds_of_run(configuration)
    except (*MISTAKES, RuntimeError) as error:
        print(f"time unknown: {one_line(error)}")
        return
    print(f"about {duration(seconds + BESIDE_TRAINING)} for one run; {BESIDE}")


def seconds_of_run(configuration: Configuration) -> float:
    """Estimate the seconds of a run from the time of some training steps and evaluation batches.

    Raises `UserError` if the data set is not packed on this machine, or the parts of the run do not fit together.
    """
    from dfl_experiments.running.build import build
    from dfl_experiments.running.device import usual_torch
    from dfl_experiments.running.epochs import evaluate
    from dfl_experiments.running.stability import Activations

    refuse_unprepared(configuration)
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


def refuse_unprepared(configuration: Configuration) -> None:
    """Raise `UserError` if the data set is not packed, because a dry run neither downloads nor packs it."""
    if folder := missing_pack(configuration):
        name = configuration.settings.dataset.name
        raise UserError(f"dataset {name} is not in {folder}; run `dfl-data prepare dataset={name}`")


def missing_pack(configuration: Configuration) -> Path | None:
    """Return the folder in which the data set should be packed, but is not; None if training needs no packing."""
    from dfl_experiments.data.packs import is_packed

    settings = configuration.settings
    cache = configuration.components["dataset.source"].build().cache_name(settings.dataset.name)
    folder = Path(settings.data_dir).expanduser() / (cache or "")
    return None if cache is None or is_packed(folder) else folder
