"""Write everything that is said of the kept runs: the reference page, its figures and tables, the README's counts.

    python scripts/reference.py [--runs outputs/reference] [--readme README.md]

A line of the README such as `<!-- claims -->` opens a block that this writes, up to `<!-- end -->`.
"""

import argparse
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import depth_ladder
import pandas as pd
from claims import CANNOT_RANK, CONTRADICTED, FAILS, SUPPORTED, TOO_FEW, UNDECIDED, claims, counts, picture

from dfl_experiments.report import dfl_report, frame, tables
from dfl_experiments.report.compare import cosines
from dfl_experiments.report.figures import Drawing, figures
from dfl_experiments.report.style import family_of, method_name, row_title, save

EPOCHS = (1, 12)  # of the controls
FEWEST_RULES = 4  # that a correlation is computed over
BLOCK = re.compile(r"(<!-- (\w+)[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
HEADING = re.compile(r"^(##) (.*)$", re.MULTILINE)
TOP = """# The kept runs

{count} runs, as `dfl-report` shows them. `python scripts/reference.py` writes this page from the run directories beside
it. Some ran on a GPU, some on a CPU: see `devices` in [`tables.csv`](tables.csv). The runs on CIFAR with bfloat16 used
one learning rate for all rules. At that rate DFA and LTAS fail on Conv3: the tables show the rate, not the rules at
their best.

Under way, all on one CPU core. Done: the depth ladder with PyTorch's default initialisation (2,850 runs,
`experiment=depth_digits`), and 38 of 40 runs of the stability map, a narrow Conv3 at four rates (`stability_map/`).
Next: the ladder with `model.init=kaiming`, the map with batch normalisation, seeds 1 and 2 at each best two rates.
"""


def table(frame: pd.DataFrame) -> str:
    """Return a table of texts in Markdown."""
    return f"{frame.map(tables.markdown).to_markdown(index=False, tablefmt='github', disable_numparse=True)}\n"


def claims_part(verdicts: pd.DataFrame) -> Iterator[str]:
    """Yield the claims: the picture, the counts, every verdict with its interval."""
    yield "## Claims\n"
    yield "![Claims × settings](figures/claims.png)\n"
    yield counts_sentence(verdicts)
    shown = verdicts[verdicts.verdict != TOO_FEW]
    yield table(shown[["claim", "setting", "n", "found", "verdict"]].astype(str))


def counts_sentence(verdicts: pd.DataFrame) -> str:
    """Return how often each verdict was given, in one sentence."""
    totals = counts(verdicts).sum()
    words = {
        SUPPORTED: "say that the claim is supported (✓)",
        CONTRADICTED: "that it is contradicted (✗)",
        UNDECIDED: "that it is undecided (?)",
        FAILS: "that a run fails at the rate used",
        CANNOT_RANK: "that the setting cannot rank rules (=)",
    }
    texts = [f"{totals[verdict]} {text}" for verdict, text in words.items() if verdict in totals]
    few = totals.get(TOO_FEW, 0)
    return f"Of {totals.sum() - few} verdicts {', '.join(texts)}. {few} comparisons of single runs are left out.\n"


def controls_part(runs: pd.DataFrame) -> Iterator[str]:
    """Yield layer 1's cosine of the figure's runs and its controls, after as many epochs."""
    sgd = runs[(runs.optimizer == "sgd") & (runs.dataset == "mnist") & (runs.status == "finished")]
    if sgd.empty:
        return
    yield "## Controls of the alignment figure\n"
    yield (
        "MNIST with SGD at 1e-4, mean over seeds. `fixed_blocks=2` keeps the hidden layers' W, so that only B and the "
        "head learn; `init=default` draws B anew in place of the product of the W above it.\n"
    )
    curves = frame.curves(sgd).merge(sgd[["folder", "method"]], on="folder")
    means = curves.groupby(["method", "epoch"])[["cosine/1", "test_accuracy"]].mean().unstack("epoch")
    shown = pd.DataFrame({"method": means.index.map(method_name)})
    for epoch in EPOCHS:
        shown[f"layer-1 cosine, epoch {epoch}"] = [f"{value:+.2f}" for value in means["cosine/1", epoch]]
    accuracies = 100 * means["test_accuracy", EPOCHS[-1]]
    shown[f"test accuracy, epoch {EPOCHS[-1]}, %"] = [f"{value:.1f}" for value in accuracies]
    yield table(shown)


def ladder_part(folder: Path) -> Iterator[str]:
    """Yield the depth ladder, if its summary is among the kept runs."""
    summary = folder / "depth_digits" / "summary.csv"
    if summary.exists():
        yield "## How deep each rule trains\n"
        yield (
            "Test accuracy in percent on the bundled digits, mean over 10 seeds: fully connected nets of 32 units a "
            "layer, each rule at the best of three rates by validation accuracy. Thin lines are rules, thick ones "
            "families.\n"
        )
        yield "![Accuracy, cosine and dead units against depth](depth_digits/depth.png)\n"
        yield f"{depth_ladder.markdown(pd.read_csv(summary))}\n"


def families_part(runs: pd.DataFrame) -> Iterator[str]:
    """Yield Spearman's ρ between layer 1's cosine and accuracy over rules, all of them and by family."""
    yield "## Alignment and accuracy\n"
    yield "Spearman's ρ over the rules' means at one rate (number of rules). Rules are near copies of each other.\n"
    measured = cosines(runs[~runs.smoke])
    plain = measured[measured.method.str.partition(",")[0] == measured.rule]
    plain = plain.assign(setting=[f"{row_title(row)}, lr {row.lr:g}" for _, row in plain.iterrows()])
    rows = []
    for setting, part in plain.groupby("setting"):
        means = part.groupby("rule")[["cosine/1", "accuracy"]].mean().dropna()
        if len(means) < 2 * FEWEST_RULES:
            continue
        family = means.index.map(family_of)
        row = {"setting": setting, "all rules": correlation(means)}
        row["direct"] = correlation(means[family.str.startswith("direct")])
        row["through every layer"] = correlation(means[family.str.startswith("through")])
        rows.append(row)
    yield table(pd.DataFrame(rows))


def correlation(means: pd.DataFrame) -> str:
    """Return Spearman's ρ over rules with their number, a dash for too few."""
    rho = means["cosine/1"].corr(means.accuracy, method="spearman")
    return f"{rho:+.2f} ({len(means)})" if len(means) >= FEWEST_RULES else tables.NONE


def contents(text: str) -> str:
    """Return a table of contents: a link to every heading, as GitHub names them."""
    links = []
    for _, title in HEADING.findall(text):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        links.append(f"- [{title}](#{anchor})")
    return "\n".join(links) + "\n"


def page(runs: pd.DataFrame, verdicts: pd.DataFrame, folder: Path, drawings: list[Drawing]) -> str:
    """Return the reference page. drawings: of the report, whose files are in folder/figures."""
    options = {"--format": "markdown", "--out": f"{folder}/README.md", "--figures": f"{folder}/figures"}
    asked = dfl_report.arguments([str(folder), *itertools.chain(*options.items())])
    report = dfl_report.text(runs, asked, drawings)
    body = "\n".join([*claims_part(verdicts), *controls_part(runs), *families_part(runs), *ladder_part(folder), report])
    return "\n".join([TOP.format(count=len(runs)), contents(body), body])


def readme(text: str, verdicts: pd.DataFrame) -> str:
    """Return the README with its blocks written anew."""
    blocks = {"claims": counts_sentence(verdicts)}
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}{match[3]}", text)


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/reference"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    asked = parser.parse_args()
    runs = frame.runs(asked.runs)
    verdicts = claims(runs)
    drawings = figures(runs)
    folder = asked.runs / "figures"
    shutil.rmtree(folder, ignore_errors=True)  # nothing of an earlier report stays
    dfl_report.save_all(drawings, folder, ["png"])
    save(picture(verdicts), folder / "claims.png")
    (asked.runs / "README.md").write_text(page(runs, verdicts, asked.runs, drawings))
    (asked.runs / "tables.csv").write_text(dfl_report.csv_of(runs))
    asked.readme.write_text(readme(asked.readme.read_text(), verdicts))
    print(asked.readme)


if __name__ == "__main__":
    main()
