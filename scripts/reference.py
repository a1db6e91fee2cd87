"""Write the reference page on the kept runs, its figures and tables, and the findings of the README.

    python scripts/reference.py

Each part of the findings stands between a line such as `<!-- claims: … -->` and the line `<!-- end -->`.
"""

import argparse
import re
import shutil
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from textwrap import fill

import depth_ladder
import numpy as np
import pandas as pd
import stability_map
from claims import (
    CANNOT_RANK,
    CONTRADICTED,
    FAILS,
    MARKS,
    SUPPORTED,
    TOO_FEW,
    UNDECIDED,
    claims,
    picture,
    published,
)
from families import FAMILY_COLOURS, FAMILY_OF
from findings import (
    DECIDED,
    claims_table,
    contradicted,
    depth,
    depth_table,
    other_papers,
    rates_caption,
    span_text,
    stability,
    this_paper,
    what_learns,
)
from matplotlib.figure import Figure
from pandas.core.groupby import DataFrameGroupBy
from stability_map import best_rates, lr_text, runs_of_map

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.report import document, frame
from dfl_experiments.report.compare import FEWEST_SEEDS, cosines
from dfl_experiments.report.dfl_report import arguments
from dfl_experiments.report.figures import Drawing, figures
from dfl_experiments.report.style import method_name, method_order, row_title, save, styled
from dfl_experiments.report.table_text import NONE, markdown, numbers
from dfl_experiments.report.tables import Section, sections

EPOCHS = (1, 12, 100)  # epochs that the tables of the alignment figure show
KEPT = Path("outputs/reference")
README = Path("README.md")
FEWEST_RULES = 4  # with fewer rules, no correlation is computed
MARKED = r"(<!-- {}.*?-->\n).*?(<!-- end -->)"  # a part of the README that the script replaces
HEADING = re.compile(r"^(##) (.*)$", re.MULTILINE)
TOP = """# The kept runs

This page shows the results of {count} runs, as `dfl-report` does, and of the *depth ladder*: {ladder} short runs of
fully connected nets with 2 to 12 hidden layers. `python scripts/reference.py` writes it from the files beside it.

What to keep in mind:

- Some runs used a GPU, others a CPU: see `devices` in [`tables.csv`](tables.csv). The runs come from many commits and
  several versions of PyTorch, which `result.json` of each run names. `+changes` marks a commit with uncommitted
  changes. Some early commits are not in this history.
- The runs on CIFAR with bfloat16 used one learning rate for all rules of a net. At this rate DFA and LTAS fail with
  Conv3 on CIFAR-100, and some rules with Conv3+BN on CIFAR-10. At other rates the rules may be better.
- {example}
- {rates}

These runs used one CPU core:

- The depth ladder with PyTorch's default and with He initialisation (`model.init=kaiming`), 10 seeds each.
- The *stability map*: a narrow Conv3 with and without batch normalisation at four rates. Each rate has seed 0. Each
  method's best rate by validation (without batch normalisation: its two best rates) also has seeds 1 and 2.
- Values that Akrout et al. and Webster et al. published, 3 seeds each.
- The alignment figure with `protocol=paper` and with a random initial B, 3 seeds each.
"""


def rates_sentence(runs: pd.DataFrame) -> str:
    """Return a sentence that tells how many learning rates each rule has on MNIST with 20 epochs."""
    on_mnist = runs[(runs.dataset == "mnist") & (runs.epochs == 20)]
    counts = on_mnist.groupby("rule").lr.nunique()
    counts = counts.reindex(group_options("method"), fill_value=0)
    others = counts[counts < counts.max()]
    text = f"On MNIST with 20 epochs, all rules have {counts.max()} learning rates"
    if len(others):
        names = [method_name(rule) for rule in sorted(others.index, key=method_order)]
        text += f", except {', '.join(names)} ({span_text(others)})"
    return f"{text}."


def example_sentence(runs: pd.DataFrame) -> str:
    """Return a sentence with the accuracies of the fully connected net on CIFAR-100 at each learning rate."""
    of_net = runs[(runs.dataset == "cifar100") & (runs.model == "fc") & (runs.epochs == 10)]
    texts = []
    for (lr, precision), at_rate in of_net.groupby(["lr", "precision"], sort=False):
        of_rule = at_rate.groupby("rule").accuracy
        means = of_rule.mean().sort_index(key=lambda rules: rules.map(method_order))
        values = [f"{method_name(rule)} {100 * mean:.1f}" for rule, mean in means.items()]
        seeds = f"seeds: {span_text(of_rule.size())}"
        texts.append((lr, f"at {lr_text(lr)} ({precision}, {seeds}) {', '.join(values)}"))
    by_rate = [text for _, text in sorted(texts, reverse=True)]
    return (
        f"Test accuracy in percent of the fully connected net on CIFAR-100: {'; '.join(by_rate)}."
    )


