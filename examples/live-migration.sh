#!/usr/bin/env bash
# Moves a live container from host A to host B on this one machine, and shows what happens: a service answers a TCP
# client and writes to its disk all the while, and the disk arrives after it resumed.
#
#   examples/live-migration.sh [--fail-link] [--guest | --here]
#     --fail-link  cuts the link after the resume, and shows the rollback instead
#     --guest      in a QEMU guest, --here on this kernel; without either: here if this kernel has the NBD device and a
#                  working criu, otherwise in the guest
#
# For Debian 12 or later, as root. Installs what is missing with apt and builds with cargo (1.88 or later has to be
# there). The timeline comes on stderr; stdout ends with one line of JSON. Cleans up after itself; the packages stay.
# EXAMPLE_MIB and EXAMPLE_SECONDS: see examples/live-migration/inner.sh. LAZY_MIGRATE: a binary that is already built.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../tests/lab/common.sh"
exec </dev/null

options=() where=''
for argument in "$@"; do
  case $argument in
    --fail-link) options+=("$argument") ;;
    --guest | --here) where=${argument#--} ;;
    *) die "unknown option $argument; usage: live-migration.sh [--fail-link] [--guest | --here]" 2 ;;
  esac
done
[ "$(id -u)" = 0 ] || die "this makes network namespaces, devices and containers: run it as root"
binary=${LAZY_MIGRATE:-}
[ -n "$binary" ] || need_rust

"$repo/tests/lab/install.sh" --no-guest
if [ -z "$where" ]; then
  if modprobe -q nbd 2>/dev/null && criu check >/dev/null 2>&1; then where=here; else where=guest; fi
fi
if [ "$where" = guest ]; then
  echo "using a QEMU guest with Debian's kernel: this one has no NBD device or no working criu, or you said so" >&2
  "$repo/tests/lab/install.sh"
fi

target=${CARGO_TARGET_DIR:-$repo/target}
if [ -z "$binary" ]; then
  echo "building lazy-migrate" >&2
  (cd "$repo" && cargo build --release --bin lazy-migrate >&2)
  binary=$target/release/lazy-migrate
fi
# Where the guest sees it too: its /tmp is its own.
programs=$lab/example
mkdir -p "$programs"
install "$binary" "$programs/lazy-migrate"
for program in service client; do
  gcc -static -O2 -Wall -o "$programs/$program" "$repo/examples/live-migration/$program.c"
done

inner=("$repo/examples/live-migration/inner.sh" "$programs" "${options[@]}")
if [ "$where" = here ]; then
  exec "${inner[@]}"
fi
exec "$repo/tests/lab/guest" --memory 3072 --disk 8 --timeout 900 --env TMPDIR=/scratch \
  --env EXAMPLE_MIB --env EXAMPLE_SECONDS --env RUST_LOG -- "${inner[@]}"
