# Functions for the other scripts in this folder: create or reuse .venv, and install the project into it.
# PYTHON is the interpreter for a new .venv (default: the first of python3, python3.13, … that is new enough).
# `reproduce` uses the active environment in place of .venv if this folder is installed there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found (looked for ${PYTHON:-python3, python3.13, python3.12, python3.11, python}); set PYTHON=/path/to/python" >&2
    return 1
}

install_project() { # argument: the extras to install, such as "test"; may be empty
    local extras=$1 python stamp
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python)
        echo "creating .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    # the installation is slow, so it is repeated only when pyproject.toml has changed
    stamp=.venv/.installed-${extras:-plain}
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        echo "installing dfl-experiments${extras:+ with the extra \"$extras\"} (this can take some minutes, because PyTorch has several GB)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
        touch "$stamp"
    fi
}

own_python() { # print the interpreter of the user's active environment, if `pip install -e` installed this folder there
    local folder=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    [ ! "$folder" -ef .venv ] || return 1
    # -P: do not find the package because this folder is the current one
    "$folder/bin/python" -P -c 'import os, sys, dfl_experiments as d; sys.exit(os.path.relpath(d.__path__[0]) != "dfl_experiments")' \
        2>/dev/null && echo "$folder/bin/python"
}

reproduce() { # arguments: the target, then the arguments of reproduce.py
    local python extras
    if python=$(own_python); then
        exec "$python" scripts/reproduce.py "$@"
    fi
    python=.venv/bin/python
    [ -x "$python" ] || python=$(find_python)
    case " $* " in *" -h "* | *" --help "*) exec "$python" scripts/reproduce_arguments.py "$@" ;; esac
    extras=$("$python" scripts/reproduce_arguments.py "$@")  # finds a mistake before the installation, which takes minutes
    install_project "$extras"
    exec .venv/bin/python scripts/reproduce.py "$@"
}
