"""Write the findings of the README: short texts whose numbers all come from the kept runs.

`reference.py` puts them into the README.
"""

import pandas as pd
from claims import (
    AGREES,
    ALIGNS,
    CONTRADICTED,
    DIFFERS,
    IS_BETTER,
    LEADS_MORE,
    SUPPORTED,
    UNDECIDED,
    published,
    short_setting,
    welch,
)
from depth_ladder import INITS, at_best_rate, cell_text
from pandas.core.groupby import DataFrameGroupBy
from stability_map import COLUMN, lr_text, points

from dfl_experiments.report import paper
from dfl_experiments.report.choose import choose
from dfl_experiments.report.compare import FEWEST_SEEDS
from dfl_experiments.report.style import method_name, method_order, title_of, words
from dfl_experiments.report.table_text import NONE, interval_text

DECIDED = (SUPPORTED, CONTRADICTED, UNDECIDED)
# Rows of the table of claims. {} is the method of the column.
CLAIMS = {
    "aligns better with BP than DFA (layer 1)": ALIGNS.format("{}", "DFA"),
    "is more accurate than DFA": IS_BETTER.format("{}", "DFA"),
    "is more accurate than Shallow": IS_BETTER.format("{}", "Shallow"),
    "is less accurate than BP": IS_BETTER.format("BP", "{}"),
    "has a larger lead over DFA with 100 classes than with 10": LEADS_MORE.format("{}", "DFA"),
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
    return f"Contradicted (✗), with the difference: {'; '.join(texts)}."


def span_text(counts: pd.Series) -> str:
    """Return the lowest and the highest number as text: "1 to 3", or "3" if they are equal."""
    lowest, highest = counts.min(), counts.max()
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


def seeds_by_rate(runs: pd.DataFrame) -> pd.Series:
    """Return the number of seeds of each rule at each learning rate, for each net and data set."""
    return runs.groupby([*COLUMN, "rule", "lr"]).seed.nunique()


def rates_caption(runs: pd.DataFrame) -> str:
    """Return the text above the table of the best rates.

    runs: the runs of the stability map.
    """
    seeds_at_best = choose(runs).groupby([*COLUMN, "rule"]).seed.nunique()
    return (
        "A [narrow Conv3](outputs/reference/README.md#at-which-rates-each-rule-is-stable), with "
        f"and without batch normalisation (BN), after {span_text(runs.epochs)} epochs of Adam. Test accuracy in "
        f"percent, mean ± sd of {span_text(seeds_at_best)} seeds, at the rate with the best validation accuracy "
        f"(over {span_text(seeds_by_rate(runs))} seeds). Rates below {lr_text(runs.lr.min())} or above "
        f"{lr_text(runs.lr.max())} may be better."
    )


def stability(runs: pd.DataFrame) -> str:
    """Return the finding on stability: at which rates a run of each rule fails, for each net and data set.

    runs: the runs of the stability map.
    """
    means = points(runs)
    texts = []
    for (model, dataset), failing in means[means.fails].groupby(COLUMN):
        by_rule = []
        for rule in sorted(failing.rule.unique(), key=method_order):
            rates = ", ".join(map(lr_text, sorted(failing.lr[failing.rule == rule])))
            by_rule.append(f"{method_name(rule)} ({rates})")
        title = f"{words('dataset', dataset)}, {words('model', model)}"
        texts.append(f"{title}: {', '.join(by_rule)}")
    failing = "; ".join(texts) or "none"
    return (
        f"Rates at which a run of the table above fails (of {means.lr.nunique()} rates, with "
        f"{span_text(seeds_by_rate(runs))} seeds each): {failing}."
    )


def differences_of_initialisation(best: pd.DataFrame) -> pd.DataFrame:
    """Return He initialisation's accuracy minus that of PyTorch's, with Welch's interval, and a row for each rule.

    Columns: `value`, `low`, `high`. They are NaN for a rule with a failing run.

    best: the runs of one depth at each rule's best rate.
    """
    rows = {}
    for rule in LADDER_RULES:
        of_rule = best[best.rule == rule]
        he, usual = (
            of_rule.accuracy[of_rule["init"] == init].to_numpy() for init in ("kaiming", "default")
        )
        if not of_rule.fails.any():
            rows[rule] = welch(he, usual)._asdict()
    return pd.DataFrame(rows, index=["value", "low", "high"]).T.reindex(LADDER_RULES)


def depth_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy in the deepest net with both initialisations, and the differences of the two.

    summary: the runs of the depth ladder.
    """
    best = at_best_rate(summary[summary.depth == summary.depth.max()])
    rows = []
    for rule, difference in differences_of_initialisation(best).iterrows():
        row = {"method": method_name(rule)}
        for init, title in INITS.items():
            cell = best[(best.rule == rule) & (best["init"] == init)]
            row[title] = cell_text(cell, summary.lr.min(), summary.lr.max())
        row["He − PyTorch, points"] = (
            NONE if difference.isna().any() else interval_text(*difference)
        )
        rows.append(row)
    return pd.DataFrame(rows)


def what_he_changes(summary: pd.DataFrame) -> str:
    """Return a sentence with the significant differences between the two initialisations in the deepest net.

    summary: the runs of the depth ladder.
    """
    deepest = summary.depth.max()
    best = at_best_rate(summary[summary.depth == deepest])
    differences = differences_of_initialisation(best)
    is_higher, is_lower = differences.low > 0, differences.high < 0
    changes = [
        f"{method_name(rule)} {100 * value:+.1f}"
        for rule, value in differences.value[is_higher | is_lower].items()
    ]
    is_open = differences.value.notna() & ~is_higher & ~is_lower
    others = [method_name(rule) for rule in differences.index[is_open]]
    failing = [method_name(rule) for rule in differences.index[differences.value.isna()]]
    return (
        f"With {deepest} layers, He initialisation instead of PyTorch's changes the accuracy significantly for "
        f"{', '.join(changes)} points. The change is not significant for {', '.join(others)}; runs of "
        f"{', '.join(failing)} fail."
    )


def against_dfa(runs: pd.DataFrame, rule: str, quantity: str) -> pd.Series:
    """Return in how many nets of the depth ladder a quantity is significantly higher, and lower, than DFA's.

    `judged` is the number of nets in which no run of the two rules fails.

    runs: the runs of the depth ladder at one learning rate of each rule.
    """
    counts = pd.Series({"higher": 0, "lower": 0, "judged": 0})
    for _, net in runs[runs.rule.isin([rule, "dfa"])].groupby(["init", "depth"]):
        if net.fails.any():
            continue
        values = net[quantity]
        of_rule, of_dfa = values[net.rule == rule], values[net.rule == "dfa"]
        difference = welch(of_rule.to_numpy(), of_dfa.to_numpy())
        counts += [difference.low > 0, difference.high < 0, True]
    return counts


def depth(summary: pd.DataFrame) -> str:
    """Return the finding on depth: LAS and LTAS against DFA, and what He initialisation changes in the deepest net.

    summary: the runs of the depth ladder.
    """
    best = at_best_rate(summary)
    at_common_rate = summary[summary.lr == COMMON_LR]
    sentences = []
    judged = []
    for rule in ("las", "ltas"):
        accuracy = against_dfa(best, rule, "accuracy")
        cosine = against_dfa(at_common_rate, rule, "cosine/1")
        judged += [accuracy.judged, cosine.judged]
        sentences.append(
            f"{method_name(rule)} is significantly more accurate than DFA in {accuracy.higher} of these nets and "
            f"less accurate in {accuracy.lower}; its cosine of layer 1 at lr {COMMON_LR:g} is higher in "
            f"{cosine.higher} and lower in {cosine.lower}."
        )
    return (
        f"Bundled digits, {span_text(pd.Series(judged))} nets: {span_text(summary.depth)} hidden layers of 32 units, "
        f"two initialisations. {summary.seed.nunique()} seeds, each method at its best of {summary.lr.nunique()} rates "
        f"by validation accuracy; 95 % intervals, not corrected for their number. {' '.join(sentences)} "
        f"{what_he_changes(summary)} [All rules](outputs/reference/README.md#how-deep-each-rule-trains)."
    )


def what_learns(by_epoch: DataFrameGroupBy) -> str:
    """Return the finding on the first figure and its controls: layer 1's cosine after the first and the last epoch.

    by_epoch: the runs' cosines, grouped by method and epoch, see `reference.at_epochs`.
    """
    cosine = by_epoch["cosine/1"].mean()

    def curve(method: str) -> str:
        values = cosine.loc[method]
        return f"{values.iloc[0]:.2f} → {values.iloc[-1]:.2f}"

    fixed = "fixed_blocks=2"
    return (
        "If B starts as the product of the weights above it, as in the figure at the top, layer 1's cosine rises "
        "clearly only where the hidden layers' W and B both learn. From the first epoch to the last, mean of "
        f"{span_text(by_epoch.size())} seeds: W and B learn (LAS) {curve('las')}; only W learns (DFA) {curve('dfa')}; "
        f"only B and the output layer learn (LAS, 12 epochs) {curve(f'las, {fixed}')}. "
        "[All controls](outputs/reference/README.md#the-alignment-figure-and-its-controls)."
    )


def this_paper(runs: pd.DataFrame) -> str:
    """Return the finding on the paper's two tables: ours and its accuracies, where runs of the same length are kept."""
    chosen = choose(runs[~runs.smoke & (runs.protocol == "fair")])
    settings = chosen.groupby(paper.SETTINGS)
    ours = settings.agg(
        ours=("accuracy", "mean"), seeds=("seed", "nunique"), fails=("fails", "any")
    )
    every = paper.published()
    both = every.merge(ours[ours.seeds >= FEWEST_SEEDS].reset_index(), on=paper.SETTINGS)
    texts = []
    for _, rows in both.groupby(paper.ROWS, sort=False):
        values = []
        for row in rows.itertuples():
            our_text = "fails" if row.fails else f"{100 * row.ours:.2f}"
            values.append(f"{method_name(row.method)} {our_text} ({100 * row.published:.2f})")
        texts.append(f" {title_of(rows.iloc[0])}: {', '.join(values)}.")
    return (
        f"{len(both)} of the paper's {len(every)} accuracies are compared so far ({FEWEST_SEEDS} seeds or more, "
        "`protocol=fair`). Test accuracy in percent, the paper's in brackets."
        f"{''.join(texts)}"
    )


def other_papers(runs: pd.DataFrame) -> str:
    """Return the finding on published values: ours, the published value, and the verdict."""
    every = published(runs)
    compared = every[every.verdict.isin([AGREES, DIFFERS])]
    texts = []
    for source, rows in compared.groupby("source", sort=False):
        values = [
            f"{row.method} {row.found.partition(':')[0]} ({row.published}: {row.verdict})"
            for row in rows.itertuples()
        ]
        texts.append(f" {source}: {', '.join(values)}.")
    return (
        f"{len(compared)} of {len(every)} published values (in brackets) are compared so far."
        f"{''.join(texts)}"
    )
