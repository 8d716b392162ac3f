#!/usr/bin/env bash
# install.sh: envd as a service of this host, from this checkout. Run it again after an update of the checkout, or to see
# that all is as it should be: what is there already is left alone, and it says what it changed.
#
#   sudo deploy/install.sh [--provider docker|aws|local|qemu|sim] [--image NAME] [--host ADDRESS] [--port NUMBER]
#                          [--evaluators] [--no-start]
#   sudo deploy/install.sh --uninstall [--purge]
#
#   --provider    who makes the desktops; docker, unless the settings file says otherwise
#   --image       what docker desktops are made of: envd/desktop (default), envd/qemu, or any other
#   --host        address to listen on; 0.0.0.0 by default, which takes a token from everybody
#   --port        15001 by default
#   --evaluators  also what judges episodes (1.4 GB)
#   --no-start    do not start it
#   --uninstall   remove the service, its programs and its desktops; settings, tokens and state stay
#   --purge       remove these too, and the user
#
# It was tried on Debian 12. Ubuntu from 22.04 on has what it takes, too, but for `local` desktops: its Chromium is a snap.
#
#   /opt/envd/venv         link to the release that runs; the one before is kept beside it
#   /etc/envd/envd.env     settings, NAME=VALUE; yours: written once, and added to by --evaluators alone
#   /etc/envd/tokens       who may use it: NAME SCOPE TOKEN; root's alone, the service gets it as a credential
#   /var/lib/envd          what outlives the daemon;  /var/cache/envd  downloads
set -euo pipefail
umask 022

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefix=/opt/envd
settings=/etc/envd/envd.env
tokens=/etc/envd/tokens
state=/var/lib/envd
cache=/var/cache/envd
unit=/etc/systemd/system/envd.service
dropin=$unit.d/provider.conf
command=/usr/local/bin/envd
user=envd
ready_seconds=60

provider= image= host= port= evaluators=no start=yes mode=install purge=no
changed=no restart=no stopped=no

main() {
  read_arguments "$@"
  [ "$(id -u)" -eq 0 ] || fail "This needs root. Run: sudo $0 $*"
  exec 9>/run/envd-install.lock
  flock -n 9 || fail "Another install.sh runs on this host."
  if [ "$mode" = uninstall ]; then
    uninstall
    return
  fi
  command -v apt-get >/dev/null || fail "There is no apt-get here: this installs on Debian 12 or later and Ubuntu 22.04 or later."
  choose_provider
  [ -s "$tokens" ] || [ ! -e "$tokens" ] || fail "$tokens is empty. Remove it, and a token is made."
  install_packages
  make_user
  make_token
  make_settings
  make_release
  make_evaluators
  make_images
  install_unit
  switch_release
  run_it
}

read_arguments() {
  while [ $# -gt 0 ]; do
    case $1 in
    --provider | --image | --host | --port)
      [ $# -gt 1 ] || fail "$1 needs a value."
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --provider=* | --image=* | --host=* | --port=*)
      local name=${1%%=*}
      printf -v "${name#--}" %s "${1#*=}"
      ;;
    --evaluators) evaluators=yes ;;
    --no-start) start=no ;;
    --uninstall) mode=uninstall ;;
    --purge) purge=yes ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) fail "There is no option $1. See $0 --help." ;;
    esac
    shift
  done
  [ "$purge" = no ] || [ "$mode" = uninstall ] || fail "--purge goes with --uninstall."
  [[ $port =~ ^[0-9]*$ ]] || fail "--port $port is no number."
  [[ $host$image != *[[:space:]\'\"\\]* ]] || fail "An address and an image have no blanks or quotes in them."
}

# -- what it is to be -------------------------------------------------------------------------------------------------

# setting NAME: what the settings file says, empty if nothing.
setting() {
  [ ! -f "$settings" ] || sed -nE "s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*['\"]?([^'\"]*)['\"]?[[:space:]]*\$/\1/p" "$settings" | tail -n 1
}

# wanted OPTION NAME GIVEN DEFAULT: prints what is used. A settings file that is there decides; saying otherwise is an error.
wanted() {
  local kept
  kept=$(setting "$2")
  if [ -f "$settings" ] && [ -n "$3" ] && [ "$3" != "${kept:-$4}" ]; then
    fail "$settings says $2=${kept:-$4 (the default)}, and $1 $3 was asked for. Change that file; this script does not."
  fi
  echo "${kept:-${3:-$4}}"
}

choose_provider() {
  provider=$(wanted --provider PROVIDER "$provider" docker)
  if [ "$provider" = docker ]; then
    # What the daemon takes where a file of yours says nothing is not what a new file says.
    local otherwise=envd/desktop
    [ ! -f "$settings" ] || otherwise=happysixd/osworld-docker
    image=$(wanted --image ENVD_DOCKER_IMAGE "$image" "$otherwise")
  fi
  local anywhere=0.0.0.0
  [ ! -f "$settings" ] || anywhere=127.0.0.1
  host=$(wanted --host ENVD_HOST "$host" "$anywhere")
  port=$(wanted --port ENVD_PORT "$port" 15001)
  case $provider in
  docker | aws | local | qemu | sim) ;;
  *) fail "There is no provider $provider: docker, aws, local, qemu or sim." ;;
  esac
}

