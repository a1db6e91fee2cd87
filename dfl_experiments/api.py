"""Use runs from Python: compose a configuration, train it, read its results, and load its network."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dfl_experiments.configuration import composition
from dfl_experiments.configuration.composition import AUTO
from dfl_experiments.configuration.recorded import completed, composable, with_recorded
from dfl_experiments.configuration.refusals import one_line, uncomposed
from dfl_experiments.configuration.schema import Configuration, check
from dfl_experiments.data.batches import Normalise, Standardise
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.errors import UserError
from dfl_experiments.running.build import build
from dfl_experiments.running.checkpoint import load_checkpoint
from dfl_experiments.running.device import usual_torch
from dfl_experiments.running.earlier_run import refuse_changes
from dfl_experiments.running.epochs import evaluate
from dfl_experiments.running.provenance import code_of
from dfl_experiments.running.result import read_result
from dfl_experiments.running.run import run_alone
from dfl_experiments.running.run_directory import refuse_folder_of_runs, run_below
from dfl_experiments.seal import complete_lines, read_bytes

if TYPE_CHECKING:  # imported where it is used, because importing pandas is slow
    from pandas import DataFrame

# For each kind of samples: its name in messages, the type that the net gets, and the types that are converted to it.
# The last entry is the parameter `casting` of `numpy.can_cast`.
TYPES: dict[str, tuple[str, Any, Any]] = {
    "images": ("uint8 images", np.uint8, "equiv"),
    "features": ("float features", np.float32, "same_kind"),
    "tokens": ("integer tokens", np.int64, "same_kind"),
}
EXISTS = 'exist_ok="resume" continues it or returns its result, force=true replaces it, another run_dir keeps both'
RESTORE = "restore the data and the code that the run had"


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Configuration:
    """Return the checked configuration that `dfl-train` would run with these overrides, such as ["method=ltas"].

    Its field `values` contains all options, as a run's config.yaml records them. Raises `UserError` for a mistake, with
    the message that `dfl-train` would print.

    config_dir: folder with your own options, as for `dfl-train --config-dir`.
    """
    if isinstance(overrides, str):
        raise UserError(
            f"compose({overrides!r}): takes a list of overrides, such as [{overrides!r}]"
        )
    composition.register_resolvers()
    own = []
    if config_dir is not None:
        folder = Path(config_dir).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(f"config_dir={config_dir}: no such folder")
        own = [f"hydra.searchpath=[{composition.quoted(f'file://{folder}')}]"]
    try:
        return check(
            with_recorded(composition.compose([*own, *composable(overrides)]), [*overrides])
        )
    except Exception as error:  # Hydra, OmegaConf and YAML raise errors of many types
        raise UserError(one_line(uncomposed(error, overrides))) from None


def run(
    configuration: Configuration, run_dir: str | Path, exist_ok: Literal[False, "resume"] = False
) -> dict[str, Any]:
    """Train one run in its directory, and return the content of its `result.json`.

    exist_ok: "resume" continues a run that is already in the directory. If that run has ended, its result is returned.
    Raises `UserError` if the directory is a folder of runs, or if it already holds a run and neither exist_ok="resume"
    nor force=true is given.
    """
    if exist_ok not in (False, "resume"):
        raise UserError(f'exist_ok={exist_ok!r}: must be False or "resume"')
    if exist_ok:
        configuration = check(configuration.values | {"resume": AUTO})
    refuse_folder_of_runs(Path(run_dir))
    return run_alone(configuration, Path(run_dir), exists_advice=EXISTS)


def read_rows(
    run_dir: str | Path, table: Literal["epochs", "iterations"] = "epochs"
) -> dict[str, np.ndarray]:
    """Return the columns of a table by name, as `pandas.DataFrame` accepts them. An empty cell is NaN.

    An incomplete last line is left out, because a run that still trains may be writing it.
    """
    if table not in ("epochs", "iterations"):
        raise UserError(f"table={table!r}: choose epochs or iterations")
    path = Path(run_dir, f"{table}.csv")
    # raises UserError if the table is damaged
    has_result = read_result(Path(run_dir)) is not None
    if not path.exists():
        raise UserError(f"{path}: no such file") if has_result else without_result(run_dir)
    text = complete_lines(read_bytes(path)).decode()
    if not text:
        return {}
    header, *lines = text.splitlines()
    names = header.split(",")
    numbers = np.genfromtxt(lines, delimiter=",") if lines else np.empty(0)
    columns = numbers.reshape(-1, len(names)).T
    return dict(zip(names, columns, strict=True))


def without_result(run_dir: str | Path) -> UserError:
    """Return the error for a folder that does not hold the result of a run."""
    folder = Path(run_dir)
    problem = "has no result.json of a run that has trained"
    if not folder.is_dir():
        problem = "no such folder"
    elif run_below(folder):
        problem = f'is a folder of runs, not one run; dfl.runs("{run_dir}") lists them'
    return UserError(f"{run_dir}: {problem}")


@usual_torch()
def load_net(run_dir: str | Path, plugins: Sequence[str] = ()) -> BlockNet:
    """Return the trained network of a run directory, on the CPU, in evaluation mode.

    plugins: packages outside dfl_experiments whose classes the recorded configuration may use.
    Raises `UserError` if there is no result or no checkpoint, or if the model's code has changed since the run.
    """
    result = read_result(Path(run_dir))
    if result is None or "input_shape" not in result:
        raise without_result(run_dir)
    values = completed(result["config"], composition.plain(composition.compose([]))) | {
        "plugins": [*plugins]
    }
    model = check(values).components["model"]
    refuse_changes(Path(run_dir), result, {"code": code_of({"model": model})}, RESTORE)
    net: BlockNet = model.build(
        result.get("samples"),
        input_shape=tuple(result["input_shape"]),
        num_classes=result["num_classes"],
    )
    net.load_state_dict(load_checkpoint(Path(run_dir))["net"])
    return net.eval()


class TrainedRun:
    """The configuration, the results and the trained network of a run directory.

    Raises `UserError` if the result is absent or damaged.
    """

    def __init__(self, run_dir: str | Path, plugins: Sequence[str] = ()) -> None:
        """Read the result.

        plugins: packages outside dfl_experiments whose classes the configuration may use.
        """
        self.folder, self.plugins = Path(run_dir), plugins
        result = read_result(self.folder)
        if result is None:
            raise without_result(run_dir)
        self.result = result
        self.config: dict[str, Any] = result["config"]

    @cached_property
    def net(self) -> BlockNet:
        """The trained network, on the CPU, in evaluation mode."""
        return load_net(self.folder, self.plugins)

    @property
    def epochs(self) -> "DataFrame":
        """The table epochs.csv."""
        return self._table("epochs")

    @property
    def iterations(self) -> "DataFrame":
        """The table iterations.csv."""
        return self._table("iterations")

    def _table(self, name: Literal["epochs", "iterations"]) -> "DataFrame":
        from pandas import DataFrame

        return DataFrame(read_rows(self.folder, name))

    @cached_property
    def _standardisation(self) -> dict[str, Tensor]:
        """Return the mean and std with which the run standardised its features; empty if it standardised nothing."""
        return load_checkpoint(self.folder)["training"]["standardisation"]

    @usual_torch()
    @torch.no_grad()
    def predict(self, images: np.ndarray | Tensor, batch_size: int = 256) -> Tensor:
        """Return the logits of raw samples. The samples are first normalised or standardised as in the run.

        images: the samples. Images are uint8 and have shape (N, C, H, W), or (N, H, W) if they are grey. Features and
            tokens have the type and shape that they have in the run's data set.
        Returns a tensor of shape (N, K).

        Raises:
            UserError: the samples have another type or shape than the run's samples, or an early version made the run.
        """
        samples = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images)
        if "samples" not in self.result:
            raise UserError(f"{self.folder}: an early version made this run; repeat the run")
        dataset, recorded, net = self.config["dataset"], self._standardisation, self.net.eval()
        kind, shape = self.result["samples"], net.input_shape
        if kind == "images" and samples.ndim == 3 and shape[0] == 1:
            samples = samples[:, None]  # grey images without an axis for the channel
        name, dtype, casting = TYPES[kind]
        if samples.shape[1:] != shape or not np.can_cast(samples.dtype, dtype, casting):
            needed = f"needs {name} of shape (N, {', '.join(map(str, shape))})"
            raise UserError(
                f"{self.folder}: {needed}, but gets {samples.dtype} of shape {samples.shape}"
            )
        if recorded:
            samples = Standardise(recorded["mean"].numpy(), recorded["std"].numpy())(samples)
        normalise = Normalise(dataset["mean"], dataset["std"])
        tensor = normalise(torch.from_numpy(np.ascontiguousarray(samples, dtype)))
        return torch.cat([net(part) for part in tensor.split(batch_size)])

    @usual_torch()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the run's own test set, which must be on this machine.

        They are computed on the CPU, with float32 in place of tf32.
        If the data have moved, first change their path in `run.config`, such as `run.config["data_dir"]`.
        Raises `UserError` if the data or the model's code have changed since the run.
        """
        current = composition.plain(composition.compose([]))
        settings = completed(self.config, current) | {"plugins": [*self.plugins], "device": "cpu"}
        if settings.get("precision") == "tf32":  # only GPUs have it
            settings["precision"] = "float32"
        parts = build(check(settings))
        code = {"model": parts.origin["code"].get("model")}
        refuse_changes(
            self.folder, self.result, {"data": parts.origin["data"], "code": code}, RESTORE
        )
        parts.learner.net.load_state_dict(load_checkpoint(self.folder)["net"])
        measured = evaluate(parts, parts.test)
        return {"loss": measured.loss, "accuracy": measured.accuracy}


def load_run(run_dir: str | Path, plugins: Sequence[str] = ()) -> TrainedRun:
    """Return a run with its `net`, `predict`, `evaluate`, `epochs`, `iterations`, `result` and `config`."""
    return TrainedRun(run_dir, plugins)
