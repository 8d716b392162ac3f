#!/usr/bin/env bash
# Looks whether EC2 desktops can be launched, then runs the daemon with them: deploy/aws/start-aws.sh [--unchecked] [options of `envd serve`]
# Settings come from the environment and from .env in this folder. On EC2 what is not set of region, subnet and security
# group is this host's; the line `place` says which were set and which were found.
set -euo pipefail
export PROVIDER=aws
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=$(dirname "$0")/../../.venv/bin/python
  [ -x "$python" ] || python=python3
fi
if [ "${1:-}" = --unchecked ]; then
  shift
elif ! "$python" -m envd aws check; then
  echo "envd is not started. Put right what failed; or start it all the same: $0 --unchecked $*" >&2
  exit 78
fi
exec "$python" -m envd serve "$@"
