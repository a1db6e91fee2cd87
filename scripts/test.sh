#!/usr/bin/env bash
# Run the whole test suite in .venv, which is created if needed.
#   bash scripts/test.sh [pytest arguments]       for example: bash scripts/test.sh -k laws
# Tests on MNIST, CIFAR-10 and TinyImageNet need DFL_DATA_DIR (see `dfl-data list`). They are skipped without it.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project test
# One thread per process, because the networks are tiny. One process more than cores, because some tests wait.
processes=$(.venv/bin/python -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n "$processes" "$@"
