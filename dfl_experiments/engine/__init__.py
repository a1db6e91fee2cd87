"""The mathematics of training. It knows no configuration, and no particular method, model or data set."""
