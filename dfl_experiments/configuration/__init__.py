"""Turn a command line into one composed and checked configuration of a run, or of every point of a sweep."""
