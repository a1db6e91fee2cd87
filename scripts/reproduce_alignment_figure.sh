#!/usr/bin/env bash
# Reproduce the paper's alignment figure: cosine of the error signals of DFA, LAS and LTAS with BP's, on MNIST.
#   bash scripts/reproduce_alignment_figure.sh [--smoke] [--dry-run] [--protocol paper|authors|fair] [--seeds N] [--only WORDS] …
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
reproduce alignment_figure "$@"
