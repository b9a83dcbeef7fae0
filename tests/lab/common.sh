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
guest_initramfs=$lab/initramfs.gz
guest_kernel_version() {
  local dir
  for dir in "$guest_kernel_dir"/lib/modules/*; do
    [ -d "$dir" ] && { basename "$dir"; return; }
  done
  return 1
}
