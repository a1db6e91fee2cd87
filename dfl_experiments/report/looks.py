"""How a method looks in every figure: a colour for its family, a dash and a marker for itself."""

from typing import NamedTuple

from dfl_experiments.report.setting import options_told, rule_of

# Okabe and Ito's palette, which colour-blind readers can tell apart; a grey that shows on white and on black
FAMILIES = {
    "backpropagation": ("#808080", ("bp", "shallow")),
    "direct, B fixed": ("#D55E00", ("dfa", "sdfa", "bdfa", "shared", "drtp")),
    "direct, B learns": ("#0072B2", ("las", "ltas", "dkp", "fdfa", "adfa")),
    "through every layer, B fixed or signs of W": ("#CC79A7", ("fa", "usf", "brsf", "frsf")),
    "through every layer, B learns": ("#009E73", ("kp", "wm", "pfa")),
}
OWN_COLOUR = "#B0A000"  # of a method that is not this project's, or not as it has it
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x")
NAMES = {"shallow": "Shallow", "shared": "shared DFA", "usf": "uSF", "brsf": "brSF", "frsf": "frSF"}


class Look(NamedTuple):
    """name: as a figure has it; dash and marker: in plotly's words."""

    name: str
    colour: str
    dash: str
    marker: str


def look_of(method: str) -> Look:
    """A method's look, the same in every figure. One with options of its own looks like none of this project's."""
    base, options = options_told(method)
    name = ", ".join([NAMES.get(base, base.upper()), *options])
    for colour, members in FAMILIES.values():
        if rule_of(method) in members:
            place = members.index(rule_of(method))
            return Look(name, colour, DASHES[place], MARKERS[place])
    place = sum(method.encode()) % len(DASHES)
    return Look(name, OWN_COLOUR, DASHES[place], MARKERS[place])
