"""What the mathematics needs, and nothing else: it knows no configuration, no particular method, model or data set."""
