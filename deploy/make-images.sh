#!/usr/bin/env bash
# make-images.sh [--fresh] [desktop] [qemu] [guest-disk]: makes our images, those that are named or all. What is made
# of the same files already is left alone; --fresh makes it anew, with the Debian packages of today.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
images=$project/deploy/images
cache=${ENVD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/envd}/images
python=${PYTHON:-python3}
fresh=()

# What container desktops have in common with local ones.
shared=(envd/drivers/local/branding.py envd/drivers/local/guest/applications envd/drivers/local/guest/openbox
  envd/drivers/local/guest/bin/google-chrome)
# Wheels of nobody are on the index for these; they are pure Python and made into wheels here.
pure=(MouseInfo PyAutoGUI PyGetWindow PyMsgBox PyRect PyScreeze pytweening)

main() {
  local wanted=()
  while [ $# -gt 0 ]; do
    case $1 in
    --fresh) fresh=(--no-cache) ;;
    --hashes) list_agent && print_hashes && return ;;
    desktop | qemu | guest-disk) wanted+=("$1") ;;
    *) fail "There is no image \"$1\": name some of desktop, qemu, guest-disk, or none for all." ;;
    esac
    shift
  done
  [ ${#wanted[@]} -gt 0 ] || wanted=(desktop qemu guest-disk)
  require_docker
  list_agent
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/making.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  for each in "${wanted[@]}"; do
    case $each in
    desktop) make_desktop ;;
    qemu) make_qemu ;;
    guest-disk) make_guest_disk ;;
    esac
  done
}

make_desktop() {
  local content
  content=$(content_of desktop)
  is_made envd/desktop "$content" && return
  find_base
  local context=$work/desktop
  mkdir -p "$context/lib" "$context/home/.config"
  make_site
  cp -r "$work/site" "$context/site"
  mkdir -p "$context/site/envd"
  (cd "$project" && cp -r --parents "${agent[@]}" "$context/site")
  cp "$project/envd/drivers/local/branding.py" "$context/"
  cp -r "$images/desktop/bin" "$context/bin"
  cp "$project/envd/drivers/local/guest/bin/google-chrome" "$context/bin/"
  chmod 755 "$context"/bin/*
  for name in google-chrome-stable chromium chromium-browser; do ln -s google-chrome "$context/bin/$name"; done
  mkdir -p "$context/share"
  cp -r "$project/envd/drivers/local/guest/applications" "$context/share/applications"
  cp -r "$images/desktop/home/." "$context/home/"
  cp -r "$project/envd/drivers/local/guest/openbox" "$context/home/.config/openbox"
  cp "$images/common/runner.py" "$images/desktop/session.py" "$context/lib/"
  cp "$images/desktop/Dockerfile" "$context/"
  build envd/desktop desktop "$content" "$context" --build-arg "BASE=$base"
}

make_qemu() {
  local content
  content=$(content_of qemu)
  is_made envd/qemu "$content" && return
  find_base
  local context=$work/qemu
  mkdir -p "$context/lib"
  cp "$images/common/runner.py" "$images/qemu/qemu.py" "$context/lib/"
  cp "$images/qemu/Dockerfile" "$images/qemu/run" "$images/qemu/novnc-connection" "$context/"
  build envd/qemu qemu "$content" "$context" --build-arg "BASE=$base"
}

make_guest_disk() {
  local content
  content=$(content_of guest-disk)
  local disk=$cache/guest-disk-$content.qcow2
  if [ -z "${fresh[*]:-}" ] && [ -s "$disk" ]; then
    ln -sfn "${disk##*/}" "$cache/guest-disk.qcow2"
    echo "guest-disk is made already: $cache/guest-disk.qcow2"
    return
  fi
  make_desktop
  find_base
  build envd/guest guest "$content" "$images/guest-disk" --build-arg DESKTOP=envd/desktop:latest
  build envd/disk-tools tools "$content" "$images/guest-disk" --build-arg "BASE=$base" --file "$images/guest-disk/tools.Dockerfile"
  echo "guest-disk: making the disk"
  local started=$SECONDS container
  container=$(docker create --label io.envd.build=guest-disk envd/guest:latest)
  trap 'docker rm -f "$container" >/dev/null 2>&1; rm -rf "$work"' EXIT
  docker export --output "$work/root.tar" "$container"
  docker rm -f "$container" >/dev/null
  if ! docker run --rm --label io.envd.build=guest-disk --volume "$work:/disk" envd/disk-tools:latest \
    /disk/root.tar /disk/disk.qcow2 >"$cache/disk.log" 2>&1; then
    tail -n 20 "$cache/disk.log" >&2
    fail "The guest disk could not be made; the whole log is $cache/disk.log."
  fi
  [ -O "$work/disk.qcow2" ] || docker run --rm --volume "$work:/disk" --entrypoint chown envd/disk-tools:latest "$(id -u):$(id -g)" /disk/disk.qcow2
  trap 'rm -rf "$work"' EXIT
  mv "$work/disk.qcow2" "$disk"
  ln -sfn "${disk##*/}" "$cache/guest-disk.qcow2"
  # The one before is kept: machines and templates may be based on it.
  find "$cache" -maxdepth 1 -name 'guest-disk-*.qcow2' -printf '%T@ %p\0' | sort -zrn | tail -zn +3 | cut -zd ' ' -f 2- | xargs -0r rm -f
  echo "guest-disk: $cache/guest-disk.qcow2 ($(du -h "$disk" | cut -f1), $((SECONDS - started)) s)"
}

