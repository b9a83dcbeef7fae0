#!/usr/bin/env bash
# The part of examples/live-migration.sh that needs the NBD device and criu: two hosts as network namespaces, a
# container on the one, a client that talks to it, and the move to the other. Run by the outer script, on this machine or
# in the guest, as root. The story goes to stderr, the one line of JSON to stdout.
#
#   inner.sh PROGRAMS [--fail-link]     PROGRAMS: the directory with lazy-migrate, service and client
#   EXAMPLE_MIB (150): size of the files that the container holds
#   EXAMPLE_SECONDS (3): how long it runs before the move
#   EXAMPLE_LOGS: a directory that gets the nodes' logs
#   EXAMPLE_REPORTS: a directory that gets what migrate answered, and both hosts' reports of the move, as pages and as JSON
#
#           hosta  10.78.0.1 --+              +-- 10.78.0.2  hostb          the two nodes, and the migration's link
#                              +---- wire ----+
#   container on A 10.77.0.10 -+              +- 10.77.0.10  container on B  the same address: the container moves
#                                     |
#                                 10.77.0.1 client
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/hosts.sh"

programs=$1 fail_link=0
[ "${2:-}" != --fail-link ] || fail_link=1
# With a link to cut, the pull has to last for a while.
mib=${EXAMPLE_MIB:-$((150 + 150 * fail_link))} seconds=${EXAMPLE_SECONDS:-3}
work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" live-migration.XXXXXX)
start=$(date +%s%N)
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

set_the_stage
sleep "$seconds"
say "A: the service has written $(last_line "$log_a") numbers to its disk, and answers the client"

# The timeline and the progress of the pull are the tool's own words.
migrate=(migrate web --to 10.78.0.2:10810 --container web --runtime runc --tcp-established --json)
if [ "$fail_link" = 0 ]; then
  say "A: lazy-migrate ${migrate[*]}"
  on a "${migrate[@]}" >"$work/migrate.json" || fail "the migration failed (status $?)"
  on b wait web --for complete --timeout 300s >&2
  wait_until 30 "the service does not go on on B" log_above "$log_b" $(($(last_line "$log_b") + 20))
  stop_client
  verified=true
  on b verify web --json >"$work/verify.json" || verified=false
  [ "$(jq .verified "$work/verify.json")" = true ] || verified=false
  say "B: verify says $(jq -c . "$work/verify.json")"
  # And without asking our own program:
  check_log "$log_b" || verified=false
  [ "$(last_line "$log_b")" -ge "$(jq .last_number "$work/client.json")" ] ||
    { say "B: a number that the client was told is durable is not in the log"; verified=false; }
  # Read from the disk, not from what was cached while it was being filled.
  sync -f "$work/b/mnt/web" && echo 3 >/proc/sys/vm/drop_caches
  (cd "$work/b/mnt/web/rootfs" && sha256sum --quiet -c "$work/sums" >&2) || { say "B: files differ"; verified=false; }
  if [ -n "${EXAMPLE_REPORTS:-}" ]; then
    cp "$work/migrate.json" "$EXAMPLE_REPORTS"
    for host in a b; do
      on "$host" report web --json >"$EXAMPLE_REPORTS/$host.json"
      on "$host" report web --html "$EXAMPLE_REPORTS/$host.html" >&2
    done
  fi
  jq -c -n --slurpfile m "$work/migrate.json" --slurpfile c "$work/client.json" --argjson verified "$verified" '
    {frozen_ms: $m[0].frozen_ms, client_longest_gap_ms: $c[0].longest_gap_ms, client_lost: $c[0].lost,
     demand_fetches: $m[0].demand_fetches, pulled_bytes: $m[0].pulled_bytes, skipped_bytes: $m[0].skipped_bytes,
     total_s: $m[0].total_s, verified: $verified}'
  [ "$verified" = true ]
  exit
fi

say "A: lazy-migrate ${migrate[*]}   (and the link is cut when B has resumed)"
began=$(date +%s%N)
in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >"$work/migrate.json" 2> >(tee "$work/timeline" >&2) &
migrating=$!
wait_until 180 "the container was not resumed on B" resumed "$migrating"
frozen_at=$(last_line "$log_a")
wait_until 20 "the container does not run on B" log_above "$log_b" "$frozen_at"
status=$(on a status web --json)
[[ $(jq -r .phase <<<"$status") =~ ^[Hh]anded[-_]?[Oo]ver$ ]] ||
  fail "A is $(jq -r .phase <<<"$status"): all was pulled before the link could be cut; a larger EXAMPLE_MIB than $mib helps"
cut_link
on_b=$(last_line "$log_b")
say "the link between A and B is cut; A: frozen at $frozen_at; B: went on to $on_b at least"
first_sum=$(sha256sum <"$work/a/web.img")
sleep 2
[ "$(last_line "$log_a")" = "$frozen_at" ] || fail "A's container wrote after the handover"
second_sum=$(sha256sum <"$work/a/web.img")
on a rollback web --plan >&2 || true
say "A: rollback web --wait"
on a rollback web --wait --json >"$work/rollback.json" || fail "the rollback failed (status $?)"
say "A: $(jq -c . "$work/rollback.json")"
stop_process "$migrating"

verified=true
wait_until 30 "the service does not go on on A" log_above "$log_a" $((frozen_at + 20))
b_runs && { say "B: its container runs beside A's"; verified=false; }
check_log "$log_a" || verified=false
say "A: the service went on from $frozen_at and is at $(last_line "$log_a")"
wait_until 30 "the client gets no replies from A" client_lives
stop_client
[ "$first_sum" = "$second_sum" ] || { say "A: the disk changed between handover and rollback"; verified=false; }
# Not a sync of everything: B's fenced disk would hold it.
sync -f "$work/a/mnt/web" && echo 3 >/proc/sys/vm/drop_caches
(cd "$work/a/mnt/web/rootfs" && sha256sum --quiet -c "$work/sums" >&2) || { say "A: files differ"; verified=false; }
jq -c -n --slurpfile c "$work/client.json" --argjson status "$status" --argjson verified "$verified" \
  --argjson total "$((($(date +%s%N) - began) / 1000000))" '
  {frozen_ms: $status.frozen_ms, client_longest_gap_ms: $c[0].longest_gap_ms, client_lost: $c[0].lost,
   total_s: ($total / 1000), rolled_back: true, verified: $verified}'
[ "$verified" = true ]
