# shellcheck shell=bash
# The stage of inner.sh: namespaces, nodes, bundles, the client, and the clean-up of all of it. Sourced.
# Uses: programs, work, start, mib, fail_link.
# shellcheck disable=SC2154

# Everything that has a name outside $work begins with this.
prefix=lm-example
declare -A node_pid=()
client_pid=''
# More options for both nodes, and how fast the link towards B is (as tc says it; without it, as fast as it can).
serve_options=() link_rate=''
# How large a file the service overwrites all the while, and how many pages of it each 20 ms; 0: none.
churn_mib=0 churn_pages=0
# How many MiB of memory the service holds, most of them quiet; 0: next to none.
memory_mib=0

say() {
  local ms=$((($(date +%s%N) - start) / 1000000))
  printf '[%3d.%03d] %s\n' $((ms / 1000)) $((ms % 1000)) "$*" >&2
}

fail() {
  say "FAILED: $*"
  local host
  for host in a b; do
    [ ! -s "$work/$host/node.log" ] || tail -n 15 "$work/$host/node.log" | sed "s/^/  node $host | /" >&2
  done
  # Whom the client talks to, and where the switch thinks that it is.
  for host in client ca cb; do
    inside "$host" ss -Htan 2>/dev/null | sed "s/^/  $host | /" >&2 || true
  done
  bridge -n "$prefix-wire" fdb show br service 2>/dev/null | grep -i 02:00:00:00:00:77 | sed 's/^/  switch | /' >&2 || true
  exit 1
}

# wait_until SECONDS WHAT-IF-NOT COMMAND...
wait_until() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || fail "$what"
    sleep 0.05
  done
}

# Only the network is the host's own: `ip netns exec` would make a mount namespace, which criu refuses, and in which
# the node's mounts would be its own.
inside() {
  local name=$1
  shift
  nsenter --net="/run/netns/$prefix-$name" "$@"
}

# The same for what goes on in the background: the process itself is what $! names.
in_background() {
  local name=$1
  shift
  exec nsenter --net="/run/netns/$prefix-$name" "$@"
}

# on HOST COMMAND...: the command line tool, as that host's operator would call it.
on() {
  local host=$1
  shift
  inside "host$host" "$programs/lazy-migrate" --control "$work/$host/control.sock" "$@"
}

# In batches: every process takes its time in a guest.
make_network() {
  local name
  for name in wire hosta hostb ca cb client; do echo "netns add $prefix-$name"; done | ip -b -
  {
    for name in hosts service; do printf 'link add %s type bridge\nlink set %s up\n' "$name" "$name"; done
    while read -r name bridge; do
      echo "link add $name type veth peer name eth0 netns $prefix-$name"
      echo "link set $name master $bridge up"
    done <<<$'hosta hosts\nhostb hosts\nclient service\nca service\ncb service'
  } | ip -n "$prefix-wire" -b -
  address hosta 10.78.0.1 up
  address hostb 10.78.0.2 up
  address client 10.77.0.1 up
  # The same hardware address as well, so that the client's idea of the container stays true.
  address ca 10.77.0.10 up address 02:00:00:00:00:77
  address cb 10.77.0.10 down address 02:00:00:00:00:77
}

# address NAMESPACE IP up|down [MORE]...: without IPv6's own chatter, for the switch learns from every packet where an
# address is, and the two containers' interfaces have the same.
address() {
  local name=$1 ip=$2 state=$3
  shift 3
  ip -n "$prefix-$name" -b - <<B
link set lo up
link set eth0 addrgenmode none ${*}
addr add $ip/24 dev eth0
link set eth0 $state
B
}

# announce HOST: the switch hears where the address is. (From the first move on, lazy-migrate sees to that.)
announce() { inside "c$1" busybox ping -c 1 -W 2 10.77.0.1 >/dev/null || true; }

# B's interface goes up when the switch knows the address on A's side, or B would answer strangers with resets; and the
# client does not ask again whose the address is, for both would answer.
open_b() {
  inside client ip neigh replace 10.77.0.10 dev eth0 nud permanent lladdr 02:00:00:00:00:77
  ip -n "$prefix-cb" link set eth0 up
}

cut_link() { ip -n "$prefix-wire" link set hosta down; }
mend_link() { ip -n "$prefix-wire" link set hosta up; }

