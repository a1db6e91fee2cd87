#!/usr/bin/env bash
# Reproduce the paper's CNN table: Conv3, Conv3+BN and ResNet-18 on CIFAR-10, CIFAR-100 and TinyImageNet.
#   bash scripts/reproduce_cnn_table.sh [--smoke] [--dry-run] [--protocol paper|authors|fair] [--seeds N] [--only WORDS] …
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
reproduce cnn_table "$@"
