#!/usr/bin/env bash
# Reproduce all experiments of the paper: two tables and the alignment figure.
#   bash scripts/reproduce_all.sh [--smoke] [--dry-run] [--protocol paper|authors|fair] [--seeds N] [--only WORDS] …
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
reproduce all "$@"
