"""What a report says of the runs: intervals, verdicts, ties, tables across a key, command lines."""

import csv
import io
import itertools
import shlex
import shutil
from pathlib import Path

import pytest
from report_helpers import altered, dfl_report, finished, only_entry
from scipy import stats

from dfl_experiments.configuration.composition import compose, plain, science
from dfl_experiments.report.cells import sections
from dfl_experiments.report.commands import command
from dfl_experiments.report.findings import findings
from dfl_experiments.report.intervals import paired, rank_correlation, spearman
from dfl_experiments.report.runs import read_runs


def test_a_paired_interval_is_the_paired_t_test_s():
    first, second = {0: 98.1, 1: 98.4, 2: 98.2, 7: 1.0}, {0: 98.0, 1: 98.1, 2: 98.2, 9: 5.0}
    found = paired(first, second)
    test = stats.ttest_rel([98.1, 98.4, 98.2], [98.0, 98.1, 98.2])
    assert found.n == 3
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.value == pytest.approx(0.4 / 3)
    assert found.sign == 0
    assert paired({0: 2.0}, {0: 1.0}) == (1.0, None, None, 1)
    assert paired({0: 2.0}, {0: 1.0}).sign is None
    assert paired({0: 2.0}, {1: 1.0}) is None
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).sign is None  # two values are easily equal by chance
    leads = ({seed: sign * (1 + seed / 10) for seed in range(3)} for sign in (1, -1))
    assert [paired(lead, dict.fromkeys(lead, 0.0)).sign for lead in leads] == [1, -1]


def test_a_rank_correlation_is_spearman_s():
    points = [(0.1, 5.0), (0.2, 4.0), (0.2, 6.0), (0.7, 7.0), (0.6, 9.0), (0.9, 8.0)]
    assert spearman(points) == pytest.approx(stats.spearmanr(*zip(*points, strict=True)).statistic)
    assert spearman([(0.1, 5.0), (0.1, 4.0), (0.1, 3.0)]) is None
    single = rank_correlation(points)
    assert single.n == 6
    assert single.low < single.value < single.high
    assert rank_correlation([(x, x) for x in range(6)])[:3] == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("epoch", ["last", "best_validation"])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.1), (0.1, 0.3)])
def test_of_tied_points_the_one_with_the_lower_validation_loss_is_shown(finished_point, tmp_path, low, high, epoch):
    for name, lr, loss in (("a", 1e-3, low), ("b", 1e-2, high)):
        said = finished(0.9, lr, 0, **{"protocol.accuracy": epoch})
        altered(finished_point, tmp_path / name, **said, validation_loss=loss)
        with (tmp_path / name / "epochs.csv").open() as file:
            rows = [*csv.DictReader(file)]
        for row, value in zip(rows, (loss, 9, 9), strict=True):
            row |= {"validation_loss": value, "validation_accuracy": 0.9}
        with (tmp_path / name / "epochs.csv").open("w") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    entry = only_entry(tmp_path)
    assert entry.best.lr == (1e-2 if low > high else 1e-3)
    assert entry.grid == "2 of 4, tied"
    if epoch == "last":
        altered(finished_point, tmp_path / "c", **finished(0.95, 3e-3, 0))
        assert (only_entry(tmp_path).best.lr, only_entry(tmp_path).grid) == (3e-3, "3 of 4")


def made(finished_point, place, accuracies, cosine=0.5, **config):
    """Runs by method and seed, with these accuracies."""
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            node = plain(compose([f"method={method}"]))["method"]
            said = finished(value, 1e-3, seed, **{"method": node, **config})
            there = {"cosine": {"1": cosine + value / 10, "2": 1.0}, "cosine_by_construction": ["2"]}
            altered(finished_point, place / f"{len([*place.glob('*')])}", **said, **there)