# -- what it is made of -----------------------------------------------------------------------------------------------

install_packages() {
  find_python
  case $provider in
  docker)
    "$project/deploy/docker-engine.sh" || fail "There is no Docker engine that could be used; see above."
    ;;
  local | qemu)
    "$project/deploy/system-packages.sh" "$provider"
    ;;
  esac
}

# $python: 3.11 or later, with venv. Installs one where the distribution has it.
find_python() {
  local each
  for each in python3 python3.13 python3.12 python3.11; do
    if command -v "$each" >/dev/null && "$each" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$(command -v "$each")
      return
    fi
  done
  local packages=(python3-venv)
  # Ubuntu 22.04 has 3.10 as python3, and 3.11 beside it.
  if [ "$(version_id)" = 22.04 ]; then packages=(python3.11-venv); fi
  apt_install "${packages[@]}"
  for each in python3 python3.11; do
    if command -v "$each" >/dev/null && "$each" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$(command -v "$each")
      return
    fi
  done
  fail "envd needs Python 3.11 or later, and this distribution has none: Debian 12 or later, Ubuntu 22.04 or later have."
}

version_id() {
  # shellcheck disable=SC1091
  (. /etc/os-release 2>/dev/null && echo "${VERSION_ID:-}") || true
}

apt_install() {
  say "installing Debian packages: $*"
  changed=yes
  quietly "These packages could not be installed: $*" sh -c \
    'apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"' sh "$@"
}

make_user() {
  id "$user" >/dev/null 2>&1 && return
  say "making the user $user"
  changed=yes
  getent group kvm >/dev/null || groupadd --system kvm # where udev has not made it
  useradd --system --user-group --home-dir "$state" --shell /usr/sbin/nologin "$user"
}

make_token() {
  [ -e "$tokens" ] && return
  say "making a token; it is in $tokens, and nowhere else"
  changed=yes
  install -d -m 755 /etc/envd
  (umask 077 && {
    echo '# Who may use envd, one to a line: NAME SCOPE TOKEN, with the scope read, play or admin.'
    printf 'admin admin %s\n' "$("$python" -c 'import secrets; print(secrets.token_hex(32))')"
  } >"$tokens.new")
  mv "$tokens.new" "$tokens"
}

make_settings() {
  [ -e "$settings" ] && return
  say "writing $settings"
  changed=yes
  install -d -m 755 /etc/envd
  (umask 077 && {
    echo "# Settings of envd, NAME=VALUE; the table is at /docs/settings. After a change: systemctl restart envd"
    echo "PROVIDER=$provider"
    if [ "$provider" = docker ]; then echo "ENVD_DOCKER_IMAGE=$image"; fi
    echo "ENVD_HOST=$host"
    echo "ENVD_PORT=$port"
    echo "#ENVD_ENVS=1"
    if [ "$provider" = aws ]; then echo "#AWS_REGION="; echo "#AWS_SUBNET_ID="; echo "#AWS_SECURITY_GROUP_ID="; fi
  } >"$settings.new")
  mv "$settings.new" "$settings"
}

