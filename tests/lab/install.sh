#!/usr/bin/env bash
# Installs what the tests and the example need on Debian: packages by apt, and the kernel of the test guest, which is
# unpacked into the lab directory (target/lab, or $LAZY_MIGRATE_LAB) and never installed. Does nothing, and quickly,
# when all is there. Nothing comes from anywhere but the machine's own apt sources.
#
#   tests/lab/install.sh            what the example needs, and most tests
#   tests/lab/install.sh --tests    everything
#   tests/lab/install.sh --no-guest only what runs on the machine itself (no QEMU, no kernel)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export DEBIAN_FRONTEND=noninteractive

packages=(
  nbdkit libnbd-bin python3-libnbd qemu-utils nbd-client nbd-server fio  # peers that speak NBD
  runc criu podman busybox-static gcc libc6-dev               # containers, and what runs inside them
  nftables iproute2 util-linux e2fsprogs fuse3 kmod mount     # namespaces, cut links, filesystems
  rsync                                                       # how containers were moved before
  prometheus python3-jsonschema                               # checkers of what the program tells other programs
  chromium                                                    # what the page looks like
  procps curl jq cpio python3 ca-certificates                 # the scripts themselves
  dpkg-dev binutils systemd                                   # the Debian package, and its service
)
guest_packages=(qemu-system-x86)
# Not for who wants to see the example: an sshd is a service that others can reach.
test_packages=(openssh-server openssh-client iputils-arping)
with_guest=1
case ${1:-} in
  '') ;;
  --no-guest) with_guest=0 ;;
  --tests) packages+=("${test_packages[@]}") ;;
  *) die "unknown option $1; usage: install.sh [--no-guest | --tests]" 2 ;;
esac

log=$lab/install.log
# In one question for all of them: each takes its time in a guest.
missing() {
  local installed p
  # shellcheck disable=SC2016 # dpkg's own variables
  installed=" $(dpkg-query -W -f '${Package}/${db:Status-Status} ' "$@" 2>/dev/null || true)"
  for p in "$@"; do [[ $installed == *" $p/installed "* ]] || echo "$p"; done
}

# apt with what other users of the machine may be doing in mind: wait for dpkg's lock, ask nothing.
apt() { apt-get -q -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@" </dev/null >>"$log" 2>&1; }
updated=0
update() {
  [ "$updated" = 1 ] && return
  updated=1
  apt update || die "apt-get update failed (is the network there?); its output is in $log"
}
need_root() { [ "$(id -u)" = 0 ] || die "packages are missing ($*); run this as root, or install them first"; }

# Debian 12's qemu-system-x86 conflicts with a qemu-utils from backports. Then the same suite has to give both; it is
# asked through a private apt state, so that the machine's own sources stay as they are.
install_qemu() {
  # Not by taking qemu-utils away, which apt would.
  apt install -y --no-install-recommends --no-remove "$@" && return
  local state=$lab/apt codename
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")
  mkdir -p "$state/parts" "$state/lists/partial" "$state/cache/archives/partial"
  if [ -f /etc/apt/sources.list.d/debian.sources ]; then
    sed "/^Suites:/s/ $codename-updates/ $codename-updates $codename-backports/" \
      /etc/apt/sources.list.d/debian.sources >"$state/parts/backports.sources"
  else
    # From the machine's own line for the release: the same server has the backports.
    sed -nE "s/^(deb .*) $codename main.*/\1 $codename main\n\1 $codename-backports main/p" /etc/apt/sources.list \
      >"$state/parts/backports.list"
  fi
  local options=(-o Dir::Etc::SourceList=/nonexistent -o "Dir::Etc::SourceParts=$state/parts"
    -o "Dir::State::Lists=$state/lists" -o "Dir::Cache=$state/cache")
  apt "${options[@]}" update || true
  apt "${options[@]}" install -y --no-install-recommends -t "$codename-backports" "$@"
}

# The guest runs Debian's own kernel: what users of Debian have, with nbd, and one that its criu works on.
unpack_kernel() {
  guest_kernel_version >/dev/null && return
  local package tmp
  tmp=$(mktemp -d -p "$lab" kernel.XXXXXX)
  # _apt must be able to write here, or apt warns and falls back to root.
  chmod 755 "$tmp"
  package=$(apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends:/ {print $2; exit}')
  if [ -z "$package" ]; then
    update
    package=$(apt-cache depends linux-image-amd64 | awk '/Depends:/ {print $2; exit}')
  fi
  [ -n "$package" ] || die "apt knows no linux-image-amd64: the guest needs Debian's kernel package"
  if ! (cd "$tmp" && apt download "$package"); then
    update
    (cd "$tmp" && apt download "$package") || die "cannot download $package; apt's output is in $log"
  fi
  mkdir "$tmp/root"
  dpkg -x "$tmp"/*.deb "$tmp/root"
  # Debian 13 and later put the modules below /usr/lib.
  [ -d "$tmp/root/lib/modules" ] || { mkdir -p "$tmp/root/lib" && mv "$tmp/root/usr/lib/modules" "$tmp/root/lib/"; }
  depmod -b "$tmp/root" "$(basename "$tmp"/root/lib/modules/*)"
  rm -rf --one-file-system "$guest_kernel_dir"
  mv "$tmp/root" "$guest_kernel_dir"
  rm -rf --one-file-system "$tmp"
}

command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
  die "this installs Debian packages and found no apt; install by hand: ${packages[*]} ${guest_packages[*]}"
mkdir -p "$lab"
exec 9>"$lab/install.lock"
flock 9 # two test runs may start at once

mapfile -t want < <(missing "${packages[@]}")
if [ ${#want[@]} -gt 0 ]; then
  need_root "${want[*]}"
  echo "installing ${want[*]}" >&2
  update
  apt install -y --no-install-recommends --no-remove "${want[@]}" || die "apt could not install ${want[*]}; its output is in $log"
fi
if [ "$with_guest" = 1 ]; then
  mapfile -t want < <(missing "${guest_packages[@]}")
  if [ ${#want[@]} -gt 0 ]; then
    need_root "${want[*]}"
    echo "installing ${want[*]}" >&2
    update
    install_qemu "${want[@]}" || die "apt could not install ${want[*]}; its output is in $log"
  fi
  unpack_kernel
  "$repo/tests/lab/initramfs"
fi
