#!/usr/bin/env bash
# Install the project and train a first network with LAS on handwritten digits. It prints accuracy and alignment with BP.
#   bash scripts/quickstart.sh [overrides]        for example: bash scripts/quickstart.sh method=dfa seed=1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project ""
exec .venv/bin/dfl-train "$@"