# build NAME KIND CONTENT CONTEXT ARGUMENT...
build() {
  local name=$1 kind=$2 content=$3 context=$4 started=$SECONDS
  shift 4
  local before
  before=$(docker image inspect -f '{{.Id}}' "$name:latest" 2>/dev/null) || before=
  echo "$name: building (its log is $cache/$kind.log)"
  if ! docker build --network host "${fresh[@]}" --label "io.envd.kind=$kind" --label "io.envd.content=$content" \
    --tag "$name:latest" "$@" "$context" >"$cache/$kind.log" 2>&1; then
    tail -n 25 "$cache/$kind.log" >&2
    fail "$name could not be built; the whole log is $cache/$kind.log."
  fi
  if [ -n "$before" ] && [ "$before" != "$(docker image inspect -f '{{.Id}}' "$name:latest")" ]; then
    docker image rm "$before" >/dev/null 2>&1 || true # in use still
  fi
  echo "$name: $(docker image inspect -f '{{.Size}}' "$name:latest" | awk '{printf "%.0f MB", $1 / 1e6}'), $((SECONDS - started)) s"
}

# is_made NAME CONTENT
is_made() {
  [ -z "${fresh[*]:-}" ] || return 1
  [ "$(docker image inspect -f '{{index .Config.Labels "io.envd.content"}}' "$1:latest" 2>/dev/null)" = "$2" ] || return 1
  echo "$1 is made already"
}

# The image that all start from: Debian's own if it is here or can be had, else one made of packages.
find_base() {
  [ -z "${base:-}" ] || return 0
  for base in debian:bookworm-slim envd/base:bookworm; do
    docker image inspect "$base" >/dev/null 2>&1 && return
  done
  base=debian:bookworm-slim
  echo "base: pulling $base"
  timeout 60 docker pull -q "$base" >/dev/null 2>&1 && return
  base=envd/base:bookworm
  echo "base: no registry has it; making $base with debootstrap"
  PATH=$PATH:/usr/sbin:/sbin
  local as=()
  if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || fail "debootstrap needs root. Run this once as root (sudo $0), or load an image debian:bookworm-slim (docker load)."
    as=(sudo -n)
  fi
  if ! command -v debootstrap >/dev/null; then
    echo "base: installing debootstrap"
    run_logged "$cache/base.log" "debootstrap could not be installed. Run: sudo apt-get install -y debootstrap" \
      "${as[@]}" sh -c 'apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends debootstrap'
  fi
  local tree
  tree=$("${as[@]}" mktemp -d /var/tmp/envd-base.XXXXXX)
  trap '"${as[@]}" rm -rf "$tree"; rm -rf "$work"' EXIT
  run_logged "$cache/base.log" "debootstrap failed." "${as[@]}" debootstrap --variant=minbase bookworm "$tree"
  # debootstrap names its mirror for the release alone; updates and security are beside it.
  local mirror
  mirror=$(awk '$1 == "deb" { print $2; exit }' "$tree/etc/apt/sources.list")
  printf 'deb %s %s main\n' "$mirror" bookworm "$mirror" bookworm-updates "${mirror%/}-security" bookworm-security |
    "${as[@]}" tee "$tree/etc/apt/sources.list" >/dev/null
  "${as[@]}" cp "$images/base/slim" "$tree/etc/dpkg/dpkg.cfg.d/slim"
  "${as[@]}" tar -C "$tree" --exclude='./var/cache/apt/archives/*.deb' --exclude='./dev/*' --exclude='./usr/share/doc/*' \
    --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' -c . | docker import - "$base" >/dev/null
  "${as[@]}" rm -rf "$tree"
  trap 'rm -rf "$work"' EXIT
}

