"""Define the style of figures and tables: colours and printed names of methods. Also write figures to files."""

from collections.abc import Iterable, Mapping
from colorsys import hsv_to_rgb
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import matplotlib.style
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from pandas import DataFrame

from dfl_experiments.errors import UserError

# Okabe and Ito's palette for colour-blind readers.
BLACK = "#000000"
GREY = "#767676"
ORANGE = "#D55E00"
BLUE = "#0072B2"
PINK = "#CC79A7"
GREEN = "#009E73"
OLIVE = "#A69500"
LIGHT_ORANGE = "#E69F00"
SKY = "#56B4E9"
WINE = "#882255"
TEXT_GREY = "#505050"
PALETTE = (BLUE, ORANGE, GREEN, PINK, OLIVE, GREY)
LONG_DASH = (0, (8, 2))
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", LONG_DASH)


class Look(NamedTuple):
    """Colour and dash of a line, in the notation of matplotlib."""

    colour: str
    dash: Any = "-"


# The looks of the rules, in the order of tables. The paper's five come first: each has a colour of its own and, for
# grey prints, a dash that no other of the five has. Similar rules share a colour.
LOOKS = {
    "bp": Look(BLACK, "-"),
    "shallow": Look(GREY, ":"),
    "dfa": Look(ORANGE, "--"),
    "las": Look(BLUE, LONG_DASH),
    "ltas": Look(GREEN, "-."),
    "sdfa": Look(LIGHT_ORANGE, "-"),
    "bdfa": Look(LIGHT_ORANGE, "--"),
    "shared": Look(LIGHT_ORANGE, ":"),
    "drtp": Look(LIGHT_ORANGE, "-."),
    "dkp": Look(SKY, "-"),
    "fdfa": Look(SKY, "--"),
    "adfa": Look(SKY, ":"),
    "fa": Look(PINK, "-"),
    "usf": Look(PINK, "--"),
    "brsf": Look(PINK, ":"),
    "frsf": Look(PINK, "-."),
    "kp": Look(WINE, "-"),
    "wm": Look(WINE, "--"),
    "pfa": Look(WINE, ":"),
}
RULES = {"shallow": "Shallow", "shared": "shared DFA", "usf": "uSF", "brsf": "brSF", "frsf": "frSF"}
IN_WORDS = {
    "dataset": {
        "mnist": "MNIST",
        "fashion_mnist": "Fashion-MNIST",
        "cifar10": "CIFAR-10",
        "cifar100": "CIFAR-100",
        "tinyimagenet": "TinyImageNet",
    },
    "model": {
        "fc": "fully connected net",
        "fc_ln": "fully connected net with LN",
        "conv2_bn": "Conv2+BN",
        "conv3": "Conv3",
        "conv3_bn": "Conv3+BN",
        "conv3_gn": "Conv3+GN",
        "resnet18": "ResNet-18",
        "mixer": "MLP-Mixer",
        "vit": "ViT",
    },
    "augmentation": {
        "none": "no augmentation",
        "flip": "flips",
        "randaugment_cutout_flip": "RandAugment, Cutout and flips",
    },
    "optimizer": {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop"},
}
# Usual values of settings. A title names such a setting only if its value differs from the usual one.
USUAL = {
    "limit": "all",
    "precision": "float32",
    "optimizer": "adam",
    "schedule": "step",
    "protocol": "fair",
}
# None keeps dates and versions out of the files, so that the same runs give the same bytes.
METADATA: dict[str, Any] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # two long dashes
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, Type 3
    "svg.hashsalt": "dfl",
    "text.parse_math": False,  # a $ in a name does not begin a formula
}
SMALL = {"axes.titlesize": 8, "font.size": 8, "lines.linewidth": 1.3}


def method_name(method: str) -> str:
    """Return the printed name of a method, such as "LAS, fixed_blocks=2". A user's own rule keeps its name."""
    rule, comma, options = method.partition(", ")
    usual = rule.upper() if rule in LOOKS else rule
    return f"{RULES.get(rule, usual)}{comma}{options}"


def method_order(method: str) -> tuple[int, str]:
    """Return the sort key of a method: first the rules in the order of `LOOKS`, then the user's rules."""
    rules = list(LOOKS)
    rule = method.partition(", ")[0]
    return (rules.index(rule) if rule in LOOKS else len(rules)), method


