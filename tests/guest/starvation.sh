#!/usr/bin/env bash
# The link hangs for less than the lease, and a read of the container on B waits: the container is frozen before its file
# system sees anything, and goes on when the data is there.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
mib=${EXAMPLE_MIB:-60} link_rate=${EXAMPLE_RATE:-16mbit}
serve_options=(--starve-after 500ms --lease 60s)
set_the_stage
in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >"$work/migrate.json" 2>"$work/timeline" &
migrating=$!
wait_until 120 "the container was not resumed on B" resumed "$migrating"
status() { on b status web --json | jq -r "$1"; }
is() { [ "$(status "$1")" = "$2" ]; }
cut_link
wait_until 30 "the container is not frozen: $(on b status web --json)" is .container_state starved
grep -qx 1 /sys/fs/cgroup/lazy-migrate-web-*/cgroup.freeze || fail "the container's group is not frozen"
is .phase active || fail "B is $(status .phase): its lease should hold"
mend_link
wait_until 60 "the container does not go on: $(on b status web --json)" is .container_state running
wait "$migrating" || fail "the migration failed: $(cat "$work/timeline")"
goes_on "$log_b"
check_log "$log_b" || fail "B's log has a gap"
wait_until 30 "the client gets no replies from B" client_lives
client_is_content
# On A the filesystem is unmounted from a disk that is read-only for good; that is heard of.
device=$(findmnt -no SOURCE "$work/b/mnt/web")
dmesg | grep -E "(I/O error|EXT4-fs error).*${device##*/}|hung" && fail "B's kernel saw an error"
true
