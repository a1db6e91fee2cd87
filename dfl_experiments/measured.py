"""Names of the quantities measured for every hidden layer i, as options, tables and figures use them."""

# of the applied signal δ_i and of δ_i^BP, at measured iterations (engine/alignment.py)
QUANTITIES = ("cosine_sample", "cosine_batch", "norm", "norm_bp", "zeros")
# measured too where `alignment.quantities` names them; each is a function in engine/quantities.py
EXTRA_QUANTITIES = {
    "weight_cosine": "cosine of B with the weights that it replaces",
    "sign_agreement": "share of entries of B that have the sign of the weights that B replaces",
    "weight_ratio": "norm of B over the norm of the weights that it replaces",
    "gradient_cosine": "cosine of the weights' gradient with the gradient of backpropagation",
    "output_cosine": "cosine of the local module's prediction with the logits",
}
# at the end of every epoch (running/stability.py)
STABILITY = ("activation_rms", "dead", "norm_ratio")
