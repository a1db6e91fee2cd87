"""The mathematics of training, independent of configuration, methods, models and data sets."""
