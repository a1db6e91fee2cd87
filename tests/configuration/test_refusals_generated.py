"""Any generated configuration is accepted, or refused in one line."""

import copy

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfl_experiments.configuration.composition import compose, plain
from dfl_experiments.configuration.refusals import flat_keys
from dfl_experiments.configuration.schema import Configuration, check
from dfl_experiments.errors import UserError

VALUES = plain(
    compose(["model=conv3_bn", "dataset=cifar10", "augmentation=randaugment_cutout_flip"])
)
KEYS = [*flat_keys(VALUES), "method._target_", "method.name", "nothing", "dataset.source.nothing"]
WORDS = [
    "las",
    "auto",
    "cuda:9",
    "os.system",
    "dfl_experiments.models.fc",
    "???",
    "NaN",
    "${seed}",
    "x" * 5000,
]

scalars = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-2, 100),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


def changed(changes):
    """Return the configuration with these values at these keys. A key whose parent was replaced is skipped."""
    configuration = copy.deepcopy(VALUES)
    for key, value in changes:
        *path, last = key.split(".")
        node = configuration
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[last] = value
    return configuration


@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[*HealthCheck],
)
@given(st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=3))
def test_generated_configuration_is_accepted_or_refused_in_one_line(changes):
    message = ""
    try:
        assert isinstance(check(changed(changes)), Configuration)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 3000
