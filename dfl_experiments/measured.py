"""What is measured of every hidden layer i: the one list that options, tables and figures go by."""

# at measured iterations, of the applied signal δ_i and of δ_i^BP (engine/alignment.py)
QUANTITIES = ("cosine_sample", "cosine_batch", "norm", "norm_bp", "zeros")
# beside them where `alignment.quantities` names it, and what it is; each a function of engine/quantities.py
EXTRA_QUANTITIES = {
    "weight_cosine": "cosine of B with what backpropagation has in its place",
    "sign_agreement": "share of B's signs that are those of what backpropagation has in its place",
    "weight_ratio": "norm of B over that of what backpropagation has in its place",
    "gradient_cosine": "cosine of the weights' gradient with backpropagation's",
    "output_cosine": "cosine of the local module's prediction with the logits",
}
# at every epoch's end (running/stability.py)
STABILITY = ("activation_rms", "dead", "norm_ratio")
