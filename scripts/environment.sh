# The scripts beside this file source it. It makes or reuses .venv, and installs the project into it, with the extras in $1.
# PYTHON is the interpreter for .venv (default: the first of python3, python3.13, … that is new enough).
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

install_project() {
    local extras=$1 python stamp
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python)
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    # installing again is slow, and needed only when pyproject.toml has changed
    stamp=.venv/.installed-${extras:-plain}
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        echo "installing dfl-experiments${extras:+ with the extra \"$extras\"} (PyTorch is large: this can take some minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
        touch "$stamp"
    fi
}

reproduce() { # arguments: the target, then the arguments of the script
    local python extras
    python=.venv/bin/python
    [ -x "$python" ] || python=$(find_python)
    case " $* " in *" -h "* | *" --help "*) exec "$python" scripts/reproduce_arguments.py "$@" ;; esac
    extras=$("$python" scripts/reproduce_arguments.py "$@")  # refuse a mistake before the installation, which takes minutes
    install_project "$extras"
    exec .venv/bin/python scripts/reproduce.py "$@"
}
