"""Learning rules. Each defines where the graph is cut, which error signals start there, and what replaces Wᵀ."""

from dfl_experiments.engine.method import Method as Method
from dfl_experiments.methods.backprop import Backprop as Backprop
from dfl_experiments.methods.backprop import Shallow as Shallow
from dfl_experiments.methods.binary_direct import BinaryDirectFeedback as BinaryDirectFeedback
from dfl_experiments.methods.direct import Direct as Direct
from dfl_experiments.methods.direct_feedback import DirectFeedback as DirectFeedback
from dfl_experiments.methods.direct_kolen_pollack import DirectKolenPollack as DirectKolenPollack
from dfl_experiments.methods.feedback_alignment import FeedbackAlignment as FeedbackAlignment
from dfl_experiments.methods.forward_direct import ForwardDirectFeedback as ForwardDirectFeedback
from dfl_experiments.methods.jacobian_direct import ProductDirectFeedback as ProductDirectFeedback
from dfl_experiments.methods.kolen_pollack import KolenPollack as KolenPollack
from dfl_experiments.methods.product_feedback import ProductFeedback as ProductFeedback
from dfl_experiments.methods.sequential import Sequential as Sequential
from dfl_experiments.methods.shared_direct import SharedDirectFeedback as SharedDirectFeedback
from dfl_experiments.methods.sign_symmetry import SignSymmetry as SignSymmetry
from dfl_experiments.methods.sparse_direct import SparseDirectFeedback as SparseDirectFeedback
from dfl_experiments.methods.target_projection import TargetProjection as TargetProjection
from dfl_experiments.methods.weight_mirror import WeightMirror as WeightMirror