def test_a_verdict_is_given_where_the_interval_leaves_out_zero(finished_point, tmp_path):
    accuracies = {
        "bp": (0.9, 0.91, 0.92),
        "dfa": (0.8, 0.81, 0.825),
        "las": (0.85, 0.86, 0.876),
        "ltas": (0.7, 0.95, 0.8),
    }
    made(finished_point, tmp_path, accuracies)
    found = {one.claim: one for one in findings(sections(read_runs([tmp_path])))}
    verdicts = {claim: one.verdict for claim, one in found.items()}
    assert verdicts == {
        "LAS aligns better with BP than DFA, layer 1": "supported",
        "LTAS aligns better with BP than DFA, layer 1": "undecided",
        "LAS is more accurate than DFA": "supported",
        "LTAS is more accurate than DFA": "undecided",
        "BP is more accurate than DFA": "supported",
        "BP is more accurate than LAS": "supported",
        "BP is more accurate than LTAS": "undecided",
    }
    assert found["LAS is more accurate than DFA"].estimate.value == pytest.approx(5.0333, abs=1e-3)
    text = dfl_report(tmp_path, ".", "--format", "markdown").stdout
    assert "LAS is more accurate than DFA" in text
    assert "+5.03 [+4.89, +5.18], n 3: better" in text


def test_the_lead_over_dfa_is_compared_between_numbers_of_classes(finished_point, tmp_path):
    for dataset, las in (("cifar10", (0.5, 0.51, 0.5)), ("cifar100", (0.55, 0.565, 0.55))):
        said = {"dataset.name": dataset, "augmentation.name": "flip"}
        made(finished_point, tmp_path, {"dfa": (0.4, 0.41, 0.4), "las": las}, **said)
    (one,) = (one for one in findings(sections(read_runs([tmp_path]))) if "classes" in one.claim)
    assert one.estimate.value == pytest.approx(5.1667, abs=1e-3)
    assert (one.estimate.n, one.verdict) == (3, "supported")


def test_a_comparison_with_runs_that_collapsed_says_so(finished_point, tmp_path):
    made(finished_point, tmp_path, {"bp": (0.9,) * 3, "dfa": (0.1, 0.11, 0.5), "las": (0.6, 0.6, 0.61)})
    made(finished_point, tmp_path, {"ltas": (0.1, 0.1, 0.1)})
    found = {one.claim: one for one in findings(sections(read_runs([tmp_path])))}
    judged = {claim: (one.found, one.n, one.verdict) for claim, one in found.items()}
    assert judged == {
        "LAS aligns better with BP than DFA, layer 1": ("DFA 2 of 3 collapsed", 3, "collapsed"),
        "LTAS aligns better with BP than DFA, layer 1": (
            "LTAS 3 of 3 collapsed, DFA 2 of 3 collapsed",
            3,
            "collapsed",
        ),
        "LAS is more accurate than DFA": ("DFA 2 of 3 collapsed", 3, "collapsed"),
        "LTAS is more accurate than DFA": ("LTAS 3 of 3 collapsed, DFA 2 of 3 collapsed", 3, "collapsed"),
        "BP is more accurate than DFA": ("DFA 2 of 3 collapsed", 3, "collapsed"),
        "BP is more accurate than LAS": (found["BP is more accurate than LAS"].found, 3, "supported"),
        "BP is more accurate than LTAS": ("LTAS 3 of 3 collapsed", 3, "collapsed"),
    }
    text = dfl_report(tmp_path, ".").stdout
    assert "50.00 (98.50), 2 of 3 collapsed" in text
    assert "10.00 ± 0.00 (98.64), 3 of 3 collapsed" in text
    assert "DFA 2 of 3 collapsed" in text


def test_a_run_that_ends_far_below_its_best_has_collapsed(finished_point, tmp_path):
    for seed, best in enumerate((0.51, 0.7)):
        said = finished(0.5, 1e-3, seed)
        altered(
            finished_point, tmp_path / str(seed), **said | {"test_accuracy": said["test_accuracy"] | {"best": best}}
        )
    assert [run.collapsed for run in read_runs([tmp_path])] == [False, True]


def test_alignment_is_compared_at_equal_learning_rates(finished_point, tmp_path):
    cosines = {("dfa", 1e-3): 0.3, ("dfa", 1e-4): 0.8, ("las", 1e-3): 0.5, ("las", 1e-4): 0.9}
    for (method, lr), cosine in cosines.items():
        for seed in range(3):
            accuracy = 0.9 if (method, lr) in (("dfa", 1e-4), ("las", 1e-3)) else 0.8  # the chosen ones
            said = finished(accuracy, lr, seed, method=plain(compose([f"method={method}"]))["method"])
            there = {"cosine": {"1": cosine + seed / 1000}, "cosine_by_construction": ["2"]}
            altered(finished_point, tmp_path / f"{method}{lr}{seed}", **said, **there)
    found = {one.claim: one for one in findings(sections(read_runs([tmp_path])))}
    assert found["LAS aligns better with BP than DFA, layer 1"].estimate.value == pytest.approx(0.15)
    assert found["LAS is more accurate than DFA"].where.endswith("; lr 0.001 (LAS) and 0.0001 (DFA)")
    shutil.rmtree(tmp_path / "las0.00012")  # at this rate one seed cannot be compared any more, so that it says nothing
    one = next(iter(findings(sections(read_runs([tmp_path])))))
    assert (one.estimate.value, one.n) == (pytest.approx(0.2), 3)


