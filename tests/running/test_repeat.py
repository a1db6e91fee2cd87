"""What older versions recorded can be run again: a run's epochs to the last digit, and its name in a sweep."""

import csv
from pathlib import Path

import pytest
import torch
from processes import ended, forked

from dfl_experiments.configuration.composition import as_values, compose, point_name
from dfl_experiments.configuration.recorded import with_recorded
from dfl_experiments.configuration.schema import check

# a run on the digits: its configuration as an older version wrote it, its epochs since e is formed as it is
(RECORDED,) = Path(__file__).with_name("recorded").iterdir()
REFERENCE = Path(__file__).resolve().parents[2] / "outputs" / "reference"
MADE_ON = "AVX512"  # the processor's instructions, which decide how sums are rounded


def epochs(run_dir):
    with (run_dir / "epochs.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_a_recorded_run_is_repeated_to_the_last_digit(tmp_path):
    assert ended(forked(tmp_path, f"repeat={RECORDED}", "hydra.run.dir=again", f"data_dir={tmp_path}")) == 0
    expected = epochs(RECORDED)
    found = [{name: row[name] for name in expected[0]} for row in epochs(tmp_path / "again")]  # there are more by now
    assert len(found) == 3
    if torch.backends.cpu.get_cpu_capability() == MADE_ON and torch.__version__.startswith("2.14"):
        assert found == expected
    for row, other in zip(found, expected, strict=True):
        numbers = [[float(value) for value in values.values()] for values in (row, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


@pytest.mark.parametrize(
    "run_dir", sorted(path.parent for path in REFERENCE.glob("**/result.json")), ids=lambda path: path.name
)
def test_the_configurations_of_the_reference_runs_are_still_accepted_and_have_their_names(run_dir):
    repeat = f"repeat={run_dir}"
    values = with_recorded(compose([repeat]), [repeat])
    check(values)
    assert point_name(as_values(values)) == run_dir.name
