"""Write the findings of the README: short texts whose numbers all come from the kept runs.

`reference.py` puts them into the README.
"""

import pandas as pd
from claims import (
    AGREES,
    CONTRADICTED,
    DIFFERS,
    SUPPORTED,
    UNDECIDED,
    published,
    short_setting,
    welch,
)
from depth_ladder import INITS, at_best_rate, cell_text
from stability_map import COLUMN, lr_text, points

from dfl_experiments.report import paper
from dfl_experiments.report.choose import choose
from dfl_experiments.report.compare import FEWEST_SEEDS
from dfl_experiments.report.style import method_name, title_of, words
from dfl_experiments.report.table_text import NONE, interval_text

DECIDED = (SUPPORTED, CONTRADICTED, UNDECIDED)
# Rows of the table of claims. {} is the method of the column.
CLAIMS = {
    "aligns better with BP than DFA (layer 1)": "{} aligns better with BP than DFA",
    "is more accurate than DFA": "{} is more accurate than DFA",
    "is more accurate than Shallow": "{} is more accurate than Shallow",
    "is less accurate than BP": "BP is more accurate than {}",
    "leads DFA by more with 100 classes than with 10": "{}'s lead over DFA grows with the classes",
}
METHODS = ("DFA", "LAS", "LTAS")
LADDER_RULES = ("bp", "shallow", "dfa", "las", "ltas", "fdfa", "fa")
COMMON_LR = 1e-3  # cosines of different rules are compared at one rate


def claims_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return in how many settings each claim is supported, such as "10 of 11", with a column for each method.

    Settings in which a run fails, or in which accuracy cannot rank the rules, do not count.
    """
    decided = verdicts[verdicts.verdict.isin(DECIDED)]
    is_supported = decided.verdict == SUPPORTED
    counts = is_supported.groupby(decided.claim).agg(["sum", "size"])
    texts = {claim: f"{count['sum']} of {count['size']}" for claim, count in counts.iterrows()}
    table = pd.DataFrame({"the method …": list(CLAIMS)})
    for method in METHODS:
        table[method] = [texts.get(claim.format(method), "") for claim in CLAIMS.values()]
    return table


def contradicted(verdicts: pd.DataFrame) -> str:
    """Return a sentence that lists the contradicted claims with their settings and differences."""
    rows = verdicts[verdicts.verdict == CONTRADICTED]
    if rows.empty:
        return "No claim is contradicted."
    texts = [
        f'"{row.claim}" on {short_setting(row.setting)}: {row.found}' for row in rows.itertuples()
    ]
    return f"Contradicted (✗): {'; '.join(texts)}."


def stability(runs: pd.DataFrame) -> str:
    """Return the finding on stability: at how many rates each rule trains, for each net and data set.

    runs: the runs of the stability map.
    """
    means = points(runs)
    count = means.lr.nunique()
    trained = (~means.fails).groupby([means.model, means.dataset, means.rule]).sum()
    texts = []
    for (model, dataset), numbers in trained.groupby(COLUMN):
        if numbers.min() < count:
            by_rule = numbers.droplevel(COLUMN).sort_values(ascending=False, kind="stable")
            listed = ", ".join(f"{method_name(rule)} {n}" for rule, n in by_rule.items())
            texts.append(f"{words('dataset', dataset)}, {words('model', model)}: {listed}")
    unstable = runs[(runs.unstable != "") & ~runs.fails]
    warned = [
        f"{method_name(run.rule)} on {words('dataset', run.dataset)}, {words('model', run.model)} "
        f"at {lr_text(run.lr)} ({run.unstable})"
        for run in unstable.itertuples()
    ]
    text = f"Number of the narrow Conv3's {count} rates at which no run fails: {'; '.join(texts)}."
    if len(texts) < trained.groupby(COLUMN).ngroups:
        text += f" In all other columns of this table every rule trains at all {count} rates."
    if warned:
        text += f" Runs that train, but are unstable: {'; '.join(warned)}."
    return text


def depth_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy in the deepest net with both initialisations, and the differences with Welch's intervals.

    A rule with a failing run has no difference.

    summary: the runs of the depth ladder.
    """
    best = at_best_rate(summary[summary.depth == summary.depth.max()])
    rows = []
    for rule in LADDER_RULES:
        of_rule = best[best.rule == rule]
        row = {"method": method_name(rule)}
        accuracies = {}
        for init, title in INITS.items():
            cell = of_rule[of_rule["init"] == init]
            row[title] = cell_text(cell, summary.lr.min(), summary.lr.max())
            accuracies[init] = cell.accuracy.to_numpy()
        difference = NONE
        if not of_rule.fails.any():
            value, low, high, _ = welch(accuracies["kaiming"], accuracies["default"])
            difference = interval_text(value, low, high)
        rows.append(row | {"difference, points": difference})
    return pd.DataFrame(rows)