# $release: a virtual environment with this checkout's envd, made of the pinned versions. The one that runs is untouched.
make_release() {
  local extras=aws,docker,qemu
  if [ "$provider" = local ]; then extras=agent,$extras; fi
  local content
  content=$( (echo "$extras" && "$python" -V && content_of envd pyproject.toml constraints.txt) | sha256sum | cut -c1-12)
  release=$prefix/releases/$content
  [ -e "$release/complete" ] && return
  say "installing envd from $project into $release (it takes a minute)"
  changed=yes
  rm -rf "$release"
  install -d -m 755 "$prefix" "$prefix/releases"
  quietly "No virtual environment could be made." "$python" -m venv "$release"
  # Nothing is written into the checkout for that, which may be somebody else's.
  quietly "The Python packages could not be installed." "$release/bin/python" -m pip install \
    --disable-pip-version-check --constraint "$project/constraints.txt" "$project[$extras]"
  "$release/bin/envd" version >/dev/null || fail "$release/bin/envd does not run."
  touch "$release/complete"
}

# content_of PATH...: a hash of the files there, in the project.
content_of() {
  (cd "$project" && find "$@" -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum)
}

make_evaluators() {
  [ "$evaluators" = yes ] || return 0
  local content
  content=$(content_of deploy/evaluators.txt | sha256sum | cut -c1-12)
  if [ "$(cat "$prefix/evaluators/made-of" 2>/dev/null)" != "$content" ]; then
    changed=yes
    (cd "$project" && deploy/make-evaluators.sh "$python" "$prefix/evaluators")
    echo "$content" >"$prefix/evaluators/made-of"
  fi
  if [ -z "$(setting ENVD_EVALUATORS)" ]; then
    say "naming the evaluators in $settings"
    changed=yes restart=yes
    echo "ENVD_EVALUATORS=$prefix/evaluators/bin/python" >>"$settings"
  fi
}

# Our own images are made of Debian packages; any other is the engine's or ENVD_PULL's business.
make_images() {
  [ "$provider" = docker ] || return 0
  local parts=()
  case $image in
  envd/desktop | envd/desktop:latest) parts=(desktop) ;;
  envd/qemu | envd/qemu:latest) parts=(qemu guest-disk) ;;
  *) return 0 ;;
  esac
  if [ "${parts[0]}" = desktop ] && docker image inspect "$image" >/dev/null 2>&1; then return; fi
  if [ "${parts[0]}" = qemu ] && docker image inspect "$image" >/dev/null 2>&1 &&
    { [ -n "$(setting ENVD_VM_DISK)" ] || [ -s "$cache/images/guest-disk.qcow2" ]; }; then return; fi
  say "making $image (it takes minutes)"
  changed=yes
  install -d -m 755 -o "$user" -g "$user" "$cache"
  ENVD_CACHE=$cache PYTHON=$release/bin/python "$project/deploy/make-images.sh" "${parts[@]}"
  chown -R "$user:$user" "$cache"
}

# -- the service ------------------------------------------------------------------------------------------------------

install_unit() {
  place "$project/deploy/envd.service" "$unit"
  case $provider in
  docker)
    if [ -e "$dropin" ]; then
      say "removing $dropin"
      rm -f "$dropin"
      restart=yes changed=yes
    fi
    ;;
  local | qemu) place "$project/deploy/unit.d/$provider.conf" "$dropin" ;;
  *) place "$project/deploy/unit.d/without-docker.conf" "$dropin" ;;
  esac
  if systemd_runs && [ "$restart" = yes ]; then systemctl daemon-reload; fi
}

# place SOURCE TARGET
place() {
  cmp -s "$1" "$2" && return
  say "writing $2"
  install -D -m 644 "$1" "$2"
  restart=yes changed=yes
}

