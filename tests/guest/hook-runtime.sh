#!/usr/bin/env bash
# A service that is in no container moves with the operator's own commands: a tree of processes with a client, dumped and
# restored by plain criu, through examples/hooks. What those commands do wrong costs nothing, and the guard holds what
# they restored.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
migrate=(migrate web --to 10.78.0.2:10810 --container web --runtime hook --tcp-established --json)
# Long enough for something to happen during the pull.
link_rate=16mbit serve_options=(--lease 4s)

clean_up_services() {
  local status=$? group
  for group in /sys/fs/cgroup/"$prefix"-*/web /sys/fs/cgroup/lazy-migrate-web-*; do
    echo 1 >"$group/cgroup.kill" || true
  done 2>/dev/null
  for group in a b; do [ -z "${node_pid[$group]:-}" ] || kill -CONT "${node_pid[$group]}" || true; done 2>/dev/null
  for _ in $(seq 50); do
    rmdir /sys/fs/cgroup/"$prefix"-*/web /sys/fs/cgroup/"$prefix"-* /sys/fs/cgroup/lazy-migrate-web-* 2>/dev/null || true
    compgen -G "/sys/fs/cgroup/$prefix-*" >/dev/null || break
    sleep 0.1
  done
  (exit "$status")
  clean_up
}
trap clean_up_services EXIT

# Two hosts on one kernel: each node has mounts of its own, so that the disk has the same path on both, as plain criu needs.
start_hook_node() {
  local host=$1 address=$2
  make_certificates
  mkdir -p "$work/$host/state" "$work/mnt"
  sed -e "s:^root = .*:root = \"$work/mnt/%n/rootfs\":" -e "s:\"/services/:\"/$prefix-$host/:" \
    -e "s:^netns = .*:netns = \"/run/netns/$prefix-c$host\":" -e "s:/usr/lib/lazy-migrate/hooks/criu-tree:$work/$host/hook:" \
    "$repo/examples/hooks/hooks.toml" >"$work/$host/hooks.toml"
  hook "$host"
  in_background "host$host" unshare --mount --propagation private "$programs/lazy-migrate" --control "$work/$host/control.sock" \
    serve --state-dir "$work/$host/state" --peer "$address:10810" --tls "$work/$host/tls" --allow-peer 10.78.0.1 --allow-peer 10.78.0.2 \
    --runtime "hook=$work/$host/hooks.toml,root=$work/$host/records" --mount-dir "$work/mnt" "${serve_options[@]}" \
    </dev/null >>"$work/$host/node.log" 2>&1 &
  node_pid[$host]=$!
  wait_until 20 "the node of host $host does not answer" node_answers "$host"
}

# hook HOST [LINE]...: what that host's commands are: the example's; with lines, these come first.
hook() {
  local host=$1
  shift
  printf '%s\n' '#!/bin/bash' "$@" "exec $repo/examples/hooks/criu-tree" >"$work/$host/hook.new"
  chmod 755 "$work/$host/hook.new"
  mv "$work/$host/hook.new" "$work/$host/hook"
}

# at HOST COMMAND...: with that host's mounts.
at() {
  nsenter --mount="/proc/${node_pid[$1]}/ns/mnt" "${@:2}"
}

# ticks_go_on HOST: the tree's other half lives too.
ticks_go_on() {
  local file=/proc/${node_pid[$1]}/root$work/mnt/web/rootfs/ticks
  local from
  from=$(last_line "$file")
  wait_until 5 "the ticker does not go on from $from" log_above "$file" "$from"
  check_log "$file" || fail "the ticks have a gap"
}

a_is_well() {
  a_is_as_it_was
  ticks_go_on a
  wait_until 20 "B has not tidied up: $(left_on_b)" b_is_tidy
}
left_on_b() {
  compgen -G '/sys/fs/cgroup/lazy-migrate-*'
  find "$work/b/records" -type f 2>/dev/null
  grep -o " $work/mnt/[^ ]*" "/proc/${node_pid[b]}/mountinfo"
  grep -l "$work/b/" /sys/block/nbd*/backend 2>/dev/null
  inside cb nft list chains | grep CRIU
  find "$work/b/state/disks" -path '*/web/images*' 2>/dev/null
  pgrep -a criu
  true
}

