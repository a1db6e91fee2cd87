"""Learning rules: which error signals start autograd, where the graph is cut, and what layers transpose with."""

from dfl_experiments.engine.method import Method
from dfl_experiments.methods.backprop import Backprop, Shallow
from dfl_experiments.methods.binary_direct import BinaryDirectFeedback
from dfl_experiments.methods.direct import Direct
from dfl_experiments.methods.direct_feedback import DirectFeedback
from dfl_experiments.methods.direct_kolen_pollack import DirectKolenPollack
from dfl_experiments.methods.feedback_alignment import FeedbackAlignment
from dfl_experiments.methods.forward_direct import ForwardDirectFeedback
from dfl_experiments.methods.jacobian_direct import ProductDirectFeedback
from dfl_experiments.methods.kolen_pollack import KolenPollack
from dfl_experiments.methods.product_feedback import ProductFeedback
from dfl_experiments.methods.sequential import Sequential
from dfl_experiments.methods.shared_direct import SharedDirectFeedback
from dfl_experiments.methods.sign_symmetry import SignSymmetry
from dfl_experiments.methods.sparse_direct import SparseDirectFeedback
from dfl_experiments.methods.target_projection import TargetProjection
from dfl_experiments.methods.weight_mirror import WeightMirror

__all__ = [
    "Backprop",
    "BinaryDirectFeedback",
    "Direct",
    "DirectFeedback",
    "DirectKolenPollack",
    "FeedbackAlignment",
    "ForwardDirectFeedback",
    "KolenPollack",
    "Method",
    "ProductDirectFeedback",
    "ProductFeedback",
    "Sequential",
    "Shallow",
    "SharedDirectFeedback",
    "SignSymmetry",
    "SparseDirectFeedback",
    "TargetProjection",
    "WeightMirror",
]
