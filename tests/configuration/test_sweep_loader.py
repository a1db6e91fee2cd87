"""The quick composition of a sweep's jobs is Hydra's own."""

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from dfl_experiments.configuration.composition import CONF_DIR
from dfl_experiments.configuration.sweep_loader import use_quick_compositions

JOBS = [
    [],
    ["seed=1", "optimizer.lr=0.1"],
    ["optimizer.lr=0.1", "optimizer=sgd", "method=dfa", "method.init=kaiming_uniform"],
    ["experiment=fc_mnist", "model.widths=[3,4]", "++method.extra=1", "dataset=mnist"],
    ["+new=1", "new=2", "~stop_untrainable", "seed=3"],
    ["method={init: product}", "hydra.job.name=mine", "protocol=paper", "epochs=3"],
    ["+tracking@elsewhere=disabled", "seed=4"],
]


@pytest.fixture
def compositions():
    """Hydra's way, ours, and the configuration of a sweep."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        loader = GlobalHydra.instance().config_loader()
        flags = ["hydra.sweep.subdir=${hydra.job.num}", "hydra.job.config.override_dirname.exclude_keys=[seed]"]
        sweep = loader.load_configuration("config", [*flags, "seed=0,1"], RunMode.MULTIRUN)
        yield loader.load_sweep_config, use_quick_compositions(), sweep


@pytest.mark.parametrize("job", JOBS, ids=" ".join)
def test_a_job_is_composed_as_hydra_composes_it(job, compositions):
    hydras, ours, sweep = compositions
    for _ in range(2):  # the second time from what was kept
        expected, found = (compose(sweep, list(job)) for compose in (hydras, ours))
        assert OmegaConf.to_container(found, resolve=False) == OmegaConf.to_container(expected, resolve=False)
        assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)


@pytest.mark.parametrize("job", [["sede=1"], ["method=nothing"], ["seed=1", "optimizer.lr.x=2"]], ids=" ".join)
def test_what_hydra_refuses_is_refused_in_its_words(job, compositions):
    *ways, sweep = compositions
    said = []
    for compose in ways:
        with pytest.raises(HydraException) as error:
            compose(sweep, list(job))
        said.append(str(error.value))
    assert said[0] == said[1]
