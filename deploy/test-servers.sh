#!/usr/bin/env bash
# Makes ready what the tests of proxies and tunnels need: nginx, Caddy and sshd, of Debian's packages. None is started,
# now or at the next boot; what is installed already is left as it is.
set -euo pipefail
needed=(nginx-light caddy openssh-server)
services=(nginx caddy ssh)
missing=() unwanted=()
command -v dpkg-query >/dev/null || exit 3
for number in "${!needed[@]}"; do
  if ! dpkg-query -W -f='${db:Status-Status}' "${needed[$number]}" 2>/dev/null | grep -qx installed; then
    missing+=("${needed[$number]}")
    unwanted+=("${services[$number]}")
  fi
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ]; then
  as=()
elif sudo -n true 2>/dev/null; then
  as=(sudo -n)
else
  echo "Tests of proxies and tunnels want these packages, and this user may not install them: ${missing[*]}" >&2
  exit 3
fi
echo "Installing Debian packages for tests: ${missing[*]}"
policy=/usr/sbin/policy-rc.d
log=$(mktemp)
made=
# shellcheck disable=SC2317
finish() {
  rm -f "$log"
  [ -z "$made" ] || "${as[@]}" rm -f "$policy"
}
trap finish EXIT
if [ ! -e "$policy" ]; then
  made=yes
  printf '#!/bin/sh\nexit 101\n' | "${as[@]}" install -m 755 /dev/stdin "$policy"
fi
if ! { "${as[@]}" apt-get update -q &&
  "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  exit 1
fi
if command -v systemctl >/dev/null; then
  "${as[@]}" systemctl disable "${unwanted[@]}" >/dev/null 2>&1 || true
fi