switch_release() {
  if [ "$(readlink "$prefix/venv")" = "$release" ]; then
    [ "$restart" = no ] || ! is_active || stop_it
  else
    if is_active; then stop_it; fi
    # What was installed by hand before is kept beside.
    if [ -e "$prefix/venv" ] && [ ! -L "$prefix/venv" ]; then mv "$prefix/venv" "$prefix/venv.by-hand.$(date +%s)"; fi
    local before
    before=$(readlink "$prefix/venv" || true)
    ln -sfn "$release" "$prefix/venv"
    say "envd $("$release/bin/envd" version) is in $prefix/venv"
    changed=yes
    find "$prefix/releases" -mindepth 1 -maxdepth 1 ! -path "$release" ! -path "${before:-none}" -exec rm -rf {} +
  fi
  if [ "$(readlink "$command")" != "$prefix/venv/bin/envd" ]; then
    if [ -e "$command" ] && [ ! -L "$command" ]; then
      say "$command is something else, and is left alone"
    else
      install -d "${command%/*}"
      ln -sfn "$prefix/venv/bin/envd" "$command"
      changed=yes
    fi
  fi
}

stop_it() {
  case $provider in
  docker | aws) say "stopping the running one; its desktops, episodes and jobs go on with the next" ;;
  *) say "stopping the running one; desktops of $provider end with it" ;;
  esac
  systemctl stop envd
  stopped=yes
}

run_it() {
  if ! systemd_runs; then
    if command -v systemctl >/dev/null && [ ! -e /etc/systemd/system/multi-user.target.wants/envd.service ]; then
      quietly "The service could not be enabled." systemctl enable envd
      changed=yes
    fi
    nothing_changed
    say "systemd does not run here, so envd was not started. It is started when this system boots with systemd."
    say "By hand: sudo sh -c 'set -a; . $settings; ENVD_STATE_DIR=$state ENVD_TOKEN_FILE=$tokens exec $command serve'"
    return
  fi
  if [ "$start" = no ] && [ "$stopped" = no ] && ! is_active; then
    nothing_changed
    say "not started. Start it, now and at every boot: systemctl enable --now envd"
    return
  fi
  if ! systemctl --quiet is-enabled envd 2>/dev/null; then
    quietly "The service could not be enabled." systemctl enable envd
    changed=yes
  fi
  if ! is_active; then
    say "starting"
    changed=yes
    systemctl reset-failed envd 2>/dev/null || true # of starts that failed before
    # Returns when the daemon says that it is ready.
    local began
    began=$(date +%s)
    if ! systemctl start envd; then
      journalctl --unit envd --since "@$began" --no-pager --output cat >&2 || true
      fail "envd did not start; its last words are above. Settings are in $settings; then: systemctl restart envd"
    fi
  fi
  wait_until_ready
  nothing_changed
  tell_how
}

wait_until_ready() {
  local answer deadline=$((SECONDS + ready_seconds))
  until answer=$("$prefix/venv/bin/python" -I - "$(url_here)" 2>&1 <<'P'
import json, ssl, sys, urllib.error, urllib.request

# It is asked over loopback; whose certificate that is does not matter.
opener = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
)
try:
    opener.open(sys.argv[1] + "/readyz", timeout=5)
except urllib.error.HTTPError as error:
    sys.exit("; ".join(json.load(error).get("reasons", [str(error)])))
except OSError as error:
    sys.exit(str(error))
P
  ); do
    if [ $SECONDS -ge $deadline ]; then
      say "envd runs, but is not ready to take a reset: $answer"
      say "look: journalctl -u envd"
      exit 1
    fi
    sleep 0.5
  done
}

tell_how() {
  local url
  url=$(url_here)
  say "envd runs, and is ready"
  cat <<T

  On this host:  $url
T
  if [ "$host" = 0.0.0.0 ] || [ "$host" = :: ]; then
    local address
    for address in $(hostname -I 2>/dev/null); do
      case $address in
      *:*) echo "  From others:   $(scheme)://[$address]:$port" ;;
      172.17.0.1) ;; # Docker's bridge
      *) echo "  From others:   $(scheme)://$address:$port" ;;
      esac
    done
  fi
  cat <<T
  The token:     sudo sed -n 's/^admin admin //p' $tokens
  Its log:       journalctl -fu envd

  Next, here or on a trainer's node:

      export ENVD_TOKEN=…
      envd doctor --url $url

