"""From Python: a cell that runs twice, and a trained run that predicts from raw images."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

import dfl_experiments as dfl
from dfl_experiments.errors import UserError

ASKED = ["epochs=3", "optimizer.lr=3e-3", "tracking=disabled", "threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("api") / "run"
    dfl.run(dfl.compose(ASKED), place)
    return place


def test_a_trained_run_predicts_from_raw_images_and_evaluates_as_it_was_reported(folder):
    run = dfl.load_run(folder)
    assert run.evaluate()["accuracy"] == run.result["accuracy"]
    found = load_digits()
    images = np.rint(found.images * 255 / 16).astype(np.uint8)[:, None]
    guesses = run.predict(images).argmax(1).numpy()
    assert (guesses == found.target).mean() > 0.8
    assert len(run.epochs) == 3
    assert run.iterations.epoch.max() == 3
    assert run.config["method"]["name"] == "las"


def test_a_cell_that_runs_twice_goes_on_or_returns_what_is_there(folder):
    with pytest.raises(UserError, match="holds a run already"):
        dfl.run(dfl.compose(ASKED), folder)
    again = dfl.run(dfl.compose(ASKED), folder, exist_ok="resume")
    assert again["finished_at"] == dfl.load_run(folder).result["finished_at"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [("method=las", "takes a list"), (["method=lass"], "did you mean las"), (["epochs=x"], "epochs='x'")],
)
def test_a_mistake_has_the_command_line_s_words(overrides, words):
    with pytest.raises(UserError, match=words):
        dfl.compose(overrides)


def test_the_public_names_are_listed():
    assert set(dir(dfl)) >= {"compose", "draw", "load_run", "rule", "run", "runs"}
