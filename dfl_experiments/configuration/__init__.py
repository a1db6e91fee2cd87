"""From a command line to one composed and checked configuration of a run, or to those of a sweep's points."""
