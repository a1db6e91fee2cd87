#!/usr/bin/env bash
# The paper's alignment figure: cosine of DFA's, LAS's and LTAS's error signals with BP's, on MNIST.
#   bash scripts/reproduce_alignment_figure.sh [--smoke] [--dry-run] [--protocol paper|authors|fair] [--seeds N] [--only WORDS] …
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
reproduce alignment_figure "$@"
