#!/usr/bin/env bash
# A container of podman moves: on A podman started it, on B podman was only told to create it. What is restored is podman's
# container in every respect; what moved away is nobody's.
# tests/run: timeout=1200 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
migrate=(migrate web --to 10.78.0.2:10810 --container web --runtime podman --tcp-established --json)
# Long enough for something to happen during the pull.
link_rate=16mbit serve_options=(--lease 4s)

clean_up_podman() {
  local status=$? host
  # Frozen tasks die of it as they are.
  for group in /sys/fs/cgroup/lazy-migrate-*/ /sys/fs/cgroup/libpod_parent/libpod-*/; do
    echo 1 >"$group/cgroup.kill" || true
  done 2>/dev/null
  for host in a b; do timeout 60 "$work/$host/podman" rm --all --force --time 0 || true; done >/dev/null 2>&1
  rm -rf /run/libpod "/run/$prefix-podman-"*
  for host in a b; do umount -l "$work/$host/store/overlay" "$work/$host/mnt/web" || true; done 2>/dev/null
  (exit "$status")
  clean_up
}
trap clean_up_podman EXIT

# What the host's operator has configured: runc, and here one that can be told to fail. Two hosts on one kernel: each has a
# podman of its own, that knows only its own containers.
mkdir -p /etc/containers "$work/bin"
cat >/etc/containers/containers.conf <<C
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
[engine.runtimes]
runc = ["$work/runc"]
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
C
printf '#!/bin/sh\nexit 1\n' >"$work/bin/criu"
cat >"$work/runc" <<R
#!/bin/bash
case " \$* " in *" restore "*) [ ! -e "$work/criu-fails" ] || PATH=$work/bin:\$PATH ;; esac
exec $(command -v runc) "\$@"
R
chmod +x "$work/runc" "$work/bin/criu"
for host in a b; do
  mkdir -p "$work/$host"
  printf '#!/bin/sh\nexec %s --root %s --runroot %s "$@"\n' "$(command -v podman)" "$work/$host/store" \
    "/run/$prefix-podman-$host" >"$work/$host/podman"
  chmod +x "$work/$host/podman"
done

start_podman_node() {
  local host=$1 address=$2
  make_certificates
  mkdir -p "$work/$host"/{state,mnt}
  in_background "host$host" "$programs/lazy-migrate" --control "$work/$host/control.sock" serve --state-dir "$work/$host/state" \
    --peer "$address:10810" --tls "$work/$host/tls" --allow-peer 10.78.0.1 --allow-peer 10.78.0.2 \
    --runtime "podman=$work/$host/podman" --mount-dir "$work/$host/mnt" "${serve_options[@]}" </dev/null >>"$work/$host/node.log" 2>&1 &
  node_pid[$host]=$!
  wait_until 20 "the node of host $host does not answer" node_answers "$host"
}

# create HOST NAME [OPTION]...: as the operator of that host would, before the disk is there.
create() {
  local host=$1 name=$2
  shift 2
  mkdir -p "$work/$host/mnt/web/rootfs"
  "$work/$host/podman" create --name "$name" --network "ns:/run/netns/$prefix-c$host" "$@" \
    --rootfs "$work/$host/mnt/web/rootfs" /service 10.77.0.10 0
}

# The stage's, but patient: each call of podman takes seconds in a guest without KVM.
start_client() {
  in_background client "$programs/client" 10.77.0.10 300000 "$work/replies" >"$work/client.json" </dev/null &
  client_pid=$!
  wait_until 30 "the client cannot connect to the service" client_lives
}

# TCP asks again after about as long as it was without an answer.
client_goes_on() { wait_until 180 "the client gets no replies" client_lives; }

a_is_well() {
  client_goes_on
  a_is_as_it_was
  wait_until 30 "B has not tidied up: $(left_on_b)" b_is_tidy
}
left_on_b() {
  [ -z "${id_b:-}" ] || pgrep -fa "conmon.*$id_b"
  ls -d "/run/runc/${id_b:-none}" 2>/dev/null
  grep -o " $work/b/mnt/[^ ]*" /proc/self/mountinfo
  grep -l "$work/b/" /sys/block/nbd*/backend 2>/dev/null
  compgen -G '/sys/fs/cgroup/lazy-migrate-*-*'
  ls -d "/sys/fs/cgroup/libpod_parent/libpod-${id_b:-none}" 2>/dev/null
  inside cb nft list chains | grep CRIU
  find "$work/b/state/disks" -path '*/web/images*' 2>/dev/null
  pgrep -a criu
  true
}
b_stopped() { ! pgrep -f "conmon.*$id_b" && [ ! -e "/run/runc/$id_b" ] && ! compgen -G '/sys/fs/cgroup/lazy-migrate-web-*'; } >/dev/null
state() { "$work/$1/podman" container inspect "$2" | jq -r '.[0].State.Status'; }