def table(frame: pd.DataFrame) -> str:
    """Return a table in Markdown. All values of the frame are texts."""
    return f"{frame.map(markdown).to_markdown(index=False, tablefmt='github', disable_numparse=True)}\n"


def claims_part(verdicts: pd.DataFrame) -> Iterator[str]:
    """Yield the section on the claims: the figure, the counts, and a table of the verdicts in each setting."""
    yield "## Claims\n"
    yield "![Settings × claims](figures/claims.png)\n"
    yield counts_sentence(verdicts)
    yield (
        "'Fails' means: for one of the two methods, every rate has a failing run. '=' is tested where BP and Shallow "
        "were both run. A setting's name ends with the number of learning rates that were tried. Accuracies are "
        "compared at each method's best rate by validation accuracy. Alignment is the cosine of layer 1, averaged over "
        "the rates at which both methods have three seeds; the column `found` names these rates. n is the number of "
        "seeds; for accuracies it includes failing runs. Intervals are Welch's t of the two methods, 95 %, without "
        "correction for their number. The tables further below use Dunnett's intervals, which pool the variances of a "
        "setting. So the two kinds can disagree. On MNIST with Adam, 100 epochs, BP, DFA and Shallow ran on a GPU, LAS "
        "and LTAS on a CPU with a newer PyTorch.\n"
    )
    shown = verdicts[verdicts.verdict != TOO_FEW]
    for setting, part in shown.groupby("setting", sort=False):
        yield f"**{markdown(str(setting))}**\n"
        yield table(part[["claim", "n", "found", "verdict"]].astype(str))


def counts_sentence(verdicts: pd.DataFrame) -> str:
    """Return sentences with the number of verdicts of each kind."""
    is_judged = verdicts.verdict != TOO_FEW
    totals = verdicts.verdict.value_counts()
    number = {verdict: totals.get(verdict, 0) for verdict in MARKS}
    is_of_accuracy = verdicts.claim.str.contains("accurate")
    judged = verdicts[is_of_accuracy & verdicts.verdict.isin(DECIDED)]
    undecided = (judged.verdict == UNDECIDED).sum()
    after_holm = significant_after_holm(judged.p)
    texts = [
        f"The figure has {is_judged.sum()} verdicts: {number[SUPPORTED]} ✓, {number[CONTRADICTED]} ✗, "
        f"{number[UNDECIDED]} ? (the 95 % interval contains 0), {number[FAILS]} 'fails' (one of the two methods has a "
        f"failing run), {number[CANNOT_RANK]} '=' (even BP is not significantly more accurate than Shallow).",
        f"{number[TOO_FEW]} comparisons with fewer than {FEWEST_SEEDS} seeds (for cosines: at the same rate) are left "
        "out.",
        f"Of {len(judged)} differences of two accuracies (✓, ✗, ?), {len(judged) - undecided} are significant, and "
        f"{after_holm} after Holm's correction.",
        one_rate_sentence(verdicts),
    ]
    return " ".join(texts) + "\n"


def one_rate_sentence(verdicts: pd.DataFrame) -> str:
    """Return a sentence with the number of settings in which only one learning rate was tried."""
    settings = verdicts.setting[verdicts.verdict != TOO_FEW].drop_duplicates()
    has_one_rate = settings.str.endswith(", 1 rate")
    return (
        f"In {has_one_rate.sum()} of the figure's {len(settings)} rows only one learning rate was tried: another may "
        "change the verdict."
    )


def significant_after_holm(p_values: pd.Series) -> int:
    """Return how many of these tests Holm's method rejects at a family-wise error of 5 %."""
    ordered = p_values.sort_values()
    limits = 0.05 / np.arange(len(ordered), 0, -1)
    return int((ordered <= limits).cumprod().sum())


