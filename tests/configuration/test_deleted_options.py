"""An option that the command line deletes gets the default of its class, and this value is recorded."""

import pytest

import dfl_experiments as dfl


@pytest.mark.parametrize(
    ("choice", "group", "option", "value"),
    [
        ("method=las", "method", "init", "default"),
        ("method=sdfa", "method", "feedback", "conv"),
        ("model=conv3_bn", "model", "batch_norm", False),
        ("augmentation=flip", "augmentation", "flip", 0.0),
    ],
)
def test_deleted_option_is_the_same_run_as_the_default_of_its_class(choice, group, option, value):
    deleted = dfl.compose([choice, f"~{group}.{option}"])
    written = dfl.compose([choice, f"{group}.{option}={value}"])
    assert deleted.values[group][option] == value
    assert deleted.config_digest == written.config_digest
