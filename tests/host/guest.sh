#!/usr/bin/env bash
# The guest runner itself: a test that runs in the guest is worth as much as the runner's word for what happened there.
# tests/run: timeout=300
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lab/common.sh"
out=$(mktemp -d -p "$lab" selftest.XXXXXX)
trap 'rm -rf --one-file-system "$out"' EXIT
guest=$repo/tests/lab/guest

# expect STATUS COMMAND...: the runner's exit status, its output left in $out/stdout and $out/stderr.
expect() {
  local want=$1 got=0
  shift
  "$@" >"$out/stdout" 2>"$out/stderr" || got=$?
  [ "$got" = "$want" ] || die "status $got instead of $want from: $*; it said: $(cat "$out/stdout" "$out/stderr")"
}
contains() { grep -qF -- "$2" "$out/$1" || die "'$2' is not in $1: $(cat "$out/$1")"; }

# Status, streams, arguments, environment, directory and the share all arrive.
mkdir "$out/share"
cd "$out"
# shellcheck disable=SC2016 # expanded in the guest
expect 37 "$guest" --share "$out/share" --disk 1 --env GREETING="it's a  test" -- bash -c '
  echo "$GREETING/$1/$PWD"; echo words >&2; echo shared >/hostshare/file; mountpoint -q /scratch || exit 1
  setsid sleep 1000 & exit 37' name 'two  words'
[ "$(cat stdout)" = "it's a  test/two  words/$out" ] || die "wrong stdout: $(cat stdout)"
[ "$(cat stderr)" = words ] || die "wrong stderr: $(cat stderr)"
[ "$(cat share/file)" = shared ] || die "the share did not arrive"

# A panic is the guest's failure and no status of the command, even if the command said something before.
expect 125 "$guest" -- bash -c 'echo before; echo c >/proc/sysrq-trigger; sleep 60'
contains stdout before
contains stderr 'died while the command ran'
contains stderr 'Kernel panic'

# A kernel that locked up under the emulator is no word on the command: it runs once more, and only once.
# shellcheck disable=SC2016 # expanded in the guest
lock_up='echo run >>/hostshare/runs; [ "$(wc -l </hostshare/runs)" != "$1" ] || exit 0
  echo "<0>Kernel panic - not syncing: softlockup: hung tasks" >/dev/kmsg; echo c >/proc/sysrq-trigger; sleep 60'
expect 0 "$guest" --share "$out/share" -- bash -c "$lock_up" name 2
contains stderr 'once more'
expect 125 "$guest" --share "$out/share" -- bash -c "$lock_up" name 5
[ "$(wc -l <share/runs)" = 4 ] || die "run $(wc -l <share/runs) times instead of 4"

# A hang ends, and says so.
expect 124 "$guest" --timeout 40 -- bash -c 'echo begun; sleep 1000'
contains stdout begun
contains stderr 'not done within 40 s'

# The machine's root is as it was: the guest writes to an overlay in memory.
marker=$out/written-in-guest
expect 0 "$guest" -- touch "$marker"
[ ! -e "$marker" ] || die "the guest wrote to the machine's root"

# What is stopped leaves nothing behind: no QEMU, no scratch directory.
before=$(find "$lab" -maxdepth 1 -name 'guest.*' | wc -l)
"$guest" -- sleep 1000 >stdout 2>stderr &
runner=$!
for _ in $(seq 100); do
  control=$(find "$lab" -maxdepth 1 -name 'guest.*' -newer "$out/share/file" | head -n 1)
  qemu=$(pgrep -f "^[^ ]*qemu-system-x86_64 .*$control/console" | head -n 1) || qemu=''
  [ -n "$control" ] && [ -n "$qemu" ] && break
  sleep 0.1
done
[ -n "$qemu" ] || die "QEMU did not start: $(cat stderr)"
kill -TERM "$runner"
status=0
wait "$runner" || status=$?
[ "$status" = 143 ] || die "a stopped runner answered $status"
for _ in $(seq 50); do
  kill -0 "$qemu" 2>/dev/null || break
  sleep 0.1
done
kill -0 "$qemu" 2>/dev/null && die "QEMU $qemu outlived its runner"
[ "$(find "$lab" -maxdepth 1 -name 'guest.*' | wc -l)" -le "$before" ] || die "a scratch directory was left in $lab"