say "two hosts, a disk, and on A a container of podman with its root on it"
make_network
tc -n "$prefix-wire" qdisc add dev hostb root tbf rate "$link_rate" burst 64kb latency 100ms
start_podman_node a 10.78.0.1
start_podman_node b 10.78.0.2
truncate -s "$((mib + 100))M" "$work/a/web.img"
on a add web "$work/a/web.img" >&2
device=$(on a attach web)
mkfs.ext4 -q "$device"
mkdir -p "$work/a/mnt/web"
mount "$device" "$work/a/mnt/web"
make_root "$work/a/mnt/web/rootfs"
mkdir -p "$work/a/mnt/web/"{rootfs/etc,rootfs/run,data}
(cd "$work/a/mnt/web/rootfs" && sha256sum data/*) >"$work/sums"
id_a=$(create a web)
"$work/a/podman" start web >&2
log_a=$work/a/mnt/web/rootfs/log log_b=$work/b/mnt/web/rootfs/log
wait_until 30 "the service does not write to its log" log_above "$log_a" 3
announce a
start_client
open_b

say "B's operator has not created it"
refused 1 'podman create --name web' on a "${migrate[@]}"
a_is_well
id_b=$(create b web)

say "what another container wrote is not on the disk, but in its layer"
mkdir -p "$work/image"/{bin,proc,sys,dev,tmp,run,etc,data}
cp /bin/busybox "$work/image/bin/sh"
tar -C "$work/image" -c . | "$work/a/podman" import - tiny >/dev/null 2>&1
# shellcheck disable=SC2016 # the container's shell
"$work/a/podman" run -d --name layered --network none -v "$work/a/mnt/web/data:/data" localhost/tiny \
  /bin/sh -c 'echo x >/tmp/x; while :; do echo $((i += 1)) >/data/count; sleep 0.1; done' >&2
create b layered >/dev/null
layered=("${migrate[@]}")
layered[5]=layered
refused 1 'outside of the disk.*"/tmp/x";.*--read-only' on a "${layered[@]}"
count=$(cat "$work/a/mnt/web/data/count")
wait_until 5 "it was not thawed" grep -qvx "$count" "$work/a/mnt/web/data/count"
"$work/a/podman" rm -f -t 0 layered >/dev/null
"$work/b/podman" rm layered >/dev/null
a_is_well

say "criu fails at the restore: podman's container on B is as it was created"
touch "$work/criu-fails"
refused 1 'could not be restored.*goes on here' on a "${migrate[@]}"
rm "$work/criu-fails"
a_is_well
[ "$(state b web)" = created ] || fail "B's container is $(state b web)"

say "the link is cut while B pulls, and A takes the container back"
# Whom B has served cannot go on with A.
stop_client
in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >"$work/migrate.json" 2>"$work/timeline" &
migrating=$!
wait_until 180 "the service was not resumed on B" resumed "$migrating"
goes_on "$log_b"
[ "$(state b web)" = running ] || fail "B's podman says that it is $(state b web)"
cut_link
on a rollback web --wait --json >"$work/rollback.json" || fail "the rollback failed (status $?)"
wait "$migrating" || true
goes_on "$log_a"
mend_link
start_client
a_is_well
[ "$(state a web)" = running ] || fail "A's podman says that it is $(state a web)"
[[ $(state b web) =~ ^(exited|created)$ ]] || fail "B's podman says that it is $(state b web)"

say "all is right, and nobody had to create anything anew"
tc -n "$prefix-wire" qdisc del dev hostb root
on a "${migrate[@]}" >"$work/migrate.json" || fail "the migration failed"
goes_on "$log_b"
check_log "$log_b" || fail "B's log has a gap"
client_goes_on
client_is_content
[ "$(on b verify web --json | jq .verified)" = true ] || fail "the disk differs"
(cd "$work/b/mnt/web/rootfs" && sha256sum --quiet -c "$work/sums" >&2) || fail "files differ"
! "$work/a/podman" container exists web || fail "A's podman still knows it: $(state a web)"
! pgrep -fa "conmon.*$id_a" || fail "A's monitor is still there"
[ ! -e "/run/runc/$id_a" ] || fail "A's runc still knows it"
! compgen -G "/sys/fs/cgroup/libpod_parent/libpod-*$id_a" || fail "A's control group is still there"
[ "$(state b web)" = running ] || fail "B's podman says that it is $(state b web)"

say "B's podman can do with it what it likes"
"$work/b/podman" stop -t 0 web >&2
wait_until 30 "what ran on B is still there" b_stopped
say "moved, and nothing of it is left on A"
