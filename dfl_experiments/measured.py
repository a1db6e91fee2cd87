"""Names of the quantities that are measured for every hidden layer i. Options, tables and figures use these names."""

# Quantities of the applied signal δ_i and of δ_i^BP, measured every `alignment.every` iterations (engine/alignment.py).
QUANTITIES = ("cosine_sample", "cosine_batch", "norm", "norm_bp", "zeros")
# Quantities that are measured only if `alignment.quantities` lists them. engine/quantities.py has a function for each.
EXTRA_QUANTITIES = {
    "weight_cosine": "cosine of B with the weights that it replaces",
    "weight_cosine_pair": "cosine of the product of two neighbouring B with the weights between their layers",
    "sign_agreement": "fraction of the entries of B that have the sign of the weights that B replaces",
    "weight_ratio": "norm of B divided by the norm of the weights that it replaces",
    "gradient_cosine": "cosine of the weights' gradient with the gradient of backpropagation",
    "local_cosine": "cosine of the signal that B sends with the signal that W would send from the same δ above",
    "output_cosine": "cosine of the local module's prediction with the logits",
}
# Quantities that are measured at the end of every epoch (running/stability.py).
STABILITY = ("activation_rms", "dead", "norm_ratio")
