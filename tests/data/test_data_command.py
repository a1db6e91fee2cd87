"""`dfl-data`: what it shows, what it prepares, and how it refuses."""

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


def test_list_and_prepare(monkeypatch, capsys, mnist):
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
    assert (
        capsys.readouterr().out.splitlines()[1].split()
        == f"mnist packed 12 5 1x28x28 10 {mnist}/mnist".split()
    )
    pack(Made().arrays, mnist / "cifar10")
    assert is_packed(mnist / "mnist")
    flip(mnist / "mnist" / "test_images.npy")
    assert states("dataset=mnist") | states("dataset=cifar10") == {
        "mnist": "damaged",
        "cifar10": "packed",
    }
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "prepare", "dataset=mnist", here)
    assert caught.value.code == 2
    assert (
        f"{mnist / 'mnist' / 'test_images.npy'}: unreadable or damaged (its CRC-32 differs"
        in capsys.readouterr().err
    )


def test_the_examples_of_the_help_can_be_typed():
    examples = re.findall(r"dfl-data (\w+)((?: \S+=\S+)*)", dfl_data.EPILOG)
    assert len(examples) == 4
    for _, overrides in examples:
        assert compose(os.path.expandvars(overrides).split()).data_dir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "needs a data set"),
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
def test_mistakes_end_the_command_with_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
