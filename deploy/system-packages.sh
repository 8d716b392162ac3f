#!/usr/bin/env bash
# system-packages.sh [PROVIDER|all]: installs the Debian packages that desktops of that provider need (default: local),
# if any is missing and this user may install it. Otherwise prints the one line that does and stops.
set -euo pipefail
provider=${1:-local}

if ! command -v dpkg-query >/dev/null; then
  [ "$provider" = docker ] && exit 0
  echo "These desktops are made of Debian packages, and this is no Debian: run them on one, or use PROVIDER=docker." >&2
  exit 1
fi

needed=(python3-venv)
local_desktops=(
  # the desktop: X server, window manager, browser, a terminal, fonts
  xvfb xauth openbox chromium xterm fonts-dejavu-core fonts-liberation fonts-wqy-microhei
  # what runs it and what tasks call in it
  bubblewrap socat wmctrl xdotool xclip x11-xserver-utils xdg-utils
  # the accessibility tree
  dbus at-spi2-core gir1.2-atspi-2.0 python3-gi
  # pyautogui wants tkinter
  python3-tk
)
qemu_desktops=(qemu-system-x86 qemu-utils bubblewrap)
case $provider in
  local) needed+=("${local_desktops[@]}") ;;
  qemu) needed+=("${qemu_desktops[@]}") ;;
  all) needed+=("${local_desktops[@]}" "${qemu_desktops[@]}") ;;
esac
# dpkg-query fails when it does not know a package; that one is missing then.
installed=$( (dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${needed[@]}" 2>/dev/null || true) | sed -n 's/^installed //p')
missing=()
for package in "${needed[@]}"; do
  grep -qx "$package" <<<"$installed" || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

command=(apt-get install -y --no-install-recommends "${missing[@]}")
if [ "$(id -u)" -eq 0 ]; then
  as=()
elif sudo -n true 2>/dev/null; then
  as=(sudo -n)
else
  printf 'The desktops need Debian packages that are not installed, and this user may not install them. Run:\n\n' >&2
  printf '    sudo %s\n\n' "${command[*]}" >&2
  exit 1
fi

echo "Installing Debian packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { "${as[@]}" apt-get update -q && "${as[@]}" "${command[@]}"; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  printf '\nThat failed. The line was:\n\n    %s\n\n' "${command[*]}" >&2
  exit 1
fi
