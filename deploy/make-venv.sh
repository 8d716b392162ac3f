#!/usr/bin/env bash
# make-venv.sh PYTHON VENV EXTRAS: the virtual environment with envd in it (editable), from pinned versions.
set -euo pipefail
python=$1 venv=$2 extras=$3

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "envd needs Python 3.11 or later; $python is $("$python" -V 2>&1). Set PYTHON=… to another one." >&2
  exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
  if ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    printf '\nNo virtual environment could be made. On Debian:\n\n    sudo apt-get install -y python3-venv\n\n' >&2
    exit 1
  fi
fi
echo "Installing Python packages into $venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable ".[$extras]"
