#!/usr/bin/env bash
# A new binary under a running container: on the host that serves it, and on the one that it has just come to. The container
# never sees an error, its client keeps its connection.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
mib=${EXAMPLE_MIB:-60} link_rate=${EXAMPLE_RATE:-16mbit}
set_the_stage
phase() { on "$1" status web --json | jq -r .phase; }
export LAZY_MIGRATE=$programs/lazy-migrate
upgrade() {
  local host=$1 pid=${node_pid[$1]}
  # What start_node does, in a shell that ends: the node's number is found again by what it is.
  cat >"$work/start" <<S
set -euo pipefail
. $repo/examples/live-migration/hosts.sh
prefix=$prefix work=$work programs=$programs start=$start
declare -A node_pid
start_node $host
echo "\${node_pid[$host]}" >$work/new-pid
S
  cp "$programs/lazy-migrate" "$work/new-binary"
  LAZY_MIGRATE_CONTROL=$work/$host/control.sock "$repo/examples/upgrade-node.sh" \
    --stop "kill -TERM $pid; while readlink /proc/$pid/exe >/dev/null; do sleep 0.02; done" \
    --install "mv $work/new-binary $programs/lazy-migrate" --start "bash $work/start" 2>"$work/said" ||
    fail "the upgrade failed: $(cat "$work/said")"
  say "$(cat "$work/said")"
  node_pid[$host]=$(cat "$work/new-pid")
  [ "$(readlink "/proc/${node_pid[$host]}/exe")" = "$programs/lazy-migrate" ] || fail "the old binary runs"
}

say "A's node is upgraded while it serves"
before=$(last_line "$log_a")
upgrade a
wait_until 20 "the service does not go on" log_above "$log_a" "$((before + 20))"
wait_until 30 "the client gets no replies" client_lives

in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >/dev/null 2>"$work/timeline" &
migrating=$!
wait_until 120 "the container was not resumed on B" resumed "$migrating"
say "B's node is upgraded while the disk arrives"
upgrade b
[ "$(phase a)" = handed-over ] || fail "A is $(phase a): all was pulled before B could be upgraded; a lower EXAMPLE_RATE than $link_rate helps"
say "and A's, which it arrives from"
upgrade a
wait "$migrating" && fail "the command says that all is well, but its node was restarted"
on b wait web --for complete --timeout 120s >&2
goes_on "$log_b"
check_log "$log_b" || fail "B's log has a gap"
wait_until 30 "the client gets no replies from B" client_lives
client_is_content
(cd "$work/b/mnt/web/rootfs" && sha256sum --quiet -c "$work/sums") || fail "files differ"
# On A the filesystem is unmounted from a disk that is read-only for good; that is heard of.
device=$(findmnt -no SOURCE "$work/b/mnt/web")
dmesg | grep -E "(I/O error|EXT4-fs error).*${device##*/}|hung" && fail "B's kernel saw an error"
true