# $work/site: the Python packages of the guest, unpacked for the Python that Debian has, whatever this host has.
make_site() {
  "$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip. Run: sudo apt-get install -y python3-pip, or set PYTHON to one that has."
  local key site
  key=$(digest constraints.txt deploy/images/desktop/packages.txt)
  site=$cache/site-$key
  if [ ! -d "$site" ]; then
    echo "desktop: fetching Python packages"
    local pip=("$python" -m pip --disable-pip-version-check -q) wheels=$work/wheels
    local words="Python packages of the desktop could not be fetched."
    run_logged "$cache/packages.log" "$words" "${pip[@]}" wheel --no-deps --wheel-dir "$wheels" --constraint "$project/constraints.txt" "${pure[@]}"
    run_logged "$cache/packages.log" "$words" "${pip[@]}" install --target "$work/site" --no-deps --no-compile --find-links "$wheels" \
      --only-binary :all: --implementation cp --python-version 3.11 \
      --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
      --constraint "$project/constraints.txt" --requirement "$images/desktop/packages.txt"
    rm -rf "$work/site/bin"
    find "$cache" -maxdepth 1 -name 'site-*' -exec rm -rf {} +
    mv "$work/site" "$site"
  fi
  cp -r "$site" "$work/site"
}

# run_logged LOG WORDS COMMAND...: the command, its output in the log; when it fails the log's end, and WORDS.
run_logged() {
  local log=$1 words=$2
  shift 2
  if ! "$@" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "$words (The whole log is $log.)"
  fi
}

# content_of IMAGE: a hash of all files that it is made of.
content_of() {
  case $1 in
  desktop) digest constraints.txt deploy/make-images.sh deploy/images/base deploy/images/common deploy/images/desktop "${agent[@]}" "${shared[@]}" ;;
  qemu) digest deploy/make-images.sh deploy/images/base deploy/images/common deploy/images/qemu ;;
  guest-disk) { content_of desktop; digest deploy/images/guest-disk; } | sha256sum | cut -c1-16 ;;
  esac
}

# digest PATH...: of the names, modes and contents of the files there, in the project.
digest() {
  (cd "$project" && find "$@" -type f ! -path '*/__pycache__/*' -printf '%p\0' | LC_ALL=C sort -z |
    xargs -0 stat -c '%n %A' && cd "$project" && find "$@" -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum) | sha256sum | cut -c1-16
}

# The files that the guest server needs of our own.
list_agent() {
  command -v "$python" >/dev/null || fail "There is no $python. Run: sudo apt-get install -y python3 python3-pip, or set PYTHON to one."
  local listed
  listed=$("$python" "$images/desktop/parts.py" "$project")
  mapfile -t agent <<<"$listed"
}

print_hashes() {
  for each in desktop qemu guest-disk; do echo "$each $(content_of "$each")"; done
}

require_docker() {
  command -v docker >/dev/null || fail "Docker is not installed. On Debian: sudo apt-get install -y --no-install-recommends docker.io"
  local told
  told=$(docker version --format '{{.Server.Version}}' 2>&1) && return
  case $told in
  *"permission denied"*) fail "This user may not speak to Docker. Run: sudo usermod -aG docker $(id -un), and log in anew." ;;
  *"Cannot connect"* | *"Is the docker daemon running"*) fail "Docker does not run. Run: sudo systemctl start docker (or dockerd by hand)." ;;
  *) fail "Docker does not answer: $told" ;;
  esac
}

fail() {
  printf '%s\n' "$1" >&2
  exit 1
}

main "$@"
