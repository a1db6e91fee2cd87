"""Tables as text: the text of a value, the explanations of columns, and the output formats."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from html import escape

from pandas import DataFrame, Series
from tabulate import LATEX_ESCAPE_RULES, tabulate

from dfl_experiments.report.style import method_name

NONE = "–"
MARK = "Marked: the highest mean test accuracy of the setting."
# Characters that are Markdown syntax. A link is disabled by escaping its ]. A _ inside a word is not syntax.
MARKDOWN_SYNTAX = re.compile(r"[\\`*<&|~]|(?<!\w)_|_(?!\w)|\](?=[(\[])")
MINUS = re.compile(r"(?<![\w-])-(?=\d)")  # a hyphen that is a minus sign
LATEX_SYMBOLS = {
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "‖": r"$\|$",
    "δ": r"$\delta$",
    "₁": "$_1$",
    "√": r"$\surd$",
}
# Explanations of columns, by the first word of their names. A report ends with those of the columns in its tables.
EXPLANATIONS = {
    "accuracy": (
        "Accuracy: test accuracy in percent, as the protocol reports it; mean over n seeds ± sample standard "
        "deviation. Each method is shown at its best learning rate on the validation set. If there is no validation "
        "set, the rate is chosen on the test set, and the accuracy is biased upwards. A rate with a failing run is "
        "used only if every rate has one. A rate at which all runs fail is used only if all runs fail at every rate. "
        "The noise floor is the standard error of one accuracy p on N test images."
    ),
    "n": (
        "Failing runs: a run fails if it diverges (its loss is NaN or infinite), if it collapses (no unit of the last "
        "hidden layer is active), or if it fails to learn: its last accuracy is below 0.8 × its own best test "
        "accuracy, or at chance, which is the share of the most frequent class. A method with failing runs ranks below "
        "all others; its means are over the runs that did not fail."
    ),
    "minus": (
        "Minus BP, minus DFA: differences of the means in percentage points, with simultaneous 95 % confidence "
        "intervals by Dunnett's many-to-one comparison. A difference is significant if its interval excludes 0. (W) "
        "marks Welch's t interval, used if the standard deviation of one of the two methods is over 3 times that of "
        "the others; it is not simultaneous. An interval needs 2 runs of each of the two methods, and 6 degrees of "
        "freedom: the number of all runs of the setting minus the number of its methods."
    ),
    "depth": (
        "Depth utility: (accuracy − Shallow) / (BP − Shallow), each at its own best rate. 0 %: equal to a net whose "
        "lower layers are not trained; 100 %: equal to BP. Intervals by Fieller's theorem, for 3 seeds or more. A "
        "setting cannot rank rules if BP is not significantly above Shallow."
    ),
    "layer": (
        "Cosine: between the method's error signal and BP's, mean over the last epoch. It depends on the learning "
        "rate: compare methods at one rate only. It is left out where the signal equals BP's by construction, and "
        "where more than half of the samples have a zero signal."
    ),
    "dead": (
        "Dead: share of ReLU units that are 0 for all images. A run is unstable if over 95 % of the units in the last "
        "hidden layer are dead, or if the activations (rms) of a layer are 50 times those after the first epoch."
    ),
}
SMOKE = "A smoke run tests the pipeline on a few images; its accuracy is not a result."


@dataclass
class Table:
    """A table of a report."""

    title: str
    frame: DataFrame
    """The texts of the cells, by column."""
    note: str = ""
    """Text below the table; empty: no text."""
    best: Sequence[bool] = ()
    """Rows to mark as best."""
    comparison: str = ""
    """Sentences that compare the rows. They stand before the note."""

    @property
    def caption(self) -> str:
        """The comparison and the note."""
        return " ".join(filter(None, [self.comparison, self.note]))

    def only(self, rule: str) -> "Table":
        """Return the table with only the rows of one rule. No row is marked as best, and there is no comparison.

        A column that contains only dashes is left out, for example the differences of the rule from itself.
        """
        is_shown = self.frame.method.str.partition(", ")[0] == method_name(rule)
        shown = self.frame[is_shown]
        has_values = (shown != NONE).any()
        return Table(self.title, shown.loc[:, has_values], self.note)


def explanations(columns: Collection[str], has_smoke: bool) -> list[str]:
    """Return the explanations of these columns. If there are smoke runs, also explain what a smoke run is."""
    words = {re.split(r"\W", column)[0] for column in columns}
    sentences = [sentence for word, sentence in EXPLANATIONS.items() if word in words]
    return [*sentences, SMOKE] if has_smoke else sentences


def numbers(values: Series, style: str) -> Series:
    """Return numbers as texts. NaN becomes a dash."""
    texts = [NONE if math.isnan(value) else f"{value:{style}}" for value in values]
    return Series(texts, values.index, dtype=object)


def interval_text(
    value: float, low: float, high: float, test: str = "", style: str = "+.2f"
) -> str:
    """Return a value and its interval in percent: "+0.12 [-0.10, +0.34]", or "+0.12" if there is no interval."""
    if math.isnan(value):
        return NONE
    text = f"{100 * value:{style}}"
    if not math.isnan(low):
        text += f" [{100 * low:{style}}, {100 * high:{style}}]"
    return f"{text} (W)" if test == "Welch" else text


def markdown(text: str) -> str:
    """Escape Markdown syntax in a line of text."""
    return MARKDOWN_SYNTAX.sub(r"\\\g<0>", text)


def latex(text: str) -> str:
    """Escape LaTeX syntax in a text. A hyphen before a number becomes a minus sign."""
    text = MINUS.sub("−", text)
    return text.translate(str.maketrans(LATEX_ESCAPE_RULES | LATEX_SYMBOLS))


# for each format: the function that escapes its syntax, the template that marks the best method, tabulate's name
FORMATS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "terminal": (str, "{} *", "simple"),
    "markdown": (markdown, "**{}**", "github"),
    "latex": (latex, r"\textbf{{{}}}", "latex_raw"),
    "html": (escape, "<b>{}</b>", "unsafehtml"),
}


def write(table: Table, format_name: str) -> str:
    """Return a table as text in one of the `FORMATS`."""
    escaped, mark, tabulate_name = FORMATS[format_name]
    texts = table.frame.map(escaped)
    if len(table.best):
        texts["method"] = texts.method.mask(table.best, texts.method.map(mark.format))
    heads = [escaped(head) for head in texts.columns]
    text = tabulate(texts.to_numpy().tolist(), heads, tabulate_name, disable_numparse=True)
    for rule in ("toprule", "midrule", "bottomrule"):
        text = text.replace(r"\hline", rf"\{rule}", 1)  # only LaTeX has them
    return text
