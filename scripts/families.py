"""Families of similar rules, and their colours in the figures of the reference page."""

from dfl_experiments.report.style import GREY, LIGHT_ORANGE, PINK, SKY, WINE

FAMILIES = {
    "backpropagation": ("bp", "shallow"),
    "direct, B fixed": ("dfa", "sdfa", "bdfa", "shared", "drtp"),
    "direct, B learns": ("las", "ltas", "dkp", "fdfa", "adfa"),
    "through every layer, B fixed or signs of W": ("fa", "usf", "brsf", "frsf"),
    "through every layer, B learns": ("kp", "wm", "pfa"),
}
COLOURS = (GREY, LIGHT_ORANGE, SKY, PINK, WINE)
FAMILY_COLOURS = dict(zip(FAMILIES, COLOURS, strict=True))
FAMILY_OF = {rule: family for family, rules in FAMILIES.items() for rule in rules}
