"""Every mistake on the command line is one line naming it and the choices, before anything runs or is written."""

import sys

import pytest
from conftest import dfl_train

from dfl_experiments.train import main

REFUSED = {
    "epoch=4": "there are method, model",
    "epochs=0": "greater than 0",
    "epochs=abc": "valid integer",
    "optimizer.lr=-1": "optimizer.lr=-1",
    "optimizer.lr=nan": "optimizer.lr=nan",
    "optimizer.betas=[0.9]": "at least 2",
    "method=lass": "bp dfa las ltas shallow",
    "method.local_target=foo": "'logits' or 'labels'",
    "model.widths=[]": "at least 1",
    "model.depth=3": "activation",
    "device=gpu": "auto|cpu|mps",
    "device=cuda:77": "there are cpu",
    "+anything=1": "no such option",
    "seed=-1": "greater than or equal to 0",
    "validation_fraction=1.5": "less than 1",
    "loss=hinge": "'cross_entropy' or 'squared_error'",
    "model._target_=os.system": "dfl_experiments",
    "protocol.accuracy=best": "'last', 'best_test' or 'best_validation'",
    "dataset=mnist data_dir=nowhere": "dfl-data prepare dataset=mnist",
    "--multirun seed=0,1 epochs=2,x": "epochs='x'",
    "--multirun seed=0,1 device=cpu,auto": "two jobs are the same run",
    "--multirun seed=glob(zzz*)": "",
    "--multirun method=glob(zzz*)": "no job",
    "~seed": "seed: missing",
    "~optimizer": "optimizer: missing",
    "~dataset.mean": "dataset.mean: missing",
    "~protocol.accuracy": "protocol.accuracy: missing",
    "tracking=null": "",
    "method=null": "",
    "method=[las,dfa]": "takes one choice",
    "+dataset.foo=1": "dataset.foo: no such option",
    "+alignment.foo=1": "alignment.foo: no such option",
    "alignment=3": "",
    "dataset.std=[0]": "greater than 0",
    "dataset.mean=[nan]": "finite",
    "protocol.resnet18_skip=foo": "'cut' or 'leak'",
    "optimizer=sgd optimizer.nesterov=true": "needs optimizer.momentum",
    "tracking.project=a/b": "tracking.project",
    "method.name=a/b": "method.name",
    "dataset.source._target_=dfl_experiments.data.sources.Source": "nothing that can be built",
    "epochs=${foo}": "foo",
    "dataset=folder": "dataset.source.path",
}


@pytest.mark.usefixtures("clean_logging")
@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_one_line_before_anything_is_trained(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfl-train", *arguments.split(), "tracking=disabled"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dfl-train: error: ")
    assert REFUSED[arguments] in line
    assert not list(tmp_path.rglob("last.pt"))


def test_a_refusal_from_the_shell_has_an_exit_code_and_no_traceback(tmp_path):
    done = dfl_train(tmp_path, "optimizer.lr=abc")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dfl-train: error: optimizer.lr='abc': input should be a valid number\n"
    full = dfl_train(tmp_path, "optimizer.lr=abc", environment={"HYDRA_FULL_ERROR": "1"})
    assert full.returncode != 0
    assert "Traceback" in full.stderr
