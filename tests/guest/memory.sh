#!/usr/bin/env bash
# A container with much memory, most of it quiet, moves with `--memory precopy`: what is dumped in the pause is a small part,
# the pause is shorter, and its memory is right, also when it comes back by a rollback, or from its checkpoint after a restart
# of the host.
# tests/run: timeout=1200 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
mib=${EXAMPLE_MIB:-48} memory_mib=64 link_rate=${EXAMPLE_RATE:-40mbit} fail_link=1
precopy=("${migrate[@]}" --memory precopy)
set_the_stage
wait_until 60 "the service has not looked at all of its memory once" log_above "$log_a" "$((memory_mib * 256 / 64))"

phase() { on "$1" status web --json | jq -r .phase; }
is_phase() { [ "$(phase "$1")" = "$2" ]; }
images_on_a() { find "$work/a/state/disks/web" -name 'checkpoint*' ! -name checkpoint.probe ! -name checkpoint.bundle; }
no_images_on_a() { [ -z "$(images_on_a)" ]; }
# begin OPTIONS...: a migration in the background; begin_until_resumed: until the container runs on B.
begin() {
  : >"$work/timeline"
  in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "$@" >"$work/migrate.json" 2>"$work/timeline" &
  migrating=$!
}
begin_until_resumed() {
  begin "$@"
  wait_until 300 "the container was not resumed on B" resumed "$migrating"
  frozen_at=$(last_line "$log_a")
  wait_until 30 "the container does not run on B" log_above "$log_b" "$((frozen_at + 5))"
}
comes_back() {
  # On a slow host B's word may bring the disk back between two askings of it.
  on a rollback web --wait --json >"$work/rollback.json" || wait_until 60 "the rollback failed" is_phase a serving
  say "A: $(jq -c . "$work/rollback.json")"
  wait "$migrating" || true
  goes_on "$log_a"
  [ "$(sed -n "$((frozen_at + 1))p" "$log_a")" = "$((frozen_at + 1))" ] || fail "A did not go on from $frozen_at"
  wait_until 30 "B does not give up" is_phase b discarded
  on b remove web >/dev/null
  nothing_on_b
  a_is_as_it_was
}
milliseconds() { grep -oP 'frozen for \K[0-9]+' "$work/timeline"; }
# looked_at_all LOG: the service goes on until it has looked at all of its memory.
looked_at_all() {
  wait_until 120 "the service does not go on: $2" log_above "$1" "$(($(last_line "$1") + memory_mib * 256 / 64 + 10))"
}

say "without precopy: all of the memory in the pause"
begin_until_resumed "${migrate[@]}"
frozen_ms=$(milliseconds)
comes_back

say "with precopy, and back by a rollback"
begin_until_resumed "${precopy[@]}"
precopy_ms=$(milliseconds)
sed 's/^/  | /' "$work/timeline" >&2
on a events --json | jq -s '
  (map(.event == "precopied") | rindex(true)) as $last | .[$last].round as $rounds
  | [.[$last - $rounds + 1:$last + 1][].image_bytes] + [.[$last:][] | select(.event == "checkpointed").image_bytes]' >"$work/sizes"
say "bytes of the rounds, and of the dump: $(jq -c . "$work/sizes")"
jq -e 'length >= 3 and .[0] > 60 * 1048576 and .[-1] < .[0] / 4' "$work/sizes" >/dev/null || fail "the dump is no small part"
[ "$(readlink "$work/a/state/disks/web/checkpoint/parent")" = "pre-$(($(jq length "$work/sizes") - 1))" ] || fail "no chain"
is_phase a handed-over || fail "A is $(phase a): too late for a rollback; a slower link helps"
comes_back
looked_at_all "$log_a" "on A after a rollback"
no_images_on_a || fail "A keeps $(images_on_a)"

say "with precopy, and A's host is restarted: back from the chain of images"
begin_until_resumed "${precopy[@]}"
wait_until 30 "the checkpoint is not kept" test -e "$work/a/state/disks/web/checkpoint.whole"
host_dies a
stop_process "$migrating"
start_node a
is_phase a handed-over || fail "A is $(phase a)"
comes_back
looked_at_all "$log_a" "on A, restored"

say "with precopy, for good"
on a "${precopy[@]}" >"$work/migrate.json" || fail "the migration failed"
looked_at_all "$log_b" "on B"
check_log "$log_b" || fail "B's log has a gap"
wait_until 30 "the client gets no replies from B" client_lives
stop_client
no_images_on_a || fail "A keeps $(images_on_a)"
[ -z "$(find "$work/b/state/disks/web" -path '*images*')" ] || fail "B keeps the images"
say "frozen for $frozen_ms ms without precopy, $precopy_ms ms with it, $(jq .frozen_ms "$work/migrate.json") ms the last time"
