#!/usr/bin/env bash
# Makes ready what the tests of docker and qemu desktops need: an engine that runs, our images, the guest disk; and what
# those of proxies and tunnels need. Where this user may not install or start something, it says so and the tests skip by
# name; in CI that is a failure.
set -euo pipefail
here=$(dirname "$0")
"$here/test-servers.sh" || { status=$?; [ "$status" -eq 3 ] && [ -z "${CI:-}" ] || exit "$status"; }
status=0
"$here/docker-engine.sh" || status=$?
if [ "$status" -eq 0 ]; then
  exec "$here/make-images.sh"
fi
if [ "$status" -eq 3 ] && [ -z "${CI:-}" ]; then
  echo "Tests of docker and qemu desktops will be skipped."
  exit 0
fi
exit "$status"