T
}

scheme() { if [ -n "$(setting ENVD_TLS_CERT)" ]; then echo https; else echo http; fi; }

# Where the daemon is reached from this host.
url_here() {
  case $host in
  0.0.0.0) echo "$(scheme)://127.0.0.1:$port" ;;
  ::) echo "$(scheme)://[::1]:$port" ;;
  *:*) echo "$(scheme)://[$host]:$port" ;;
  *) echo "$(scheme)://$host:$port" ;;
  esac
}

nothing_changed() { [ "$changed" = yes ] || say "all is as it should be; nothing was changed"; }

# -- and away again ---------------------------------------------------------------------------------------------------

uninstall() {
  provider=$(setting PROVIDER)
  if [ -e "$unit" ]; then
    say "removing the service"
    changed=yes
    if systemd_runs; then
      systemctl disable --now envd >/dev/null 2>&1 || fail "The service could not be stopped: systemctl status envd"
    fi
    rm -f "$unit" "$dropin" /etc/systemd/system/multi-user.target.wants/envd.service
    rmdir "$unit.d" 2>/dev/null || true
    if systemd_runs; then
      systemctl daemon-reload
      systemctl reset-failed envd 2>/dev/null || true
    fi
  fi
  remove_desktops
  if [ -e "$prefix" ]; then
    say "removing $prefix"
    changed=yes
    rm -rf "$prefix"
  fi
  [ "$(readlink "$command")" != "$prefix/venv/bin/envd" ] || rm -f "$command"
  if [ "$purge" = yes ]; then purge_all; fi
  [ "$changed" = yes ] || say "envd is not installed here; nothing was changed"
  local left=()
  for each in /etc/envd "$state" "$cache"; do [ ! -e "$each" ] || left+=("$each"); done
  [ ${#left[@]} -eq 0 ] || say "kept: ${left[*]}; --uninstall --purge removes them too"
}

# The unit leaves desktops to the next start, which will not come.
remove_desktops() {
  local id
  id=$(cat "$state/daemon-id" 2>/dev/null || true)
  if [ -n "$id" ] && command -v docker >/dev/null; then
    local containers
    containers=$(docker ps --all --quiet --filter "label=io.envd.daemon=$id" 2>/dev/null || true)
    if [ -n "$containers" ]; then
      say "removing desktops: $(wc -w <<<"$containers")"
      changed=yes
      # shellcheck disable=SC2086
      docker rm --force --volumes $containers >/dev/null
    fi
  fi
  if [ "$provider" = aws ] && [ -x "$prefix/venv/bin/envd" ]; then
    say "EC2 desktops end by their schedule at AWS (DEFAULT_TTL_MINUTES); \`envd aws gc\` of another checkout ends them now"
  fi
  local uid
  if uid=$(id -u "$user" 2>/dev/null) && [ -d "/dev/shm/envd-templates-$uid" ]; then
    say "removing templates"
    changed=yes
    rm -rf "/dev/shm/envd-templates-$uid"
  fi
}

purge_all() {
  for each in /etc/envd "$state" "$cache"; do
    if [ -e "$each" ]; then
      say "removing $each"
      changed=yes
      rm -rf "$each"
    fi
  done
  if id "$user" >/dev/null 2>&1; then
    say "removing the user $user"
    changed=yes
    userdel "$user"
  fi
}

# -- words ------------------------------------------------------------------------------------------------------------

systemd_runs() { [ -d /run/systemd/system ]; }
is_active() { systemd_runs && systemctl --quiet is-active envd; }

say() { echo "install: $1"; }

fail() {
  echo "install: $1" >&2
  exit 1
}

# quietly WORDS COMMAND...: the command; when it fails the end of what it printed, and WORDS.
quietly() {
  local words=$1 log
  shift
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    fail "$words"
  fi
  rm -f "$log"
}

# Read whole before it runs: the checkout may be updated meanwhile.
{
  main "$@"
  exit
}
