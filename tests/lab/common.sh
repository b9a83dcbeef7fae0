# shellcheck shell=bash
# Settings that every script of the harness shares; sourced, never run.
# Sets: repo (the checkout), lab (where the guest's kernel, its initramfs and scratch files are kept).

# Debian's own tools first: nbdsh, for one, needs Debian's python3.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
lab=${LAZY_MIGRATE_LAB:-$repo/target/lab}

# die TEXT [STATUS]: one line that says what is wrong, then out.
die() {
  echo "${0##*/}: $1" >&2
  exit "${2:-1}"
}

# The unpacked kernel package, and the version that is in it.
guest_kernel_dir=$lab/kernel
# shellcheck disable=SC2034 # the scripts that source this use it
guest_initramfs=$lab/initramfs.gz
guest_kernel_version() {
  local dir
  for dir in "$guest_kernel_dir"/lib/modules/*; do
    [ -d "$dir" ] && { basename "$dir"; return; }
  done
  return 1
}

# need_rust: a cargo that knows edition 2024, first in PATH; or a clear word and out. Debian 12's own is too old, and
# nothing is fetched from anywhere but apt, so this is the one thing that a person may have to install.
need_rust() {
  local candidate minor
  while read -r candidate; do
    minor=$("$candidate" --version 2>/dev/null | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
    if [ "${minor:-0}" -ge 85 ]; then
      PATH=$(dirname "$candidate"):$PATH
      return
    fi
  done < <(type -aP cargo; ls "$HOME/.cargo/bin/cargo" 2>/dev/null)
  die "Rust 1.88 or later is needed to build (edition 2024) and no such cargo was found; install it, for example from https://rustup.rs, and run this again"
}