def test_a_method_with_other_options_has_a_cell_of_its_own_beside_the_others(finished_point, tmp_path):
    for index, (limit, seed) in enumerate(((0.5, 0), (0.7, 0), (0.9, 1))):
        method = {"name": "clipped", "_target_": "my_rules.ClippedFeedback", "limit": limit, "init": "product"}
        altered(finished_point, tmp_path / str(index), **finished(limit, 1e-3, seed, method=method))
    altered(finished_point, tmp_path / "dfa", **finished(0.4, 1e-3, 0, method=plain(compose(["method=dfa"]))["method"]))
    las = {**plain(compose(["method=las"]))["method"], "held": 2}
    altered(finished_point, tmp_path / "las", **finished(0.3, 1e-3, 0, method=las))
    (section,) = sections(read_runs([tmp_path]))
    found = {entry.cell.method: [run.seed for run in entry.shown] for entry in section.chosen}
    clipped = {"clipped, limit=0.5": [0], "clipped, limit=0.7": [0], "clipped, limit=0.9": [1]}
    assert found == {"dfa": [0], "las, held=2": [0], **clipped}
    done = dfl_report(tmp_path, ".", "--across", "method.limit", "--format", "csv")
    (row,) = (row for row in csv.DictReader(io.StringIO(done.stdout)) if row["method"] == "clipped")
    assert (row["method.limit=0.7"], row["method.limit=0.9"]) == ("70.00 (n 1)", "90.00 (n 1)")


def test_one_table_across_a_key_that_was_swept(finished_point, tmp_path):
    for (size, accuracy), seed in itertools.product(((32, 0.8), (64, 0.9)), (0, 1)):
        altered(
            finished_point, tmp_path / f"{size}{seed}", **finished(accuracy + seed / 100, 1e-3, seed, batch_size=size)
        )
    done = dfl_report(tmp_path, ".", "--across", "batch_size", "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert row["batch_size=32"] == "80.50 ± 0.71 (n 2)"
    assert row["batch_size=64"] == "90.50 ± 0.71 (n 2)"
    assert "80.50 ± 0.71" in dfl_report(tmp_path, ".", "--across", "batch_size").stdout
    refused = dfl_report(tmp_path, ".", "--across", "no.such.key")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no run has this key" in refused.stderr


def test_a_command_line_computes_the_same(reported, finished_point, tmp_path):
    options = {
        "protocol.dfa_init": "kaiming",
        "model.activation": "tanh",
        "precision": "bfloat16",
        "alignment.every": 0,
    }
    strange = {"tracking.tags": ["a b", "it's"], "optimizer.betas": [0.5, 0.9], "limit": 100}
    altered(finished_point, tmp_path / "a", {**options, **strange})
    exact = {"optimizer.lr": 0.000123456789, "optimizer.betas": [0.9, 0.99999999], "memory_format": "contiguous"}
    altered(finished_point, tmp_path / "b", exact)
    kept = Path(__file__).resolve().parents[2] / "outputs" / "reference"
    for run in read_runs([reported / "outputs", tmp_path, kept]):
        if run.config.get("smoke") is None:
            line = command(run)
            assert science(compose(shlex.split(line)[1:])) == science(run.config), line
    seeds = [run.config.seed for run in read_runs([kept / "alignment_figure"]) if run.cell.method == "dfa"]
    (several,) = (line for line in dfl_report(kept, "alignment_figure", "--format", "commands").stdout.splitlines()
                  if " method=dfa " in line)  # fmt: skip
    assert several.startswith("dfl-train --multirun dataset=mnist ")
    assert several.endswith(f" seed={','.join(map(str, sorted(seeds)))}")
    shown = dfl_report(tmp_path, "a", "--format", "commands").stdout
    assert "optimizer.betas=[0.5,0.9]" in shown
