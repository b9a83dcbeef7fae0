#!/usr/bin/env bash
# ext4 on a lazily filled export, by the kernel's NBD device: everything that a file system does with a disk, while the
# disk arrives and while it does not; what attach and detach refuse; and a node that is killed under a mounted file
# system and a writer.
# tests/run: timeout=400 memory=2048 disk=4
set -euo pipefail
work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" filesystem.XXXXXX)
state=$work/state control=$work/control.sock mnt=$work/mnt
mkdir "$mnt"
node='' source='' writer=''

fail() {
  echo "FAILED: $*" >&2
  tail -n 20 "$work/node.log" | sed 's/^/  node | /' >&2
  dmesg | tail -n 10 | sed 's/^/  kernel | /' >&2
  exit 1
}
lm() { "$LAZY_MIGRATE_BIN" --control "$control" "$@"; }
clean_up() {
  local status=$? pid
  trap - EXIT
  for pid in $writer; do kill -KILL "$pid" 2>/dev/null || true; done
  timeout 30 umount "$mnt" 2>/dev/null || umount -l "$mnt" 2>/dev/null || true
  timeout 30 "$LAZY_MIGRATE_BIN" --control "$control" detach fs >/dev/null 2>&1 || true
  for pid in $node $source; do kill "$pid" 2>/dev/null || true; done
  wait
  rm -rf --one-file-system "$work"
  exit "$status"
}
trap clean_up EXIT

start_node() {
  "$LAZY_MIGRATE_BIN" --control "$control" serve --state-dir "$state" >>"$work/node.log" 2>&1 &
  node=$!
  local end=$((SECONDS + 30))
  until lm status --json >/dev/null 2>&1; do
    kill -0 "$node" 2>/dev/null || fail "the node ended"
    [ "$SECONDS" -lt "$end" ] || fail "the node does not answer"
    sleep 0.05
  done
}
# refused STATUS WORDS COMMAND...: that exit status, and one line with these words.
refused() {
  local want=$1 words=$2 got=0
  shift 2
  lm "$@" >"$work/said" 2>&1 || got=$?
  [ "$got" = "$want" ] && [ "$(wc -l <"$work/said")" = 1 ] && grep -q -- "$words" "$work/said" ||
    fail "lazy-migrate $*: status $got instead of $want, or not '$words' in: $(cat "$work/said")"
  echo "refused, as it should be: $(cat "$work/said")"
}
status_of() { lm status fs --json | jq -r ".$1"; }
# Read from the disk, not from what was cached.
forget_cache() { sync -f "$mnt" && echo 3 >/proc/sys/vm/drop_caches; }
check_files() { (cd "$mnt" && sha256sum --quiet -c "$work/sums") || fail "files differ: $1"; }
check_disk() { e2fsck -fn "$1" >"$work/fsck" 2>&1 || fail "e2fsck: $(cat "$work/fsck")"; }

# The source: an ext4 of 200 MiB with 64 MiB of random files, which nothing here may ever change.
truncate -s 200M "$work/source.img"
mkdir "$work/tree"
python3 - "$work/tree" <<'P'
import os, random, sys
generator = random.Random(1)
for number in range(60):
    path = f"{sys.argv[1]}/{number % 7}/{number}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(generator.randbytes(generator.choice([1, 4095, 4097, 100_000, 1 << 20, 3 << 20])))
P
mkfs.ext4 -q -d "$work/tree" "$work/source.img"
(cd "$work/tree" && find . -type f -exec sha256sum {} + >"$work/sums")
before=$(sha256sum <"$work/source.img")
nbdkit -f -U "$work/source.sock" --filter=log file "$work/source.img" logfile="$work/source.log" &
source=$!
for _ in $(seq 200); do [ -S "$work/source.sock" ] && break; sleep 0.05; done
start_node

