#!/usr/bin/env bash
# Makes sure that a Docker engine runs here: installs Debian's and starts it, where this user may. Prints what it did.
# Ends with 3 where an engine cannot be had by this user, who then is told what to run; with 1 where it should have worked.
set -euo pipefail

socket=${DOCKER_HOST:-unix:///var/run/docker.sock}
log=${ENVD_DOCKER_LOG:-/var/log/dockerd.log}
wait_seconds=60

say() { echo "docker: $*" >&2; }
cannot() { say "$1"; say "Run: $2"; exit 3; }
answers() { docker --host "$socket" version >/dev/null 2>&1; }

if [[ $socket != unix://* ]]; then
  cannot "DOCKER_HOST=$socket is not an engine of this host." "unset DOCKER_HOST"
fi
path=${socket#unix://}

if command -v docker >/dev/null && answers; then
  exit 0
fi
if [ "$(id -u)" -eq 0 ]; then
  as=()
elif sudo -n true 2>/dev/null; then
  as=(sudo -n)
else
  as=(no)
fi

if ! command -v docker >/dev/null || ! PATH=$PATH:/usr/sbin:/usr/local/sbin command -v dockerd >/dev/null; then
  command=(apt-get install -y --no-install-recommends docker.io)
  command -v apt-get >/dev/null || cannot "There is no engine, and this is no Debian." "see docs.docker.com/engine/install"
  [ "${as[*]}" = no ] && cannot "There is no engine, and this user may not install one." "sudo ${command[*]}"
  say "installing Debian's engine"
  output=$(mktemp)
  trap 'rm -f "$output"' EXIT
  if ! { "${as[@]}" apt-get update -q && "${as[@]}" env DEBIAN_FRONTEND=noninteractive "${command[@]}"; } >"$output" 2>&1; then
    tail -n 20 "$output" >&2
    say "That failed. The line was: ${command[*]}"
    exit 1
  fi
  answers && { say "an engine runs"; exit 0; }
fi

if [ -S "$path" ] && [ ! -w "$path" ]; then
  cannot "An engine is there, and this user may not use it." "sudo usermod -aG docker $(id -un), and log in again"
fi
if [ "$path" != /var/run/docker.sock ] && [ "$path" != /run/docker.sock ]; then
  cannot "No engine answers at $socket." "whatever starts that one, or unset DOCKER_HOST"
fi
[ "${as[*]}" = no ] && cannot "The engine does not run, and this user may not start it." "sudo systemctl start docker"

if [ -d /run/systemd/system ]; then
  say "starting the service"
  "${as[@]}" systemctl start docker || { say "That failed: journalctl -u docker tells why."; exit 1; }
else
  say "starting dockerd, which writes to $log"
  "${as[@]}" sh -c 'PATH=$PATH:/usr/sbin:/usr/local/sbin setsid dockerd >>"$1" 2>&1 </dev/null &' sh "$log"
fi

deadline=$((SECONDS + wait_seconds))
until answers; do
  if [ $SECONDS -ge $deadline ]; then
    say "The engine did not answer within $wait_seconds s."
    [ -r "$log" ] && tail -n 20 "$log" >&2
    exit 1
  fi
  sleep 0.2
done
say "an engine runs: $(docker --host "$socket" version --format '{{.Server.Version}}')"