def without_first_epochs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs without those of 12 epochs from a random B: the runs of 100 epochs begin with the same epochs."""
    is_short = (runs.epochs == 12) & runs.method.str.endswith("init=default")
    return runs[~is_short]


def without_published(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs without those that reproduce published values: `published_part` shows them."""
    return runs[~runs.folder.str.startswith(str(KEPT / "published"))]


def published_part(runs: pd.DataFrame) -> Iterator[str]:
    """Yield the section that compares published values with the runs that reproduce them."""
    yield "## Values that others published\n"
    yield (
        "Test accuracy in percent. The files in `conf/experiment/published/` have the sources and settings, and name "
        "what differs from the published experiment. The interval takes into account that a published value also "
        "varies from run to run: it is the mean of one run (Akrout et al.) or of four (Webster et al.). A value agrees "
        "if the interval contains 0, or if the difference is within the noise floor of one accuracy. Agreement of a "
        "few runs does not prove that the two experiments are equal. Cosine: of layer 1, mean over the last epoch.\n"
    )
    yield table(published(runs).astype(str))


def alignment_part(runs: pd.DataFrame) -> Iterator[str]:
    """Yield the section on the alignment figure: its control runs, and the figure with the paper's protocol."""
    sgd = runs_of_figure(runs)
    yield "## The alignment figure and its controls\n"
    yield (
        "MNIST with SGD at 1e-4, means over the seeds. By default, B starts as the product of the W above it; with "
        "`init=default` it starts at random. With `fixed_blocks=2` the hidden layers' W stay fixed: only B and the "
        "output layer learn. Layer 2 gets BP's signal.\n"
    )
    yield cosine_table(sgd[sgd.protocol == "fair"], ["1"])
    yield (
        "The same with `protocol=paper`: DFA sends B e also to layer 2, LAS's loss has the factor ½ of the paper's "
        "Eq. 21, and B starts as the product in all three rules. The accuracies of the two tables cannot be compared, "
        "because here all 60,000 images train (above: 54,000).\n"
    )
    yield cosine_table(sgd[sgd.protocol == "paper"], ["1", "2"])


