"""Invalid command lines as typed in a shell, each with words that its refusal must contain. One or two of each kind."""

VALUES = {
    "dataset.mean=[127]": ("dataset.mean.0=127", "less than or equal to 1"),
    "dataset.mean=[0.5,0.5] dataset.std=[0.2,0.2]": (
        "dataset.mean, dataset.std: 2 values, but the images have 1 channels",
    ),
    "epochs=0": ("epochs=0", "greater than 0"),
    "threads=100000": ("threads=100000", "less than or equal to 1024"),
    "epochs=true": ("epochs=True", "valid integer"),
    "epochs=99999999999": ("epochs=99999999999", "less than 2147483648"),
    "seed=-1": ("seed=-1", "greater than or equal to 0"),
    "validation_fraction=nan": ("validation_fraction=nan", "less than 1"),
    "alignment=3": ("alignment=3", "valid dictionary"),
    "alignment.quantities=[output_cosine,weight_ratio,output_cosine]": (
        "alignment.quantities=",
        "output_cosine twice",
    ),
    "alignment.quantities=[cosine]": (
        "alignment.quantities=['cosine']",
        "there are weight_cosine, weight_cosine_pair",
    ),
    "data_dir=": ("data_dir=''", "must be the path of a folder"),
    "sweep=a/b": ("sweep='a/b'", "must be 1 to 64 letters"),
    "device=gpu": ("device='gpu'", "must be auto, cpu, mps, cuda"),
    "device=cuda:77": ("device=cuda:77", "available: cpu"),
    "optimizer.lr=nan": ("optimizer.lr=nan", "finite"),
    "optimizer.lr=1e-3x": ("optimizer.lr='1e-3x'", "valid number"),
    "optimizer.betas=[0.9]": ("optimizer.betas=[0.9]", "at least 2"),
    "optimizer.clip_norm=0": ("optimizer.clip_norm=0", "greater than 0"),
    "optimizer.feedback.lr=-1": ("optimizer.feedback.lr=-1", "greater than 0"),
    "optimizer=torch": (
        "optimizer._target_: missing; set optimizer._target_=…, for example torch.optim.NAdam",
    ),
    "optimizer=torch optimizer._target_=torch.optim.LBFGS": (
        "torch.optim.LBFGS",
        "closure",
        "NAdam",
    ),
    "optimizer=torch optimizer._target_=torch.optim.SparseAdam": (
        "optimizer: cannot be built",
        "dense gradients",
    ),
    "optimizer=torch optimizer._target_=torch.optim.NAdam +optimizer.betas=[0.9]": (
        "optimizer.betas",
        "at least 2",
    ),
    "schedule.milestones=[30,60]": ("schedule.milestones.0=30", "less than 1"),
    "schedule.warmup=1": (
        "schedule.warmup=1: one epoch or less has no effect with per=epoch; set schedule.per=iteration",
    ),
    "+schedule@schedule.feedback=cosine schedule.feedback.warmup=0.5": (
        "schedule.feedback.warmup=0.5: ",
        "set schedule.feedback.per=iteration",
    ),
    "schedule.feedback=cosine": (
        "schedule.feedback: choose it with +schedule@schedule.feedback=…, there are constant, cosine",
    ),
    "optimizer.feedback=sgd": (
        "optimizer.feedback: choose it with +optimizer@optimizer.feedback=…, there are adam",
    ),
    "+schedule@schedule.feedback=cosine schedule.feedback.warmup=3 epochs=3": (
        "schedule.feedback.warmup=3",
        "shorter than epochs=3",
    ),
    "schedule=cosine schedule.warmup=3 epochs=3": ("schedule.warmup=3", "shorter than epochs=3"),
    "optimizer=sgd optimizer.nesterov=true": (
        "optimizer.nesterov=True",
        "needs optimizer.momentum",
    ),
    "+optimizer@optimizer.feedback=sgd optimizer.feedback.nesterov=true": (
        "optimizer.feedback.nesterov=True: needs optimizer.feedback.momentum",
    ),
    "method.local_target=foo": ("method.local_target='foo'", "'logits' or 'labels'"),
    "method.name=a/b": ("method.name='a/b'", "must be 1 to 64 letters"),
    "model.widths=[]": ("model.widths=[]", "at least 1"),
    "model.widths=[256,65537]": ("model.widths.1=65537", "less than or equal to 65536"),
    "dataset=cifar10 dataset.source.classes=20": ("dataset.source.classes=20", "10 or 100"),
    "dataset.std=[0.2,0.2]": ("dataset.std=[0.2, 0.2]", "dataset.mean, which has 1"),
    "dataset.source=digits": ("dataset.source", "valid dictionary"),
    "protocol.accuracy=best_validation validation_fraction=0": (
        "protocol.accuracy",
        "set validation_fraction",
    ),
    "protocol=authors protocol.local_pooling_of.conv3=min": (
        "protocol.local_pooling_of.conv3='min'",
        "'max'",
    ),
    "tracking.project=a/b": ("tracking.project='a/b'", "must be 1 to 128 characters"),
}
NAMES = {
    "dataset=folder dataset.name=mnist dataset.source.path=x": (
        "dataset.name='mnist'",
        "this name does not belong to the data source",
    ),
    "dataset=cifar10 dataset.source.classes=100": ("dataset.name='cifar10'",),
    "resume=auto": ("resume=auto", "hydra.run.dir"),
    "repeat=auto": ("repeat=auto", "is not a run directory"),
    "resume=auto hydra.run.dir=here force=true": ("force=true", "resume continues a run"),
    "--multirun resume=auto seed=0,1": ("resume and repeat are for a single run",),
    "data_dir=~/data": ("quote a value", "\"data_dir='~/data'\""),
}
KEYS = {
    "hydra.job.chdir=true": ("hydra.job.chdir=true",),
    "--epochs=3": ("--epochs=3", "write epochs=…"),
    # unknown or missing options
    "lr=1e-3": ("lr", "did you mean optimizer.lr?"),
    "batchsize=32": ("batchsize", "did you mean batch_size?"),
    "optimizer.learning_rate=1e-3": ("optimizer.learning_rate", "did you mean optimizer.lr?"),
    "wd=0.1": ("wd", "did you mean optimizer.weight_decay?"),
    "method=LAS": ("method=LAS", "did you mean las?"),
    "--multirun optimizer.lrr=1e-3,1e-4": (
        "optimizer.lrr: no such option",
        "did you mean optimizer.lr?",
    ),
    "method=dfa method.fixed_blocks=1": (
        "method.fixed_blocks",
        "; +method.fixed_blocks=… passes it to the constructor",
    ),
    "tracking=none": ("tracking=none: there are disabled", "did you mean disabled?"),
    "optimizer=torch optimizer._target_=torch.optim.SGD optimizer.momentum=0.9": (
        "; +optimizer.momentum=… passes it to the constructor",
    ),
    "optimizer=torch optimizer._target_=torch.optim.RAdam optimizer.feedback.weight_decay=0": (
        "; +optimizer.feedback.weight_decay=… passes it to the constructor",
    ),
    "optimizer=nadam": ("; did you mean optimizer=torch optimizer._target_=torch.optim.NAdam?",),
    "schedule=cos": ("did you mean cosine?",),
    "optimizer.feedback.beta=1": ("did you mean optimizer.feedback.betas?",),
    "optimizer.milestones=[0.5]": (
        "optimizer.milestones: no such option",
        "did you mean schedule.milestones?",
    ),
    "schedule=cosine schedule.milestones=[]": ("schedule.milestones: no such option", "final"),
    "optimizer.feedback.momentum=0.9": ("optimizer.feedback.momentum: no such option",),
    "++method.held=1": ("method.held: no such option", "did you mean method.fixed_blocks?"),
    "++optimiser.lr=1": ("optimiser: no such option", "did you mean optimizer?"),
    "+method.foo=1": ("method.foo: no such option", "local_target, local_reduction, init"),
    "method=bp +method.init=kaiming": ("method.init: no such option",),
    "+model.input_shape=[1,8,8]": ("model.input_shape: no such option", "widths, activation"),
    "+dataset.foo=1": ("dataset.foo: no such option",),
    "~seed": ("seed: missing", "set seed="),
    "~dataset.mean": ("dataset.mean: missing",),
    "dataset=folder": ("dataset.source.path: missing",),
    "~method": ("method: missing", "bp, brsf, dfa"),
    "method=lass": ("method=lass", "did you mean las?", "--config-dir"),
    "plugins=[no_such_package]": ("plugins=[no_such_package]", "export PYTHONPATH=."),
    "--info --cfg job": ("--info --cfg job", "Only one of"),
    "--multirun hydra/launcher=slurm": ("hydra/launcher=slurm", "did you mean submitit_slurm?"),
    # interpolations
    "'epochs=${foo}'": ("epochs: Interpolation key 'foo' not found",),
    "'epochs=${epochs}'": ("epochs: ", "Recursive interpolation"),
    "'epochs=${oc.env:NO_SUCH_VARIABLE}'": ("NO_SUCH_VARIABLE",),
    "'hydra.run.dir=${nowhere}'": ("nowhere",),
    # not valid in Hydra's grammar
    "epochs": ("epochs: must be key=value\n",),
    "mnist": ("mnist: must be key=value; did you mean dataset=mnist?",),
    "model.widths=[256,256": ("[256,256",),
    "seed=0,1": ("seed=0,1", "--multirun"),
}
TARGETS = {
    "model._target_=os.system": (
        "model._target_=os.system",
        "must be a model defined in dfl_experiments, or in a package listed in plugins=[…]",
    ),
    "method._target_=dfl_experiments_elsewhere.B": (
        "dfl_experiments_elsewhere.B",
        "defined in dfl_experiments",
    ),
    "model._target_=dfl_experiments.models.nothing": (
        "dfl_experiments.models.nothing",
        "cannot be loaded",
    ),
    "model._target_=dfl_experiments.models.conv3.normalisation": (
        "conv3.normalisation",
        "must be a model",
    ),
    "method._target_=dfl_experiments.models.fc": (
        "dfl_experiments.models.fc",
        "engine.method.Method, defined in",
    ),
    "optimizer._target_=dfl_experiments.optimizers.OptimizerFactory": (
        "OptimizerFactory: must be an optimizer of torch.optim, or one defined in dfl_experiments, or",
        "; a plugin's optimizer may be any torch.optim.Optimizer with a parameter lr and no closure",
    ),
    "method._target_=3": (
        "method._target_=3",
        "engine.method.Method, defined in",
    ),
    "optimizer=torch optimizer._target_=NAdam": ("did you mean torch.optim.NAdam?",),
    "optimizer=torch optimizer._target_=my_optimizers.Lion": (
        "optimizer._target_=my_optimizers.Lion",
        'for code of your own, add "plugins=[my_optimizers]"',
    ),
    "~dataset.source._target_": ("dataset.source._target_: missing",),
    "model.activation={_target_:os.system,command:ls}": ("model.activation", "'relu', 'tanh'"),
    "plugins=[os] method._target_=os.system": (
        "method._target_=os.system",
        "engine.method.Method, defined in",
    ),
}
SWEEPS = {
    "--multirun 'method=glob(zzz*)'": ("method=glob(zzz*)", "no job"),
    "--multirun seed=0,1 epochs=2,x": ("epochs='x'", "in the job seed=0 epochs=x"),
    "--multirun seed=0,1 device=cpu,auto": (
        "two jobs are the same run",
        "device=cpu",
        "device=auto",
    ),
    "--multirun seed=0,1 hydra.sweep.subdir=same": (
        "hydra.sweep.subdir",
        "same",
        "seed=0",
        "seed=1",
    ),
    "--multirun seed=0 hydra.sweep.subdir=../x": (
        "hydra.sweep.subdir='../x'",
        "must be a folder inside the sweep's folder",
    ),
    "--multirun seed=0 hydra.sweep.subdir=": ("hydra.sweep.subdir=''", "inside the sweep's folder"),
    "--multirun method=bp,lass": (
        "method=lass: there are adfa",
        "did you mean las?",
        "--config-dir",
        "in the job method=lass",
    ),
    "--multirun seed=0,1 resume=here": ("resume and repeat are for a single run",),
    "--multirun seed=0,1 hydra.sweep.dir=/proc/here": ("hydra.sweep.dir=/proc/here",),
    "--multirun seed=0,1 hydra.sweep.dir=/dev/null/here": ("hydra.sweep.dir=/dev/null/here",),
    "hydra.run.dir=/dev/null/here": (
        "hydra.run.dir=/dev/null/here: cannot be made (Not a directory)",
    ),
}
REFUSED = VALUES | NAMES | KEYS | TARGETS | SWEEPS
