#!/usr/bin/env bash
# B's node hangs, or dies, under a container that runs: the guard stops the container when the lease ends, so that A can take
# it back and only one of them ever runs. And A does so by itself where it was told to.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
mib=${EXAMPLE_MIB:-60} link_rate=${EXAMPLE_RATE:-16mbit} fail_link=1
set_the_stage

# resumed_on_b OPTION...: the container runs on B, its disk still arriving; its node's command is left to itself.
resumed_on_b() {
  : >"$work/timeline"
  in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" "$@" >/dev/null 2>"$work/timeline" &
  migrating=$!
  wait_until 120 "the container was not resumed on B" resumed "$migrating"
  frozen_at=$(last_line "$log_a")
  wait_until 30 "the container does not run on B" log_above "$log_b" "$frozen_at"
  guard=$(pgrep -f "guard --lease $work/b/") || fail "nobody guards the container"
}
phase() { on "$1" status web --json | jq -r .phase; }
is_phase() { [ "$(phase "$1")" = "$2" ]; }
b_freezes() { grep -qsx 1 /sys/fs/cgroup/lazy-migrate-web-*/cgroup.freeze; }
gone() { ! kill -0 "$1" 2>/dev/null; }
# taken_back: A goes on from where it was frozen, and nothing of B's is left when its node can act again.
taken_back() {
  goes_on "$log_a"
  check_log "$log_a" || fail "A's log has a gap"
  [ "$(sed -n "$((frozen_at + 1))p" "$log_a")" = "$((frozen_at + 1))" ] || fail "A did not go on from $frozen_at"
}

say "B's node is stopped for longer than the lease; A takes the disk back meanwhile"
resumed_on_b
kill -STOP "${node_pid[b]}"
wait_until 30 "the guard does not freeze B's container" b_freezes
b_runs && fail "B's container runs without a lease"
on a rollback web --wait --json >"$work/rollback.json" || fail "the rollback failed"
say "A: $(jq -c . "$work/rollback.json")"
taken_back
b_runs && fail "B's container runs beside A's"
kill -CONT "${node_pid[b]}"
wait_until 30 "B does not give up" is_phase b discarded
nothing_on_b
wait_until 10 "the guard is still there" gone "$guard"
stop_process "$migrating"

say "B's node dies; A takes the disk back by itself"
on b remove web >&2
wait_until 30 "the client gets no replies" client_lives
resumed_on_b --on-link-failure rollback --link-timeout 4s
kill -KILL "${node_pid[b]}"
wait "${node_pid[b]}" 2>/dev/null || true
wait_until 40 "A does not take the disk back" is_phase a serving
taken_back
b_runs && fail "B's container runs beside A's"
kill -0 "$guard" || fail "the guard died with its node"
start_node b
wait_until 30 "B does not give up" is_phase b discarded
nothing_on_b
wait_until 10 "the guard is still there" gone "$guard"
stop_process "$migrating"

say "B's node dies and comes back before anybody took the disk back: the container goes on there"
on b remove web >&2
wait_until 30 "the client gets no replies" client_lives
resumed_on_b
kill -KILL "${node_pid[b]}"
wait "${node_pid[b]}" 2>/dev/null || true
wait_until 30 "the guard does not freeze B's container" b_freezes
start_node b
[ "$(pgrep -f "guard --lease $work/b/")" = "$guard" ] || fail "the guard was not taken over"
goes_on_b() { is_phase b active && log_above "$log_b" "$((frozen_at + 20))"; }
wait_until 30 "B does not go on" goes_on_b
on b wait web --for complete --timeout 120s >&2
goes_on "$log_b"
check_log "$log_b" || fail "B's log has a gap"
wait_until 10 "the guard is still there" gone "$guard"
[ "$(on b status web --json | jq '.stalled_us > 1000000')" = true ] || fail "the stall is not counted: $(on b status web --json)"