for background in --no-background ''; do
  echo "== a file system on a disk that arrives ${background:-in the background}"
  # shellcheck disable=SC2086
  lm pull fs --from "nbd+unix:///?socket=$work/source.sock" $background
  device=$(lm attach fs)
  [ "$(blockdev --getsize64 "$device")" = $((200 << 20)) ] || fail "the device has another size"
  [ "$(lm attach fs)" = "$device" ] || fail "attaching again is something else"
  refused 3 'attached' attach fs /dev/nbd9
  refused 3 'detach' remove fs
  mount "$device" "$mnt"
  refused 3 "mounted on $mnt" detach fs
  check_files "as they came"
  # Write, replace, delete, trim.
  python3 - "$mnt" "$work/sums" <<'P'
import hashlib, os, random, sys
mount, sums = sys.argv[1:]
generator = random.Random(2)
known = dict(reversed(line.split(maxsplit=1)) for line in open(sums).read().splitlines())
for number, name in enumerate(sorted(known)):
    path = os.path.join(mount, name)
    if number % 5 == 0:
        os.unlink(path)
        del known[name]
        continue
    if number % 5 == 1:
        with open(path, "r+b") as file:
            file.seek(generator.randrange(os.path.getsize(path)))
            file.write(generator.randbytes(5000))
            file.flush()
            os.fsync(file.fileno())
    if number % 5 == 2:
        os.truncate(path, os.path.getsize(path) // 2)
    known[name] = hashlib.sha256(open(path, "rb").read()).hexdigest()
for number in range(20):
    data = generator.randbytes(generator.choice([10, 4096, 700_000]))
    with open(os.path.join(mount, f"new{number}"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    known[f"./new{number}"] = hashlib.sha256(data).hexdigest()
open(sums + ".new", "w").write("".join(f"{digest}  {name}\n" for name, digest in known.items()))
P
  cp "$work/sums" "$work/sums.source"
  mv "$work/sums.new" "$work/sums"
  forget_cache
  check_files "written"
  fstrim -v "$mnt"
  forget_cache
  check_files "trimmed"
  [ -n "$background" ] || lm wait fs --for complete --timeout 120s
  [ -z "$background" ] || [ "$(status_of phase)" != complete ] || fail "it fetched all although told not to"

  if [ -n "$background" ]; then
    echo "== the node is killed under a writer, with most of the disk still to come"
    python3 - "$mnt/log" <<'P' &
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
number = 0
while True:
    number += 1
    os.write(file, b"%d\n" % number)
    os.fdatasync(file)
P
    writer=$!
    for _ in 1 2 3; do
      last=$(tail -n 1 "$mnt/log" 2>/dev/null || echo 0)
      for _ in $(seq 200); do [ "$(tail -n 1 "$mnt/log" 2>/dev/null || echo 0)" -gt $((${last:-0} + 20)) ] && break; sleep 0.05; done
      kill -KILL "$node"
      wait "$node" 2>/dev/null || true
      start_node
      [ "$(status_of device)" = "$device" ] || fail "the device was not taken over: $(lm status fs --json)"
      kill -0 "$writer" 2>/dev/null || fail "the writer got an error"
      last=$(tail -n 1 "$mnt/log")
      for _ in $(seq 200); do [ "$(tail -n 1 "$mnt/log")" -gt "$last" ] && break; sleep 0.05; done
      [ "$(tail -n 1 "$mnt/log")" -gt "$last" ] || fail "the writer does not go on from $last"
    done
    kill "$writer"
    wait "$writer" 2>/dev/null || true
    writer=''
    forget_cache
    awk '$1 != NR { print "line " NR " says " $1; exit 1 }' "$mnt/log" || fail "the log has a gap"
    check_files "after the kills"
    ! dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|Buffer I/O' || fail "the kernel saw an error"
  fi

  umount "$mnt"
  check_disk "$device"
  lm detach fs
  [ "$(cat "/sys/block/${device#/dev/}/size")" = 0 ] || fail "the device is still there"
  # And as the store alone has it, without our program.
  if [ -z "$background" ]; then
    check_disk "$state/disks/fs/disk.img"
    mount -o loop,ro "$state/disks/fs/disk.img" "$mnt"
    check_files "in the store"
    umount "$mnt"
  fi
  lm remove fs
  mv "$work/sums.source" "$work/sums"
done
refused 1 'no export' attach fs
[ "$(sha256sum <"$work/source.img")" = "$before" ] || fail "the source was written to"
echo ok
