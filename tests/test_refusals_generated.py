"""The law of refusals on generated command lines: accepted with settings, or one line and code 2; nothing is left."""

import contextlib
import io
import json
import os
import tempfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfl_experiments.command_line import accepted
from dfl_experiments.config import compose
from dfl_experiments.messages import flat_keys
from dfl_experiments.settings import Settings
from dfl_experiments.sweep import Sweep

KEYS = [*flat_keys(compose([])), "method._target_", "method.name", "experiment", "hydra.run.dir", "hydra.job.name"]
INTERPOLATIONS = [
    "${epochs}",
    "${optimizer}",
    "${nowhere}",
    "${now:%Y}",
    "${oc.env:HOME}",
    "${a",
    "${x:${seed}}",
    "${}",
]
WORDS = [
    "las",
    "conv3",
    "cifar10",
    "auto",
    "cuda:9",
    "os.system",
    "???",
    "null",
    "NaN",
    "1_000",
    "0x10",
    "1e400",
    "-0.",
]

scalars = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-2, 100),
    st.floats(),
    st.floats(0, 1),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
names = st.text("ab_1.", max_size=3)
nested = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=2)),
    max_leaves=6,
)


def written(value: object) -> str:
    """A value in the notation of Hydra's command line, as far as there is one for it."""
    if isinstance(value, list):
        return f"[{','.join(written(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    return value if isinstance(value, str) else "null" if value is None else str(value).lower()


values = st.one_of(
    nested.map(written),
    nested.map(json.dumps),
    st.text(max_size=12),
    st.text("[]{}()'\"\\,:=$ 0a\t", max_size=10),
    st.sampled_from(INTERPOLATIONS),
    st.sampled_from("[{'\"").flatmap(lambda character: st.integers(1, 300).map(lambda times: character * times)),
)
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), st.text(max_size=10), st.text("abc._@/", max_size=8))
anything = st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), keys, st.just("="), values).map("".join)
right = st.sampled_from(
    ["method=dfa", "model=conv3", "dataset=mnist", "epochs=2", "seed=7", "limit=null", "loss=squared_error"]
)
overrides = st.one_of(anything, right)


@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.booleans(), st.lists(overrides, min_size=1, max_size=3))
def test_a_command_line_is_accepted_or_refused_in_one_line(multirun, arguments):
    said, code = io.StringIO(), None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stderr(said):
        try:
            found = accepted(["--multirun"] * multirun + arguments)
        except SystemExit as end:
            code = end.code
        assert os.listdir(folder) == []
    if code is None:
        assert said.getvalue() == ""
        assert isinstance(found, Sweep if multirun else Settings)
    else:
        assert code == 2
        (line,) = said.getvalue().splitlines()
        assert len(line) > len("dfl-train: error: ")
        assert line.startswith("dfl-train: error: ")