def depth(summary: pd.DataFrame) -> str:
    """Return the finding on depth, which describes `depth_table`.

    summary: the runs of the depth ladder.
    """
    deepest = summary.depth.max()
    is_common = (
        (summary.depth == deepest) & (summary.lr == COMMON_LR) & (summary["init"] == "default")
    )
    cosines = summary[is_common].groupby("rule")["cosine/1"].mean()
    aligned = ", ".join(
        f"{method_name(rule)} {cosines[rule]:.2f}" for rule in ("dfa", "las", "ltas")
    )
    return (
        f"The table shows the test accuracy in percent on the bundled digits with {deepest} hidden layers of 32 units, "
        f"{summary.seed.nunique()} seeds, each method at its best of {summary.lr.nunique()} rates (▲ or ▼: the highest "
        "or the lowest one, so a rate beyond it may be better). Layer 1's cosine with PyTorch's initialisation at "
        f"{COMMON_LR:g} is: {aligned}."
    )


def what_turns(means: pd.DataFrame) -> str:
    """Return the finding on the first figure: which weights must learn so that layer 1's cosine rises.

    means: mean cosines and accuracies of each method (row) at each epoch, see `reference.at_epochs`.
    """
    cosine = means["cosine/1"]

    def change(method: str, *epochs: int) -> str:
        values = [f"{cosine.loc[method, epoch]:.2f}" for epoch in epochs]
        return f"{method_name(method.partition(',')[0])} {' → '.join(values)}"

    both = ", ".join(change(method, 1, 12, 100) for method in ("las", "ltas"))
    only_b = ", ".join(change(f"{method}, fixed_blocks=2", 1, 12) for method in ("las", "ltas"))
    drawn = ", ".join(
        change(f"{method}, init=default", 1, 12, 100) for method in ("dfa", "las", "ltas")
    )
    return (
        "Layer 1's cosine after 1, 12 and 100 epochs. B starts as the product of the weights. The hidden layers' W and "
        f"B learn: {both}. Only W learns: {change('dfa', 1, 12, 100)}. Only B and the output layer learn (12 epochs): "
        f"{only_b}. B starts at random: {drawn}."
    )


def this_paper(runs: pd.DataFrame) -> str:
    """Return the finding on the paper's two tables: ours and its accuracies, where runs of the same length are kept."""
    chosen = choose(runs[~runs.smoke])
    ours = chosen.groupby(paper.SETTINGS).accuracy.agg(["mean", "size"]).reset_index()
    every = paper.published()
    both = every.merge(ours[ours["size"] >= FEWEST_SEEDS], on=paper.SETTINGS)
    texts = []
    for _, rows in both.groupby(paper.ROWS, sort=False):
        values = [
            f"{method_name(row.method)} {100 * row.ours:.2f} ({100 * row.published:.2f})"
            for row in rows.rename(columns={"mean": "ours"}).itertuples()
        ]
        texts.append(f"{title_of(rows.iloc[0])}: {', '.join(values)}")
    return (
        f"Test accuracy in percent of our runs, {FEWEST_SEEDS} seeds or more, and of the paper (in brackets). "
        f"{'. '.join(texts)}. Of the paper's {len(every)} accuracies, {len(both)} have such runs so far."
    )


def other_papers(runs: pd.DataFrame) -> str:
    """Return the finding on published values: ours, the published value, and the verdict."""
    compared = published(runs)
    compared = compared[compared.verdict.isin([AGREES, DIFFERS])]
    texts = []
    for source, rows in compared.groupby("source", sort=False):
        values = [
            f"{row.method} {row.found.partition(':')[0]} ({row.published}: {row.verdict})"
            for row in rows.itertuples()
        ]
        texts.append(f"{source}: {', '.join(values)}")
    return f"Our test accuracy in percent, and the published one in brackets. {'. '.join(texts)}."