# start_node HOST: the host's one long-running process. Both hosts share this machine's runc state directory and cgroups,
# so each gets a runc of its own that keeps them apart.
start_node() {
  local host=$1 address
  address=10.78.0.$([ "$host" = a ] && echo 1 || echo 2)
  make_certificates
  mkdir -p "$work/$host"/{state,bundles,mnt}
  printf '#!/bin/sh\nexec %q --root %q "$@"\n' "$(command -v runc)" "$work/$host/runc-state" >"$work/$host/runc"
  chmod +x "$work/$host/runc"
  in_background "host$host" "$programs/lazy-migrate" --control "$work/$host/control.sock" serve --state-dir "$work/$host/state" --peer "$address:10810" --tls "$work/$host/tls" --allow-peer 10.78.0.1 --allow-peer 10.78.0.2 \
    --runtime "runc=$work/$host/runc,root=$work/$host/runc-state" --bundle-dir "$work/$host/bundles" --mount-dir "$work/$host/mnt" "${serve_options[@]}" \
    </dev/null >>"$work/$host/node.log" 2>&1 &
  node_pid[$host]=$!
  wait_until 20 "the node of host $host does not answer" node_answers "$host"
}
# make_certificates: each host's own, by one authority. Once.
make_certificates() {
  [ ! -d "$work/b/tls" ] || return 0
  "$programs/lazy-migrate" tls init "$work/a/tls" --host 10.78.0.1 >&2
  "$programs/lazy-migrate" tls init "$work/b/tls" --host 10.78.0.2 --ca "$work/a/tls" >&2
}
node_answers() {
  kill -0 "${node_pid[$1]}" 2>/dev/null || fail "the node of host $1 ended"
  on "$1" status --json >/dev/null 2>&1
}

# make_root DIR: the container's files: one program, and data that it will hardly ever read.
make_root() {
  local file
  mkdir -p "$1"/{data,proc,sys,dev,tmp}
  install "$programs/service" "$1/service"
  # Python's own generator: the kernel's is slow in a guest without KVM.
  for file in 0 1 2; do
    python3 -c 'import random, sys
for _ in range(int(sys.argv[1])): sys.stdout.buffer.write(random.randbytes(1 << 20))' "$((mib / 3))" >"$1/data/$file"
  done
  [ "$churn_mib" = 0 ] || head -c "${churn_mib}M" "$1/data/0" >"$1/churn"
}

# make_bundle HOST ROOT
make_bundle() {
  local bundle=$work/$1/bundles/web
  mkdir -p "$bundle"
  (cd "$bundle" && runc spec)
  jq --arg root "$2" --arg netns "/run/netns/$prefix-c$1" --arg cgroup "/$prefix-$1/web" --arg pages "$churn_pages" --arg memory "$memory_mib" '
    .root = {path: $root, readonly: false} | .process.terminal = false | .process.args = ["/service", "10.77.0.10", $pages, $memory]
    | .linux.cgroupsPath = $cgroup | .linux.namespaces |= map(select(.type != "cgroup"))
    | (.linux.namespaces[] | select(.type == "network")).path = $netns' "$bundle/config.json" >"$bundle/new"
  mv "$bundle/new" "$bundle/config.json"
}

