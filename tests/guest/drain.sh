#!/usr/bin/env bash
# A host is emptied of its containers: three of them, each on a disk of its own, leave it two at a time by examples/drain.sh.
# All of them go on counting where they come to, and nothing of them is left where they were.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
mib=3
names=(one two three)
to=10.78.0.2:10810

drained() {
  LAZY_MIGRATE=$programs/lazy-migrate LAZY_MIGRATE_CONTROL=$work/a/control.sock \
    timeout 300 "$repo/examples/drain.sh" --to "$to" -j 2 "$@" 2> >(tee -a "$work/said" >&2)
}
clean_up_containers() {
  local status=$? name host
  for name in "${names[@]}"; do
    for host in a b; do ip netns del "$prefix-$name-$host" 2>/dev/null || true; done
  done
  (exit "$status")
  clean_up
}
trap clean_up_containers EXIT

# bundle HOST NAME: as make_bundle's, with nobody to talk to but itself.
bundle() {
  local bundle=$work/$1/bundles/$2
  mkdir -p "$bundle"
  ip netns add "$prefix-$2-$1"
  ip -n "$prefix-$2-$1" link set lo up
  jq --arg root "$work/$1/mnt/$2/rootfs" --arg netns "/run/netns/$prefix-$2-$1" --arg cgroup "/$prefix-$1/$2" '
    .root = {path: $root, readonly: false} | .process.terminal = false | .process.args = ["/service", "127.0.0.1"]
    | .linux.cgroupsPath = $cgroup | .linux.namespaces |= map(select(.type != "cgroup"))
    | (.linux.namespaces[] | select(.type == "network")).path = $netns' "$work/config.json" >"$bundle/config.json"
}
counts_at() { echo "$work/$1/mnt/$2/rootfs/log"; }
# In a while: three of them share what there is.
counts_on() { wait_until 30 "a container does not count on: $1" log_above "$1" "$(last_line "$1")"; }

make_network
start_node a
start_node b
say "A: ${#names[@]} disks, each with a container"
# Every process takes its time in a guest: what can be made once is copied.
truncate -s 24M "$work/image"
mkfs.ext4 -q -O ^has_journal -E lazy_itable_init=0 "$work/image"
mkdir "$work/filled"
mount -o loop "$work/image" "$work/filled"
make_root "$work/filled/rootfs"
(cd "$work/filled/rootfs" && sha256sum data/*) >"$work/sums"
umount "$work/filled"
(cd "$work" && runc spec)
for name in "${names[@]}"; do
  cp --sparse=always "$work/image" "$work/a/$name.img"
  on a add "$name" "$work/a/$name.img" >&2
  mkdir -p "$work/a/mnt/$name"
  mount "$(on a attach "$name")" "$work/a/mnt/$name"
  bundle a "$name"
  bundle b "$name"
  "$work/a/runc" run -d -b "$work/a/bundles/$name" "$name" </dev/null >/dev/null 2>&1 || fail "runc could not start $name"
done
for name in "${names[@]}"; do
  wait_until 30 "$name does not count" log_above "$(counts_at a "$name")" 3
done

# The first criu of a boot learns what the kernel has, which takes seconds: not for all of them at once.
criu check >/dev/null 2>&1 || true
say "A is drained, two at a time"
# What a busy machine was too slow for goes on where it was, and moves the next time: the script may be typed again.
for attempt in 1 2 3; do
  drained --runtime runc --tcp-established && break
  grep -q 'not moved: ' "$work/said" || fail "the drain failed, and does not say what stayed: $(cat "$work/said")"
  for name in "${names[@]}"; do
    [ "$(on a status "$name" --json | jq -r .phase)" = released ] || counts_on "$(counts_at a "$name")"
  done
  [ "$attempt" -lt 3 ] || fail "the drain failed three times: $(cat "$work/said")"
done
grep -qE "^drain: all [1-3] have moved to $to$" "$work/said" || fail "it does not say that all have moved: $(cat "$work/said")"

for name in "${names[@]}"; do
  log=$(counts_at b "$name")
  counts_on "$log"
  check_log "$log" || fail "$name's log has a gap"
  [ "$(on b verify "$name" --json | jq .verified)" = true ] || fail "$name differs"
  (cd "$work/b/mnt/$name/rootfs" && sha256sum --quiet -c "$work/sums" >&2) || fail "$name's files differ"
  [ "$(on b status "$name" --json | jq -r .phase)" = complete ] || fail "$name on B: $(on b status "$name" --json)"
  [ "$(on a status "$name" --json | jq -r .phase)" = released ] || fail "A still owns $name"
done
say "never more than two were under way, and two were"
on a events --json | jq -s -e '
  [.[] | select(.event == "phase" and .phase == "preparing" or .event == "migrated"
    or .event == "migrate-failed") | {seq, by: (if .event == "phase" then 1 else -1 end)}]
  | sort_by(.seq) | reduce .[] as $e ({now: 0, most: 0}; .now += $e.by | .most = ([.most, .now] | max)) | .most == 2 and .now == 0' \
  >/dev/null || fail "that many at a time: $(on a events)"

ended() { [ "$("$work/b/runc" state "$1" 2>/dev/null | jq -r .status)" != running ]; }
say "A has nothing left of them"
left_on_a() {
  "$work/a/runc" list -q
  grep -o " $work/a/mnt/[^ ]*" /proc/self/mountinfo
  on a status --json | jq -r '.disks[] | select(.device != null).name'
  find "/sys/fs/cgroup/$prefix-a" -mindepth 1 -type d 2>/dev/null
  true
}
# What is held for a moment is tried again every two seconds.
end=$((SECONDS + 40))
while left=$(left_on_a) && [ -n "$left" ]; do
  [ "$SECONDS" -lt "$end" ] || fail "left on A: $left"
  sleep 0.05
done
drained || fail "a second time: $(tail -n 1 "$work/said")"
tail -n 1 "$work/said" | grep -qx 'drain: nothing to move' || fail "a second time: $(tail -n 1 "$work/said")"
for name in "${names[@]}"; do on a remove "$name" >&2; done
[ -z "$(find "$work/a/state/disks" -mindepth 1)" ] || fail "A's state: $(find "$work/a/state/disks")"
# While B's node still serves their disks: without it, ending each takes its time limits.
for name in "${names[@]}"; do
  "$work/b/runc" kill "$name" KILL >/dev/null 2>&1 || true
  wait_until 20 "$name on B does not end" ended "$name"
  "$work/b/runc" delete -f "$name" >/dev/null 2>&1 || true
  wait_until 20 "the disk $name is still in use on B" umount "$work/b/mnt/$name"
  on b detach "$name" >&2 || true
done