def look_of(method: str) -> Look:
    """Return a method's look, which depends on its name only and is the same in every figure.

    A rule with options has a darker or lighter shade of the rule's colour, and another dash.
    """
    rule, _, options = method.partition(", ")
    look = LOOKS.get(rule) or own_look(rule)
    if not options:
        return look
    # equal options change the looks of all rules equally, so that rules of one colour keep different dashes
    number, is_lighter = divmod(crc32(options.encode()), 2)
    number, step = divmod(number, len(DASHES) - 1)
    dash = DASHES.index(look.dash) + 1 + step
    target = 1.0 if is_lighter else 0.0
    share = 0.3 + 0.03 * (number % 11)
    if rule not in LOOKS:
        # dark red: a much darker one would look like BP, a much lighter one like FA
        target, share = 1.0, share / 2
    red, green, blue = [channel + share * (target - channel) for channel in to_rgb(look.colour)]
    return Look(to_hex((red, green, blue)), DASHES[dash % len(DASHES)])


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """Return the looks of the methods of one figure.

    Shades of one colour are hard to tell apart. If two variants of a rule, or two of the user's rules, have the same
    dash, the later one in the order of tables gets another dash, as long as there is one.
    """
    looks = {}
    used: dict[str, list[Any]] = {}
    for method in sorted(set(methods), key=method_order):
        look = look_of(method)
        rule = method.partition(", ")[0]
        dashes = used.setdefault(rule if rule in LOOKS else "own", [])
        free = [dash for dash in DASHES if dash not in dashes]
        if look.dash in dashes and free:
            look = look._replace(dash=free[0])
        dashes.append(look.dash)
        looks[method] = look
    return looks


def own_look(rule: str) -> Look:
    """Return the look of a user's own rule: a shade of red and a dash, by a checksum of the name."""
    number, shade = divmod(crc32(rule.encode()), 11)
    colour = to_hex(hsv_to_rgb(0.0, 0.8, 0.45 + 0.02 * shade))
    return Look(colour, DASHES[number % len(DASHES)])


def words(column: str, value: Any) -> str:
    """Return a value of a column as a label: "lr 0.001", "20 epochs", "LAS", "widths [8,8]"."""
    if column == "method":
        return method_name(value)
    if column in IN_WORDS:
        return IN_WORDS[column].get(value, str(value))
    if column == "epochs":
        return f"{value} epoch" if value == 1 else f"{value} epochs"
    if column == "smoke":
        return "smoke test" if value else ""
    if column == "limit":
        return "" if value == "all" else f"{value} training images"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if column == "precision" or not text:
        return text
    name = column.rpartition(".")[2].replace("_", " ")
    return f"{name} {text}"


def common_words(frame: DataFrame, columns: Iterable[str]) -> list[str]:
    """Return the values that all rows share, as labels, without usual values."""
    labels = []
    for column in columns:
        value = frame[column].iloc[0]
        if frame[column].nunique() == 1 and value != USUAL.get(column):
            labels.append(words(column, value))
    return labels


def title_of(row: Mapping[str, Any]) -> str:
    """Return the net and the data set of a run, such as "Conv3 on CIFAR-10"."""
    model = words("model", row["model"])
    dataset = words("dataset", row["dataset"])
    title = f"{model} on {dataset}"
    if row["augmentation"] != "none":
        title += f" with {words('augmentation', row['augmentation'])}"
    if row["smoke"]:
        title += " (smoke test, no result)"
    if row["model"] not in IN_WORDS["model"]:
        return title  # the name of a user's own net stays as it is
    return title[0].upper() + title[1:]


def row_title(row: Mapping[str, Any]) -> str:
    """Return a setting as text: "CIFAR-10, Conv3+BN, 5 epochs"."""
    unusual = [key for key, usual in USUAL.items() if row[key] != usual]
    columns = ["dataset", "model", "epochs", *unusual]
    parts = [words(column, row[column]) for column in columns]
    parts.append(row["setting"])
    parts.append(words("smoke", row["smoke"]))
    return ", ".join(filter(None, parts))


def styled(is_small: bool = False) -> AbstractContextManager[None]:
    """Use this project's style instead of the user's matplotlibrc. is_small: for a figure in a paper."""
    style = STYLE | SMALL if is_small else STYLE
    return matplotlib.style.context(style, after_reset=True)


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure to a file. Figures of the same runs give files with the same bytes.

    Raises:
        UserError: the file's name does not end in .png, .pdf or .svg.
    """
    ending = path.suffix[1:].lower()
    if ending not in METADATA:
        raise UserError(f"{path}: a figure's file ends in .png, .pdf or .svg")
    with styled():
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=ending, dpi=dpi, metadata=METADATA[ending])
