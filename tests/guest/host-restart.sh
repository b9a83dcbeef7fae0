#!/usr/bin/env bash
# A whole host is restarted in the middle, so that the memory there is gone. A's: the rollback brings the container back
# from its checkpoint, where it was frozen; so it does when only the frozen tasks were killed, and one that fails is told and
# tried again. B's: nothing starts by itself; the operator starts it from its disk.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
mib=${EXAMPLE_MIB:-60} link_rate=${EXAMPLE_RATE:-16mbit} fail_link=1
set_the_stage

phase() { on "$1" status web --json | jq -r .phase; }
is_phase() { [ "$(phase "$1")" = "$2" ]; }
begin() {
  : >"$work/timeline"
  in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >/dev/null 2>"$work/timeline" &
  migrating=$!
  wait_until 120 "the container was not resumed on B" resumed "$migrating"
  frozen_at=$(last_line "$log_a")
  wait_until 30 "the container does not run on B" log_above "$log_b" "$((frozen_at + 5))"
  wait_until 30 "the checkpoint is not kept" test -e "$work/a/state/disks/web/checkpoint.whole"
}

say "A is restarted, and takes the container back"
begin
host_dies a
stop_process "$migrating"
start_node a
is_phase a handed-over || fail "A is $(phase a)"
on a rollback web --wait --json >"$work/rollback.json" || fail "the rollback failed"
say "A: $(jq -c . "$work/rollback.json")"
goes_on "$log_a"
check_log "$log_a" || fail "A's log has a gap"
[ "$(sed -n "$((frozen_at + 1))p" "$log_a")" = "$((frozen_at + 1))" ] || fail "A did not go on from $frozen_at"
wait_until 30 "the client gets no replies" client_lives
wait_until 30 "B does not give up" is_phase b discarded
nothing_on_b

say "A's frozen tasks are killed, and its runtime fails when they are to come back"
on b remove web >&2
begin
pid=$("$work/a/runc" state web | jq .pid)
echo 1 >"/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/cgroup.kill"
cp "$work/a/runc" "$work/a/runc.right"
cat >"$work/a/runc" <<R
#!/bin/bash
case " \$* " in *" restore "*) echo "no memory left" >&2; exit 1 ;; esac
exec $work/a/runc.right "\$@"
R
refused 1 'does not go on; put right what follows, then .lazy-migrate rollback web. tries again: .*brought back from its checkpoint' \
  on a rollback web --wait
stop_process "$migrating"
[ "$(on a status web --json | jq -r '.phase + " " + .container_state')" = "serving stuck" ] || fail "A is $(on a status web --json)"
on a status web | grep -q 'container web DOES NOT GO ON' || fail "A says: $(on a status web)"
on a rollback web --plan | grep -q 'already, but container web does not go on' || fail "planned: $(on a rollback web --plan)"
refused 3 'container web of an earlier migration does not go on here; .lazy-migrate rollback web. tries again' \
  on a prepare web --to 10.78.0.2:10810
cp "$work/a/runc.right" "$work/a/runc"
mv "$work/a/bundles/web/config.json" "$work/config.json"
refused 1 'brought back from its checkpoint.*cannot read its config.json' on a rollback web
kill -KILL "${node_pid[a]}"
wait "${node_pid[a]}" 2>/dev/null || true
start_node a
is_stuck() { [ "$(on a status web --json | jq -r .container_state)" = stuck ]; }
wait_until 30 "the restarted node does not try it" is_stuck
mv "$work/config.json" "$work/a/bundles/web/config.json"
said=$(on a rollback web) || fail "it was not tried again"
[[ $said == *"container web goes on" ]] || fail "rollback said: $said"
goes_on "$log_a"
check_log "$log_a" || fail "A's log has a gap"
[ "$(sed -n "$((frozen_at + 1))p" "$log_a")" = "$((frozen_at + 1))" ] || fail "A did not go on from $frozen_at"
wait_until 30 "the client gets no replies" client_lives
[ "$(on a status web --json | jq -c '[.phase, .container, .container_state]')" = '["serving",null,null]' ] || fail "A is $(on a status web --json)"

say "B is restarted, and its container's memory is gone"
on b remove web >&2
begin
host_dies b
start_node b
container() { on b status web --json | jq -r .container_state; }
is_gone() { [ "$(container)" = gone ]; }
wait_until 30 "B says that its container is $(container)" is_gone
wait_until 30 "B's disk does not come back" is_phase b active
is_phase a handed-over || fail "A was released although nobody has the container's memory"
[ -z "$("$work/b/runc" list -q)" ] || fail "B started something by itself"
refused 3 'did not come to this host' on a cold-start web
said=$(on b cold-start web) || fail "it could not be started"
[ "$said" = "web: web runs again, from its disk alone" ] || fail "cold-start said: $said"
goes_on "$log_b"
check_log "$log_b" || fail "B's log has a gap"
refused 3 'can be started anew only when it is gone' on b cold-start web
pgrep -f "guard --lease $work/b/" >/dev/null || fail "nobody guards the container"
on b wait web --for complete --timeout 120s >&2
wait_until 20 "A does not know that it is over" is_phase a released
(cd "$work/b/mnt/web/rootfs" && sha256sum --quiet -c "$work/sums") || fail "files differ"
stop_process "$migrating"
