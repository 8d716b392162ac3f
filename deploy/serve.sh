#!/usr/bin/env bash
# What `make serve` runs: the daemon, with local desktops unless the environment or .env chose a provider.
set -euo pipefail
if [ -z "${PROVIDER:-}" ] && [ "$("$(dirname "$0")/provider.sh")" = local ]; then
  export PROVIDER=local
fi
exec "${PYTHON:-python3}" -m envd serve "$@"
