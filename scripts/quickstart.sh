#!/usr/bin/env bash
# From nothing to a first trained network: LAS on real handwritten digits, with its accuracy and its alignment with BP.
#   bash scripts/quickstart.sh [overrides]        for example: bash scripts/quickstart.sh method=dfa seed=1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project ""
exec .venv/bin/dfl-train "$@"