def runs_of_figure(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the finished runs of the alignment figure and of its controls."""
    is_figure = (runs.optimizer == "sgd") & (runs.dataset == "mnist") & (runs.lr == 1e-4)
    return runs[is_figure & (runs.status == "finished")]


def at_epochs(runs: pd.DataFrame, layers: list[str]) -> DataFrameGroupBy:
    """Return cosines and accuracies of the runs at `EPOCHS`, grouped by method and epoch.

    A cosine is NaN where the signal equals BP's by construction.
    """
    about = ["folder", "method", "seed", "exact_layers"]
    curves = frame.curves(runs).merge(runs[about], on="folder")
    # a run of 12 epochs has the same first epochs as the run of 100 epochs with its seed
    curves = curves.drop_duplicates(["method", "seed", "epoch"])
    curves = curves[curves.epoch.isin(EPOCHS)].astype({"epoch": int})
    for layer in layers:
        is_exact = [layer in exact for exact in curves.exact_layers]
        curves[f"cosine/{layer}"] = curves[f"cosine/{layer}"].mask(is_exact)
    return curves.groupby(["method", "epoch"])


def cosine_table(runs: pd.DataFrame, layers: list[str]) -> str:
    """Return a table with a row for each method: cosines and test accuracy at `EPOCHS`, as means over seeds."""
    by_point = at_epochs(runs, layers)
    means = by_point.mean(numeric_only=True).unstack("epoch")
    shown = pd.DataFrame({"method": means.index.map(method_name)}, index=means.index)
    counts_of_seeds = by_point.size().unstack("epoch").map("{:.0f}".format).replace("nan", NONE)
    epochs = ", ".join(map(str, EPOCHS))
    shown[f"seeds at epochs {epochs}"] = counts_of_seeds.agg(", ".join, "columns")
    for layer in layers:
        for epoch in EPOCHS:
            cosines_at_epoch = means[f"cosine/{layer}", epoch]
            shown[f"layer-{layer} cosine, epoch {epoch}"] = numbers(cosines_at_epoch, "+.2f")
    for epoch in EPOCHS:
        percent = 100 * means["test_accuracy", epoch]
        shown[f"test accuracy, epoch {epoch}, %"] = numbers(percent, ".1f")
    return table(shown)


def stability_part(runs: pd.DataFrame) -> Iterator[str]:
    """Yield the section with the stability map."""
    yield "## At which rates each rule is stable\n"
    yield (
        "A narrow Conv3 (channels 16, 24, 32; two linear layers of 512 units), 10 epochs of Adam. Points at a "
        "rule's best rates are means of three seeds; all other points are seed 0. Activations and dead units are those "
        "after the last epoch. Activations above 1,000 are drawn at 1,000.\n"
    )
    yield "![Accuracy, activations and dead units against the learning rate](stability_map/stability.png)\n"
    yield "Test accuracy in percent at each rule's best rate by validation accuracy (mean ± sd, rate):\n"
    yield table(best_rates(runs_of_map(runs)))


def ladder_part() -> Iterator[str]:
    """Yield the section on depth."""
    summary = pd.read_csv(depth_ladder.SUMMARY)
    seeds = [f"{part.seed.nunique()} ({init})" for init, part in summary.groupby("init")]
    of_inits = ", ".join(seeds)
    yield "## How deep each rule trains\n"
    yield (
        "Test accuracy in percent on the bundled digits, fully connected nets of 32 units a layer. Each rule is shown "
        "at the best of four rates by validation accuracy. Thin lines are rules, thick lines are families. The "
        "table's means are over the runs that do not fail; if all fail, over all. ▲ or ▼: the best rate is the "
        "highest or the lowest one tried, so a rate beyond it may be better. The figure's accuracies are means over "
        f"all runs, and its cosines are those at each rule's own best rate. Seeds by initialisation: {of_inits}. "
        "The noise floor of one accuracy is 1.6 points at 90 %.\n"
    )
    yield "![Accuracy, cosine and dead units against depth](depth_digits/depth.png)\n"
    yield f"{depth_ladder.markdown(summary)}\n"
    yield (
        f"The two initialisations with {summary.depth.max()} layers: difference of the accuracies, with Welch's 95 % "
        "interval. A rule with failing runs has none.\n"
    )
    yield table(depth_table(summary))


def means_of_rules(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return for each setting and rate with enough rules the rules' mean cosine of layer 1 and mean accuracy."""
    measured = cosines(runs[~runs.smoke])
    plain = measured[measured.method.str.partition(",")[0] == measured.rule]
    plain = plain.assign(
        setting=[f"{row_title(row)}, lr {row.lr:g}" for _, row in plain.iterrows()]
    )
    settings = {}
    for setting, part in plain.groupby("setting"):
        means = part.groupby("rule")[["cosine/1", "accuracy"]].mean().dropna()
        if len(means) >= 2 * FEWEST_RULES:
            settings[str(setting)] = means
    return settings


def families_picture(runs: pd.DataFrame) -> Figure:
    """Draw the ranks of accuracy and of layer 1's cosine: a panel for each setting and rate, a point for each rule."""
    settings = means_of_rules(runs)
    rows = ceil(len(settings) / 2)
    drawing = Figure(figsize=(10.4, 4.4 * rows), layout="constrained")
    for number, (setting, means) in enumerate(settings.items(), start=1):
        axes = drawing.add_subplot(rows, 2, number)
        for rule, point in means.rank().iterrows():
            axes.plot(*point, "o", color=FAMILY_COLOURS[FAMILY_OF[str(rule)]])
            axes.annotate(method_name(str(rule)), point, xytext=(4, 3), textcoords="offset points")
        axes.set_title(fill(setting, 55))
        axes.set(xlabel="rank of the cosine with BP, layer 1", ylabel="rank of the test accuracy")
    return drawing


def families_part(runs: pd.DataFrame) -> Iterator[str]:
    """Yield the section on Spearman's ρ between layer 1's cosine and accuracy, over all rules and by family."""
    yield "## Alignment and accuracy\n"
    yield "![Ranks of accuracy and of the cosine of layer 1, a point for each rule](figures/families.png)\n"
    yield (
        "The table shows Spearman's ρ over the rules' means at one rate, and the number of rules in brackets. Failing "
        "runs, and rules with a zero signal for most samples, are left out. The figure shows the ranks; 1 is the "
        "lowest. Read these ρ with care: many rules are similar, so they are not independent observations.\n"
    )
    rows = []
    for setting, means in means_of_rules(runs).items():
        family = means.index.map(FAMILY_OF)
        row = {"setting": setting, "all rules": correlation(means)}
        row["direct"] = correlation(means[family.str.startswith("direct")])
        row["through every layer"] = correlation(means[family.str.startswith("through")])
        rows.append(row)
    yield table(pd.DataFrame(rows))


def correlation(means: pd.DataFrame) -> str:
    """Return Spearman's ρ between layer 1's cosine and accuracy over the rules, and the number of rules, as text.

    Return a dash if there are too few rules.
    """
    rho = means["cosine/1"].corr(means.accuracy, method="spearman")
    return f"{rho:+.2f} ({len(means)})" if len(means) >= FEWEST_RULES else NONE


def contents(text: str) -> str:
    """Return a table of contents: a link to every heading, with the anchors that GitHub makes."""
    links = []
    for _, title in HEADING.findall(text):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        links.append(f"- [{title}](#{anchor})")
    return "\n".join(links) + "\n"


def page(
    runs: pd.DataFrame, parts: list[Section], verdicts: pd.DataFrame, drawings: list[Drawing]
) -> str:
    """Return the reference page.

    parts: the sections of the report.
    drawings: the figures of the report, whose files are in outputs/reference/figures.
    """
    options = f"--paper --format=markdown --out={KEPT}/README.md --figures={KEPT}/figures"
    asked = arguments([str(KEPT), *options.split()])
    texts = [
        *claims_part(verdicts),
        *published_part(runs),
        *stability_part(runs),
        *ladder_part(),
        *alignment_part(runs),
        *families_part(runs),
        document.text(parts, asked, drawings),
    ]
    body = "\n".join(texts)
    ladder = len(pd.read_csv(depth_ladder.SUMMARY))
    rates = fill(rates_sentence(runs), 118, subsequent_indent="  ")
    example = fill(example_sentence(runs), 118, subsequent_indent="  ")
    top = TOP.format(count=len(runs), ladder=f"{ladder:,}", rates=rates, example=example)
    return "\n".join([top, contents(body), body])


def findings(runs: pd.DataFrame, verdicts: pd.DataFrame) -> dict[str, str]:
    """Return the parts of the README that state findings, by the names of their places there."""
    map_runs = runs_of_map(runs)
    figure_runs = runs_of_figure(runs)
    of_figure = at_epochs(figure_runs[figure_runs.protocol == "fair"], ["1"])
    ladder = pd.read_csv(depth_ladder.SUMMARY)
    points = {
        "Stability": stability(map_runs),
        "What must learn": what_learns(of_figure),
        "This paper's tables": this_paper(runs),
        "Other papers": other_papers(runs),
        "Depth": depth(ladder),
    }
    bullets = []
    for title, text in points.items():
        # a line break in a link would break the link
        bullet = fill(f"- **{title}.** {text}", 120, subsequent_indent="  ", break_on_hyphens=False)
        bullets.append(bullet)
    claim_texts = [
        table(claims_table(verdicts)),
        f"{fill(contradicted(verdicts), 120)}\n",
        f"{fill(one_rate_sentence(verdicts), 120)}\n",
    ]
    return {
        "claims": "\n".join(claim_texts),
        "rates": f"{fill(rates_caption(map_runs), 120)}\n\n{table(best_rates(map_runs))}",
        "findings": "\n".join(bullets) + "\n",
    }


def readme(text: str, runs: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    """Return the README with the new findings."""
    for name, content in findings(runs, verdicts).items():
        marked = re.search(MARKED.format(name), text, re.DOTALL)
        assert marked, f"the README has no part <!-- {name} … -->"
        text = f"{text[: marked.end(1)]}{content}{text[marked.start(2) :]}"
    return text


def main() -> None:
    """Write the page, the figures, the table and the parts of the README."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    runs = frame.runs(KEPT)
    verdicts = claims(without_first_epochs(runs))
    parts = sections(without_published(runs))
    drawings = figures(parts)
    folder = KEPT / "figures"
    shutil.rmtree(folder, ignore_errors=True)  # delete the figures of the previous call
    document.save_all(drawings, folder, ["png"])
    save(picture(verdicts), folder / "claims.png")
    with styled():
        save(families_picture(runs), folder / "families.png", dpi=120)
    depth_ladder.write_figure()
    stability_map.write_figure(runs)
    (KEPT / "README.md").write_text(page(runs, parts, verdicts, drawings))
    (KEPT / "tables.csv").write_text(document.csv_of(parts))
    README.write_text(readme(README.read_text(), runs, verdicts))


if __name__ == "__main__":
    main()
