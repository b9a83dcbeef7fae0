#!/usr/bin/env bash
# The protocol authors' nbd-client sets up the kernel's device on a node's exports: a local image and one that arrives
# meanwhile; over a Unix socket and TCP, in sectors and in blocks of 4 KiB, over one connection and over two. A file
# system is made, written to, mounted again and compared, each time with nothing left in the kernel's cache.
# tests/run: timeout=600 memory=2048 disk=4
set -euo pipefail
work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" nbd-client.XXXXXX)
control=$work/control.sock mnt=$work/mnt device=/dev/nbd5
mkdir "$mnt"
node='' source=''

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
  timeout 30 umount "$mnt" 2>/dev/null || umount -l "$mnt" 2>/dev/null || true
  timeout 30 nbd-client -d "$device" >/dev/null 2>&1 || true
  for pid in $node $source; do kill "$pid" 2>/dev/null || true; done
  wait
  rm -rf --one-file-system "$work"
  exit "$status"
}
trap clean_up EXIT
command -v nbd-client >/dev/null || fail "nbd-client is missing: install the package nbd-client"

ip link set lo up
modprobe nbd
size=$((48 << 20))
truncate -s "$size" "$work/local.img"
head -c "$size" /dev/urandom >"$work/source.img"
nbdkit -f -r -U "$work/source.sock" file "$work/source.img" &
source=$!
"$LAZY_MIGRATE_BIN" --control "$control" serve --state-dir "$work/state" --nbd "unix:$work/nbd.sock" \
  --nbd 127.0.0.1:10809 >>"$work/node.log" 2>&1 &
node=$!
for _ in $(seq 600); do
  lm status >/dev/null 2>&1 && [ -S "$work/source.sock" ] && break
  kill -0 "$node" || fail "the node ended"
  sleep 0.05
done
lm add local "$work/local.img"
# Slow enough that most of it is fetched because it was asked for.
lm pull lazy --from "nbd+unix:///?socket=$work/source.sock" --rate 4M

# shellcheck disable=SC2034 # by name, below
unix=(-unix "$work/nbd.sock") tcp=(127.0.0.1 10809)
for address in unix tcp; do
  declare -n where=$address
  nbd-client -l "${where[@]}" >"$work/said" 2>&1 || fail "-l over $address: $(cat "$work/said")"
  for name in local lazy; do grep -q "^$name: " "$work/said" || fail "no $name over $address: $(cat "$work/said")"; done
  ! nbd-client -N nosuch "${where[@]}" "$device" >"$work/said" 2>&1 || fail "an export that is not there was attached"
  grep -qi 'unknown\|no export' "$work/said" || fail "it does not say that there is no such export: $(cat "$work/said")"
done

# attach NAME ADDRESS OPTION...
attach() {
  local name=$1
  declare -n where=$2
  shift 2
  nbd-client -N "$name" "${where[@]}" "$device" "$@" >"$work/said" 2>&1 || fail "nbd-client $*: $(cat "$work/said")"
  nbd-client -c "$device" >/dev/null || fail "$device is not connected"
  [ "$(blockdev --getsize64 "$device")" = "$size" ] || fail "the device has $(blockdev --getsize64 "$device") bytes"
}
detach() {
  nbd-client -d "$device" >"$work/said" 2>&1 || fail "nbd-client -d: $(cat "$work/said")"
  local sys=/sys/block/${device#/dev/}
  for _ in $(seq 200); do [ "$(cat "$sys/size")" = 0 ] && [ ! -e "$sys/pid" ] && return; sleep 0.05; done
  fail "$device is still there"
}
forget_cache() { sync -f "$mnt" && echo 3 >/proc/sys/vm/drop_caches; }

round=0
for disk in local lazy; do
  for how in 'unix 512 1' 'unix 4096 2' 'tcp 4096 1' 'tcp 512 2'; do
    read -r address block connections <<<"$how"
    round=$((round + 1))
    echo "== $disk over $address, blocks of $block, $connections connection(s)"
    attach "$disk" "$address" -b "$block" -C "$connections"
    [ "$(blockdev --getss "$device")" = "$block" ] || fail "the device has sectors of $(blockdev --getss "$device")"
    clients=$(lm status "$disk" --json | jq .clients)
    [ "$clients" = "$connections" ] || fail "$clients connections instead of $connections"
    # What the node has, is what the device shows; of the lazy one, most has to come first.
    if [ "$round" = 5 ]; then
      cmp "$device" "$work/source.img" || fail "the device differs from the source"
    fi
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    python3 - "$mnt" "$round" "$work/sums" <<'P'
import hashlib, os, random, sys
mount, seed, sums = sys.argv[1:]
generator = random.Random(int(seed))
with open(sums, "w") as list_:
    for number in range(30):
        data = generator.randbytes(generator.choice([1, 511, 4097, 100_000, 1_500_000]))
        with open(os.path.join(mount, str(number)), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        list_.write(f"{hashlib.sha256(data).hexdigest()}  {number}\n")
P
    forget_cache
    (cd "$mnt" && sha256sum --quiet -c "$work/sums") || fail "files differ"
    rm "$mnt"/1*
    fstrim "$mnt"
    umount "$mnt"
    detach
    # Attached anew, in the other way.
    if [ "$address" = unix ]; then other=tcp; else other=unix; fi
    attach "$disk" "$other" -b "$block"
    e2fsck -fn "$device" >"$work/fsck" 2>&1 || fail "e2fsck: $(cat "$work/fsck")"
    mount "$device" "$mnt"
    (cd "$mnt" && grep -v '  1' "$work/sums" | sha256sum --quiet -c) || fail "files differ after the remount"
    umount "$mnt"
    detach
  done
done
# As the image has it, without our program and without the device.
e2fsck -fn "$work/local.img" >"$work/fsck" 2>&1 || fail "e2fsck of the image: $(cat "$work/fsck")"
! dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|Buffer I/O' || fail "the kernel saw an error"
echo ok
