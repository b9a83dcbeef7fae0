#!/usr/bin/env bash
# Both nodes are killed while the disk arrives and the container already runs on B: they go on where they were, and the
# container and its client with them, but not before they have found each other. Then the container moves back to A with the disk, which is complete.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
mib=${EXAMPLE_MIB:-90}
set_the_stage

kill_node() {
  kill -KILL "${node_pid[$1]}"
  wait "${node_pid[$1]}" 2>/dev/null || true
}
phase() { on "$1" status web --json | jq -r .phase; }
is_phase() { [ "$(phase "$1")" = "$2" ]; }

in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >/dev/null 2>"$work/timeline" &
migrating=$!
wait_until 120 "the container was not resumed on B" resumed "$migrating"

say "both nodes are killed"
kill_node b
kill_node a
wait "$migrating" && fail "the command says that all is well, but its node was killed"
device=$(findmnt -no SOURCE "$work/b/mnt/web")

say "B: its node is back, hears nothing of A, and lets nothing run"
start_node b
is_phase b fenced || fail "B is $(phase b): all was there before the nodes could be killed; a larger EXAMPLE_MIB than $mib helps"
[ "$(on b status web --json | jq -r .device)" = "$device" ] || fail "B did not take $device over"
# A task that waits for the disk stands still as well, and is frozen when it wakes: so what was asked for is looked at.
grep -qx 1 /sys/fs/cgroup/lazy-migrate-web-*/cgroup.freeze || fail "B's container is not frozen"
b_runs && fail "B's container runs without a lease"

say "A: its node is back"
start_node a
wait_until 30 "the container does not go on on B" is_phase b active
last=$(last_line "$log_b")
wait_until 30 "the container does not go on on B" log_above "$log_b" $((last + 20))
on b wait web --for complete --timeout 120s >&2
wait_until 20 "A does not know that it is over" is_phase a released
goes_on "$log_b"
on b verify web --json >"$work/verify.json" || fail "verify: $(cat "$work/verify.json")"
check_log "$log_b" || fail "B's log has a gap"
wait_until 30 "the client gets no replies from B" client_lives
[ -z "$("$work/a/runc" list -q)" ] || fail "A still has the container"

say "and back to A"
on a remove web >&2
on b migrate web --to 10.78.0.1:10810 --container web --runtime runc --tcp-established --json >"$work/migrate.json" ||
  fail "the way back failed"
goes_on "$log_a"
check_log "$log_a" || fail "A's log has a gap"
wait_until 30 "the client gets no replies from A" client_lives
client_is_content
sync -f "$work/a/mnt/web" && echo 3 >/proc/sys/vm/drop_caches
(cd "$work/a/mnt/web/rootfs" && sha256sum --quiet -c "$work/sums") || fail "files differ"
[ -z "$("$work/b/runc" list -q)" ] || fail "B still has the container"
