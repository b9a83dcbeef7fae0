#!/usr/bin/env bash
# What does a client see of a migration? The same service, which writes to its disk and answers a client all the while, is
# moved in three ways between the same two hosts over the same link:
#
#   copy   stop it, copy its disk, start it on the other host
#   rsync  copy its files while it runs, freeze it into a checkpoint, copy what has changed and the checkpoint, restore it
#          there: what vzmigrate does
#   lazy   lazy-migrate
#
#   examples/client-view.sh [--guest | --here] [DIR]
#
# DIR (target/client-view) gets the picture (client-view.svg), the table (client-view.md) and the figures (client-view.json);
# the table goes to stdout as well. For Debian 12 or later, as root. --guest, --here, LAZY_MIGRATE: see live-migration.sh.
# EXAMPLE_MIB (60): what the container has on its disk, and a third of it again that is overwritten here and there all the while. EXAMPLE_RATE (100mbit): how fast the link is, as tc says it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../tests/lab/common.sh"
exec </dev/null

where='' out=''
for argument in "$@"; do
  case $argument in
    --guest | --here) where=${argument#--} ;;
    -*) die "unknown option $argument; usage: client-view.sh [--guest | --here] [DIR]" 2 ;;
    *) out=$argument ;;
  esac
done
[ "$(id -u)" = 0 ] || die "this makes network namespaces, devices and containers: run it as root"
target=${CARGO_TARGET_DIR:-$repo/target}
out=${out:-$target/client-view}
mkdir -p "$out"
out=$(cd "$out" && pwd)
binary=${LAZY_MIGRATE:-}
[ -n "$binary" ] || need_rust

"$repo/tests/lab/install.sh" --no-guest
if [ -z "$where" ]; then
  if modprobe -q nbd 2>/dev/null && criu check >/dev/null 2>&1; then where=here; else where=guest; fi
fi
[ "$where" = here ] || "$repo/tests/lab/install.sh"
if [ -z "$binary" ]; then
  echo "building lazy-migrate" >&2
  (cd "$repo" && cargo build --release --bin lazy-migrate >&2)
  binary=$target/release/lazy-migrate
fi
# Where the guest sees it too: its /tmp is its own.
programs=$lab/client-view
mkdir -p "$programs"
install "$binary" "$programs/lazy-migrate"
for program in service client; do
  gcc -static -O2 -Wall -o "$programs/$program" "$repo/examples/live-migration/$program.c"
done

inner=("$repo/examples/client-view/inner.sh" "$programs")
if [ "$where" = here ]; then
  "${inner[@]}" "$out"
else
  "$repo/tests/lab/guest" --memory 3072 --disk 8 --timeout 900 --env TMPDIR=/scratch --share "$out" \
    --env EXAMPLE_MIB --env EXAMPLE_RATE --env RUST_LOG -- "${inner[@]}" /hostshare
fi
echo "the picture is $out/client-view.svg" >&2
