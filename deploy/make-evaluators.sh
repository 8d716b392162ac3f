#!/usr/bin/env bash
# make-evaluators.sh PYTHON VENV: the interpreter that evaluators run in, from pinned versions. It has no envd.
set -euo pipefail
python=$1 venv=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "The evaluators need Python 3.11 or later; $python is $("$python" -V 2>&1). Set PYTHON=… to another one." >&2
  exit 1
fi
# A half-made one is made anew; the stamp beside `make` tells a whole one.
rm -rf "$venv"
if ! "$python" -m venv "$venv"; then
  rm -rf "$venv"
  printf '\nNo virtual environment could be made. On Debian:\n\n    sudo apt-get install -y python3-venv\n\n' >&2
  exit 1
fi
echo "Installing the evaluators into $venv (1.4 GB; a few minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement deploy/evaluators.txt
echo "Trying them"
PYTHONWARNINGS=ignore "$venv/bin/python" -I envd/grader/__main__.py --try
