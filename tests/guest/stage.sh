# shellcheck shell=bash
# What the guest tests that move a container begin with: the example's stage, and questions about what is on it. Sourced.
# Uses: LAZY_MIGRATE_BIN. Sets what examples/live-migration/hosts.sh uses.
# shellcheck disable=SC2034,SC2154
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
programs=$(mktemp -d)
for program in service client; do
  gcc -static -O1 -o "$programs/$program" "$repo/examples/live-migration/$program.c"
done
install "$LAZY_MIGRATE_BIN" "$programs/lazy-migrate"
. "$repo/examples/live-migration/hosts.sh"
mib=${EXAMPLE_MIB:-24} fail_link=0
work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" live-migration.XXXXXX)
start=$(date +%s%N)
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

migrate=(migrate web --to 10.78.0.2:10810 --container web --runtime runc --tcp-established --json)

# refused STATUS WORDS COMMAND...: it ends with that status and one line that has the words in it, and no more.
refused() {
  local want=$1 words=$2 got=0
  shift 2
  "$@" >"$work/stdout" 2>"$work/stderr" || got=$?
  grep -v '^ *[0-9]* ms  ' "$work/stderr" >"$work/error" || true
  [ "$got" = "$want" ] || fail "status $got instead of $want from: $*; it said: $(cat "$work/stderr")"
  [ "$(wc -l <"$work/error")" = 1 ] || fail "more than a line, or none: $(cat "$work/error")"
  grep -q -- "$words" "$work/error" || fail "'$words' is not in: $(cat "$work/error")"
  say "as it should be, status $got: $(cat "$work/error")"
}

# goes_on LOG: it grows. (An emulated host that does other things at the same time takes its time.)
goes_on() {
  local from
  from=$(last_line "$1")
  wait_until 20 "the service does not go on from $from" log_above "$1" "$from"
}

# nothing_on_b: no container, no process, no mount, no device, no control group, no rule, no file of the disk.
nothing_on_b() {
  wait_until 20 "B has not tidied up: $(left_on_b)" b_is_tidy
}
b_is_tidy() { [ -z "$(left_on_b)" ]; }
left_on_b() {
  "$work/b/runc" list -q
  find "$work/b/runc-state" -mindepth 1 2>/dev/null
  grep -o " $work/b/[^ ]*" /proc/self/mountinfo
  grep -l "$work/b/" /sys/block/nbd*/backend 2>/dev/null
  find /sys/fs/cgroup -maxdepth 1 -name 'lazy-migrate-*' ! -name '*-back' # which is A's
  inside cb nft list chains | grep CRIU
  # A container that ran there stays silent there until its disk is removed.
  [ "$(on b status web --json 2>/dev/null | jq -r .phase)" = discarded ] || inside cb nft list chains | grep lazy_migrate
  find "$work/b/state/disks" -mindepth 1 -maxdepth 1 ! -name web
  [ ! -e "$work/b/state/disks/web" ] || [ "$(on b status web --json 2>/dev/null | jq -r .phase)" = discarded ] ||
    find "$work/b/state/disks/web"
  find "$work/b/state/disks" -path '*/web/images*'
  pgrep -a criu
  true
}

# a_is_as_it_was: the container runs on A, its log has no gap, the client kept its connection, the disk is A's.
a_is_as_it_was() {
  goes_on "$log_a"
  check_log "$log_a" || fail "A's log has a gap"
  [ "$(on a status web --json | jq -r .phase)" = serving ] || fail "A does not serve: $(on a status web)"
  wait_until 30 "the client gets no replies" client_lives
  ! inside ca nft list tables | grep lazy_migrate || fail "packets of A's container are still dropped"
}

# client_is_content: it has lost nothing, and never had to connect again. Ends it.
client_is_content() {
  stop_client
  jq -e '.lost == 0 and .connections == 1' "$work/client.json" >/dev/null || fail "the client lost something"
}

# move_for_good: a migration that succeeds, as in the end each test has one.
move_for_good() {
  on a "${migrate[@]}" >"$work/migrate.json" || fail "the migration failed"
  goes_on "$log_b"
  check_log "$log_b" || fail "B's log has a gap"
  wait_until 30 "the client gets no replies from B" client_lives
}

# host_dies HOST: no process, mount, device, namespace rule or runtime state of it is left; its disks are. Nothing is flushed
# on the way: the device goes first.
host_dies() {
  local host=$1 dir name pid
  # What its kernel knows of connections is gone as well, unheard by anybody.
  inside "c$host" nft 'add table inet dead; add chain inet dead out { type filter hook output priority raw; policy drop; }'
  inside "c$host" ss -K -t state connected >/dev/null
  kill -KILL "${node_pid[$host]}"
  wait "${node_pid[$host]}" 2>/dev/null || true
  for pid in $(pgrep -f "guard --lease $work/$host/"); do kill -KILL "$pid"; done
  for dir in /sys/block/nbd*; do
    ! grep -qs "$work/$host/" "$dir/backend" || nbd-client -d "/dev/${dir##*/}" >/dev/null
  done
  for name in $("$work/$host/runc" list -q); do
    pid=$("$work/$host/runc" state "$name" | jq .pid)
    # It may have died of its dead disk.
    [ "$pid" = 0 ] || echo 1 >"/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/cgroup.kill"
    "$work/$host/runc" delete -f "$name" >/dev/null 2>&1 || true
  done
  # A frozen filesystem would keep its device.
  timeout 20 fsfreeze -u "$work/$host/mnt/web" 2>/dev/null || true
  umount "$work/$host/mnt/web"
  wait_until 20 "the device of $host is still there" no_device "$host"
  rm -rf --one-file-system "$work/$host/runc-state" "$work/$host"/*.lease
  inside "c$host" nft flush ruleset
}
no_device() { ! grep -qs "$work/$1/" /sys/block/nbd*/backend; }