say "two hosts, a disk, and on A a service: a supervisor, its ticker and a server, in a PID and a network namespace"
make_network
tc -n "$prefix-wire" qdisc add dev hostb root tbf rate "$link_rate" burst 64kb latency 100ms
start_hook_node a 10.78.0.1
start_hook_node b 10.78.0.2
truncate -s "$((mib + 100))M" "$work/a/web.img"
on a add web "$work/a/web.img" >&2
device=$(on a attach web)
mkfs.ext4 -q "$device"
at a mkdir -p "$work/mnt/web"
at a mount "$device" "$work/mnt/web"
root_a=/proc/${node_pid[a]}/root$work/mnt/web/rootfs
make_root "$root_a"
(cd "$root_a" && sha256sum data/*) >"$work/sums"
mkdir "$root_a/bin"
install /bin/busybox "$root_a/bin/busybox"
ln -s busybox "$root_a/bin/sh"
# What a shell gives its background commands to read.
mknod -m 666 "$root_a/dev/null" c 1 3
cat >"$root_a/init" <<'S'
/service 10.77.0.10 &
/bin/sh /ticker &
wait
S
cat >"$root_a/ticker" <<'S'
i=0
while :; do i=$((i + 1)); echo $i >>/ticks; busybox sleep 0.1; done
S
group=/sys/fs/cgroup/$prefix-a/web
mkdir -p "$group"
# shellcheck disable=SC2016 # another shell's
start_service='echo 0 >"$0/cgroup.procs" && exec chroot "$1" /bin/sh /init'
nsenter --net="/run/netns/$prefix-ca" --mount="/proc/${node_pid[a]}/ns/mnt" \
  unshare --pid --fork setsid /bin/sh -c "$start_service" "$group" "$work/mnt/web/rootfs" </dev/null >/dev/null 2>&1 &
log_a=$root_a/log log_b=/proc/${node_pid[b]}/root$work/mnt/web/rootfs/log
wait_until 30 "the service does not write to its log" log_above "$log_a" 3
announce a
start_client
open_b
ticks_go_on a

say "the checkpoint command says that all is well, and let the service run meanwhile"
# shellcheck disable=SC2016
hook a '[ "$LAZY_MIGRATE_ACTION" != checkpoint ] || { echo 0 >"$LAZY_MIGRATE_CGROUP_DIR/cgroup.freeze"; exit 0; }'
refused 1 'was not frozen when the dump had ended' on a "${migrate[@]}"
a_is_well
hook a

say "the service is more than one tree: criu would leave the rest behind"
setsid sleep 600 </dev/null >/dev/null 2>&1 &
echo $! >"$group/cgroup.procs"
refused 1 'are not one tree' on a "${migrate[@]}"
kill $!
a_is_well

say "the restore command fails, half way"
# shellcheck disable=SC2016
hook b '[ "$LAZY_MIGRATE_ACTION" != restore ] || { setsid sleep 600 >/dev/null 2>&1 & echo "not today" >&2; exit 1; }'
refused 1 'could not be restored.*not today' on a "${migrate[@]}"
a_is_well
! pgrep -x sleep -a | grep -w 600 || fail "what the restore command had started lives on"

hook b

say "all is right; and when B's node hangs, the guard holds what was restored"
in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >"$work/migrate.json" 2>"$work/timeline" &
migrating=$!
wait_until 120 "the service was not resumed on B" resumed "$migrating"
restored=$(compgen -G '/sys/fs/cgroup/lazy-migrate-web-*') || fail "B has no control group for it"
goes_on "$log_b"
kill -STOP "${node_pid[b]}"
wait_until 15 "nobody froze the service of a node that hangs" grep -qx 1 "$restored/cgroup.freeze"
kill -CONT "${node_pid[b]}"
wait_until 30 "the service was not thawed" grep -qx 'frozen 0' "$restored/cgroup.events"
status=0
wait "$migrating" || status=$?
[ "$status" = 0 ] || fail "the migration ended with status $status: $(tail -n 1 "$work/timeline")"
goes_on "$log_b"
check_log "$log_b" || fail "B's log has a gap"
ticks_go_on b
wait_until 30 "the client gets no replies from B" client_lives
client_is_content
say "B: verify, and without asking our own program"
tc -n "$prefix-wire" qdisc del dev hostb root
[ "$(on b verify web --json | jq .verified)" = true ] || fail "the disk differs"
(cd "/proc/${node_pid[b]}/root$work/mnt/web/rootfs" && sha256sum --quiet -c "$work/sums" >&2) || fail "files differ"
grep -qx 'populated 0' "$group/cgroup.events" || fail "A's service was not ended"
[ "$(cat "$group/cgroup.freeze")" = 0 ] || fail "what is started next in A's group would be born frozen"
say "moved, whole, and nothing of it runs on A"
