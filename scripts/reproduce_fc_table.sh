#!/usr/bin/env bash
# Reproduce the paper's FC table: five methods on MNIST, CIFAR-10 and CIFAR-100.
#   bash scripts/reproduce_fc_table.sh [--smoke] [--dry-run] [--protocol paper|authors|fair] [--seeds N] [--only WORDS] …
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
reproduce fc_table "$@"
