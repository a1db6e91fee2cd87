"""Learning rules: which error signals start autograd, and where the graph is cut."""

from dfl_experiments.engine.method import Method
from dfl_experiments.methods.backprop import Backprop, Shallow
from dfl_experiments.methods.direct_feedback import DirectFeedback

__all__ = ["Backprop", "DirectFeedback", "Method", "Shallow"]
