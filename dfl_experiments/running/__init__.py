"""Train single runs and sweeps: building, epochs, files, locks, and the summary of a sweep."""