# The whole stage: two nodes, a disk with a container on A, and a client that talks to it.
# Sets log_a and log_b, the service's log as each host sees it.
set_the_stage() {
  local device
  say "two hosts as network namespaces, with one wire"
  make_network
  [ -z "$link_rate" ] ||
    tc -n "$prefix-wire" qdisc add dev hostb root tbf rate "$link_rate" burst 64kb latency 100ms
  start_node a
  start_node b

  say "A: a disk of $((mib + 100)) MiB as export web, attached, with a filesystem on it"
  truncate -s "$((mib + 100))M" "$work/a/web.img"
  on a add web "$work/a/web.img" >&2
  device=$(on a attach web)
  mkfs.ext4 -q "$device"
  mkdir -p "$work/a/mnt/web"
  mount "$device" "$work/a/mnt/web"
  say "A: the container's root, with $mib MiB of random files, on $device"
  make_root "$work/a/mnt/web/rootfs"
  make_bundle a "$work/a/mnt/web/rootfs"
  make_bundle b "$work/b/mnt/web/rootfs"
  (cd "$work/a/mnt/web/rootfs" && sha256sum data/*) >"$work/sums"
  sync -f "$work/a/mnt/web"

  "$work/a/runc" run -d -b "$work/a/bundles/web" web </dev/null >/dev/null 2>&1 ||
    fail "runc could not start the container: $("$work/a/runc" run -b "$work/a/bundles/web" web 2>&1 </dev/null | tail -n 3)"
  log_a=$work/a/mnt/web/rootfs/log log_b=$work/b/mnt/web/rootfs/log
  wait_until 30 "the service does not write to its log" log_above "$log_a" 3
  announce a
  start_client
  open_b
}

# last_line LOG: the last number in it; 0 if there is none, or if it cannot be read (its disk may be stuck or gone).
last_line() {
  local n
  n=$(timeout 5 tail -n 1 "$1" 2>/dev/null) || n=0
  echo "${n:-0}"
}
log_above() { [ "$(last_line "$1")" -gt "$2" ]; }

# check_log LOG: 1, 2, 3 and so on, nothing left out and nothing twice.
check_log() {
  local said
  said=$(awk '$1 != NR { print "line " NR " says " $1; exit }' "$1")
  [ -z "$said" ] && return
  say "the service's log has a gap: $said"
  return 1
}

start_client() {
  in_background client "$programs/client" 10.77.0.10 "$((fail_link ? 8000 : 60000))" "$work/replies" >"$work/client.json" </dev/null &
  client_pid=$!
  wait_until 10 "the client cannot connect to the service" client_lives
}
# Its connection is there and moves: something was received within the last quarter of a second.
client_lives() {
  inside client ss -Htin state established dport = 9000 | grep -oE 'lastrcv:[0-9]+' | grep -qE ':([0-9]{1,2}|1[0-9]{2}|2[0-4][0-9])$'
}
stop_client() {
  stop_process "$client_pid"
  client_pid=''
  say "client: $(cat "$work/client.json")"
}

# resumed PID: the migration said so; if it ended instead, it failed.
resumed() {
  grep -qi resumed "$work/timeline" 2>/dev/null && return
  kill -0 "$1" 2>/dev/null || fail "the migration ended before the container was resumed: $(tail -n 1 "$work/timeline")"
  return 1
}

# b_runs: B's container exists and can run: its cgroup is not frozen, and SIGKILL (bit 8) does not wait for it to leave a
# system call that hangs on the cut link.
b_runs() {
  local pid cgroup pending
  pid=$(timeout 10 "$work/b/runc" state web 2>/dev/null | jq -r 'select(.status != "stopped").pid') || return 1
  [ -n "$pid" ] && [ -e "/proc/$pid/status" ] || return 1
  while read -r pending; do
    ((0x$pending & 0x100)) && return 1
  done < <(awk '/^(SigPnd|ShdPnd):/ {print $2}' "/proc/$pid/status")
  cgroup=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
  [ "$(cat "$cgroup/cgroup.freeze" 2>/dev/null || echo 1)" = 0 ]
}

stop_process() {
  kill "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}

clean_up() {
  local status=$? host name dir
  trap - EXIT
  trap '' INT TERM HUP # not twice
  [ -z "${EXAMPLE_LOGS:-}" ] || cp "$work/a/node.log" "$EXAMPLE_LOGS/a.log" 2>/dev/null || true
  [ -z "${EXAMPLE_LOGS:-}" ] || cp "$work/b/node.log" "$EXAMPLE_LOGS/b.log" 2>/dev/null || true
  [ -z "$client_pid" ] || stop_process "$client_pid"
  for host in "${!node_pid[@]}"; do kill "${node_pid[$host]}" 2>/dev/null || true; done
  for host in "${!node_pid[@]}"; do
    for _ in $(seq 100); do
      kill -0 "${node_pid[$host]}" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "${node_pid[$host]}" 2>/dev/null || true
  done
  # All of it is thrown away; and a disk that is fenced would hold whoever waits for it, for ever.
  for dir in /sys/block/nbd*; do
    ! grep -qs "$work/" "$dir/backend" || timeout 20 nbd-client -d "/dev/${dir##*/}" >/dev/null 2>&1 || true
  done
  for host in a b; do
    [ -x "$work/$host/runc" ] || continue
    for name in $("$work/$host/runc" list -q 2>/dev/null); do
      # A frozen process does not die of SIGKILL until it is thawed.
      timeout 10 "$work/$host/runc" kill "$name" KILL >/dev/null 2>&1 || true
      timeout 10 "$work/$host/runc" resume "$name" >/dev/null 2>&1 || true
      timeout 10 "$work/$host/runc" delete -f "$name" >/dev/null 2>&1 || true
    done
    for dir in "$work/$host/mnt"/*; do
      mountpoint -q "$dir" 2>/dev/null || continue
      timeout 20 fsfreeze -u "$dir" 2>/dev/null || true
      timeout 20 umount "$dir" 2>/dev/null || umount -l "$dir" 2>/dev/null || true
    done
  done
  for name in wire hosta hostb ca cb client; do ip netns del "$prefix-$name" 2>/dev/null || true; done
  for host in a b; do rmdir "/sys/fs/cgroup/$prefix-$host" 2>/dev/null || true; done
  rm -rf --one-file-system "$work" || true
  exit "$status"
}
