#!/usr/bin/env bash
# Prints who makes the desktops: what the environment or .env chose, else local, which needs nothing but Debian.
set -euo pipefail
chosen=${PROVIDER:-}
if [ -z "$chosen" ] && [ -f .env ]; then
  chosen=$(sed -nE "s/^[[:space:]]*(export[[:space:]]+)?PROVIDER[[:space:]]*=[[:space:]]*['\"]?([A-Za-z]+).*/\2/p" .env | tail -n 1)
fi
echo "${chosen:-local}"
