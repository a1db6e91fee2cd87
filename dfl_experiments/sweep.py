"""A sweep's points: which of them are still to be run, and how all of them ended."""

import csv
import io
import logging
import os
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dfl_experiments.claims import Busy, claimed
from dfl_experiments.config import UserError, one_line
from dfl_experiments.results import DONE, LAST, PREVIOUS, RESULT, read_result, status_left, write_atomically
from dfl_experiments.settings import Settings, check, recorded, science

log = logging.getLogger(__name__)

ROWS_SHOWN = 50
TRACEBACK = "traceback.txt"
STARTED = "DFL_STARTED"  # when the command began, for its launcher's processes too


@dataclass
class Sweep:
    """The sweep of this process: its folder, its name, and the overrides of every point by the name of its folder."""

    folder: Path
    name: str
    points: dict[str, str] = field(default_factory=dict)


def run_point(cfg: DictConfig, run_dir: Path, number: int = 0, at_once: int = 1) -> float | None:
    """Run one point, unless it is done or another process is at work on it, and return the protocol's accuracy.

    number: the job's; at_once: how many the launcher runs together, -1 for one per core (see `sharing`). A point that
    fails leaves its `result.json` and says so in one line, and the sweep goes on; None is returned.
    """
    # torch is slow to import, and a refusal needs none
    from dfl_experiments.run import summarise
    from dfl_experiments.sharing import device_of, threads_for

    try:
        with claimed(run_dir):
            settings = check(cfg)
            settings = replace(settings, device=device_of(settings.device, number))
            result = _run_unless_done(cfg, settings, run_dir, threads_for(at_once))
            if result is None:
                return (read_result(run_dir) or {}).get("accuracy")
        (run_dir / TRACEBACK).unlink(missing_ok=True)
        summarise(result, run_dir)
        return result["accuracy"]
    except Busy as busy:
        log.info("%s", busy)
    except Exception as error:
        if not isinstance(error, UserError | OSError):
            (run_dir / TRACEBACK).write_text("".join(traceback.format_exception(error)))
        # Hydra keeps what a job returns or raises; the frames hold the network and the images
        traceback.clear_frames(error.__traceback__)
        log.error("%s: failed: %s", run_dir.name, one_line(error))
    return None


def _run_unless_done(cfg: DictConfig, settings: Settings, run_dir: Path, threads: int) -> dict | None:
    from dfl_experiments.run import run

    before, status = read_result(run_dir), status_left(run_dir)
    anew = settings.force and not touched_since_the_start(run_dir)
    if before is not None and not anew:
        if science(OmegaConf.create(before["config"])) != science(cfg):
            raise UserError(f"{run_dir}: holds a run with another configuration; force=true replaces it")
        if status in DONE:
            log.info("%s: %s already, accuracy %s", run_dir.name, status, shown(before["accuracy"]))
            return None
    record_overrides(run_dir, HydraConfig.get())
    return run(cfg, settings, run_dir, cfg.sweep, go_on=status is not None and not anew, threads=threads)


def touched_since_the_start(run_dir: Path) -> bool:
    """Whether this command has run the point already: a job that is queued again, say, whose force=true is obeyed."""
    times = [path.stat().st_mtime for name in (RESULT, LAST, PREVIOUS) if (path := run_dir / name).exists()]
    return max(times, default=0.0) >= float(os.environ.get(STARTED, "inf"))


def record_overrides(run_dir: Path, hydra: Any) -> None:
    """What the command line said, beside the run; Hydra would write it before the directory is claimed."""
    overrides = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    (run_dir / ".hydra").mkdir(exist_ok=True)
    write_atomically(run_dir / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(overrides))


def shown(accuracy: float | None) -> str:
    """An accuracy with four digits, a dash where there is none."""
    return "-" if accuracy is None else f"{accuracy:.4f}"


def check_directory(settings: Settings, run_dir: Path) -> None:
    """Refuse with a `UserError` a single run that would write over another, or one to resume that left nothing."""
    status = status_left(run_dir)
    if settings.resume is None and status is not None and not settings.force:
        raise UserError(f"{run_dir}: holds a run already ({status}); resume={run_dir} goes on, force=true starts anew")
    if settings.resume is not None and status is None:
        raise UserError(f"resume={settings.resume}: left no checkpoint; repeat={settings.resume} starts it anew")


def run_single(cfg: DictConfig, hydra: Any, run_dir: Path) -> float | None:
    """Run one job outside of a sweep and return the protocol's accuracy. hydra: Hydra's own node.

    Raises `UserError`, as `recorded`, `check` and `check_directory` do.
    """
    from dfl_experiments.run import run, summarise

    cfg = recorded(cfg, hydra)
    settings = check(cfg)
    try:
        with claimed(run_dir):
            check_directory(settings, run_dir)
            status = status_left(run_dir)
            if settings.resume is not None and status in DONE:
                log.info("%s: %s already", run_dir, status)
                return (read_result(run_dir) or {}).get("accuracy")
            if settings.resume is None:
                record_overrides(run_dir, hydra)
            result = run(cfg, settings, run_dir, None, go_on=settings.resume is not None)
            (run_dir / TRACEBACK).unlink(missing_ok=True)
    except Busy as busy:
        raise UserError(str(busy)) from None
    summarise(result, run_dir)
    return result["accuracy"]


def status_of(point: Path) -> tuple[str, float | None, str]:
    """Status, accuracy and reason of a point as its folder tells them."""
    if not point.is_dir():
        return "not started", None, ""
    result = read_result(point)
    if result is None or result["status"] not in DONE:
        try:
            with claimed(point):
                result = read_result(point)
        except Busy:
            return "running", None, "another process is at work on it"
        except OSError:
            pass  # a folder that can only be read: nobody works there
    if result is None:
        return "interrupted", None, "its process ended without a word"
    return result["status"], result.get("accuracy"), result.get("reason") or ""


def summary(sweep: Sweep) -> int:
    """Print how every point ended, write it to `summary.csv`, and return the exit code: 1 unless all have an end."""
    names = sweep.points or {path.parent.name: "" for path in sorted(sweep.folder.glob("*/config.yaml"))}
    rows = [(name, *status_of(sweep.folder / name), job) for name, job in names.items()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", "status", "accuracy", "reason", "overrides"])
    writer.writerows(rows)
    counts = Counter(status for _, status, *_ in rows)
    print(f"\nsweep {sweep.folder.name}: {len(rows)} points, {', '.join(f'{n} {s}' for s, n in counts.most_common())}")
    # of a long table the part that asks for attention comes first
    rows.sort(key=lambda row: row[1] == "finished")
    width = max((len(name) for name, *_ in rows), default=0)
    for name, status, accuracy, reason, job in rows[:ROWS_SHOWN]:
        print(f"  {name:{width}}  {status:11} {shown(accuracy):>6}  {reason or job}")
    if len(rows) > ROWS_SHOWN:
        print(f"  … and {len(rows) - ROWS_SHOWN} more")
    try:
        if sweep.folder.is_dir():
            write_atomically(sweep.folder / "summary.csv", text.getvalue())
            print(f"  {sweep.folder / 'summary.csv'}")
    except OSError as error:
        print(f"dfl-train: summary.csv: {error.strerror}")
    return 1 if counts.keys() & {"failed", "interrupted", "not started"} else 0
