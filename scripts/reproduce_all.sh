#!/usr/bin/env bash
# All experiments of the paper: its two tables and its alignment figure.
#   bash scripts/reproduce_all.sh [--smoke] [--dry-run] [--protocol paper|authors|fair] [--seeds N] [--only WORDS] …
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
reproduce all "$@"
