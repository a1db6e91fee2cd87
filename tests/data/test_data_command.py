"""The command `dfl-data`: list, prepare, help, and refusals."""

import os
import re
import sys

import pytest
from data_helpers import Made, flip

from dfl_experiments import dfl_data
from dfl_experiments.configuration.composition import compose
from dfl_experiments.data.packs import is_packed, pack

pytestmark = pytest.mark.usefixtures("clean_logging")


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dfl-data", *arguments])
    dfl_data.main()


def test_list_shows_the_state_of_each_data_set_and_prepare_packs_one(monkeypatch, capsys, mnist):
    here = f"data_dir={mnist}"

    def states(*choice: str) -> dict[str, str]:
        run(monkeypatch, "list", here, *choice)
        return dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])

    expected = {
        "arrays": "unset",
        "cifar10": "absent",
        "cifar100": "absent",
        "digits": "bundled",
        "fashion_mnist": "absent",
        "folder": "unset",
        "mnist": "raw",
        "tinyimagenet": "absent",
    }
    assert states() == expected
    run(monkeypatch, "prepare", "dataset=mnist", here)
    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == f"mnist packed 12 5 1x28x28 10 {mnist}/mnist".split()
    pack(Made().arrays, mnist / "cifar10")
    assert is_packed(mnist / "mnist")
    flip(mnist / "mnist" / "test_images.npy")
    assert states("dataset=mnist") == {"mnist": "damaged"}
    assert states("dataset=cifar10") == {"cifar10": "packed"}
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "prepare", "dataset=mnist", here)
    assert caught.value.code == 2
    error = f"{mnist / 'mnist' / 'test_images.npy'}: unreadable or damaged (its CRC-32 differs"
    assert error in capsys.readouterr().err


def test_examples_in_the_help_are_valid():
    examples = re.findall(r"dfl-data (\w+)((?: \S+=\S+)*)", dfl_data.EPILOG)
    assert len(examples) == 4
    for _, overrides in examples:
        assert compose(os.path.expandvars(overrides).split()).data_dir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "needs a data set"),
        (["prepare", "cifar10"], "cifar10: must be key=value; did you mean dataset=cifar10?"),
        (["prepare", "dataset=cifar10,mnist"], "has several values; call dfl-data once for each"),
        (["prepare", "dataset=mnits"], "mnits"),
        (["prepare", "dataset=digits", "data_dri=x"], "data_dri"),
        (["prepare", "dataset=folder"], "dataset.source.path"),
        (
            ["list", "dataset=folder", "dataset.source.path=/dev/null"],
            "dataset.source.path=/dev/null: no such folder",
        ),
        (["prepare", "dataset=cifar10", "dataset.source.classes=11"], "dataset.source.classes=11"),
    ],
)
def test_mistakes_are_refused_in_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
