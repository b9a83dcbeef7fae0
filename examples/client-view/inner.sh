#!/usr/bin/env bash
# The part of examples/client-view.sh that needs the NBD device and criu; as root, on this machine or in the guest.
#
#   inner.sh PROGRAMS OUT        all three ways, one after the other; then the table and the picture in OUT
#   inner.sh PROGRAMS OUT WAY    one of them: copy, rsync or lazy
#
# Each way has the stage of live-migration/hosts.sh to itself: two hosts with one wire, a container on A, a client.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
programs=$1 out=$2 way=${3:-}
if [ -z "$way" ]; then
  for way in copy rsync lazy; do "$here/inner.sh" "$programs" "$out" "$way"; done
  exec python3 "$here/draw.py" "$out"
fi
. "$here/../live-migration/hosts.sh"

mib=${EXAMPLE_MIB:-60} fail_link=0
link_rate=${EXAMPLE_RATE:-100mbit}
# A third of it is overwritten here and there, some 1.5 MiB in a second.
churn_mib=$((mib / 3)) churn_pages=8
work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" client-view.XXXXXX)
start=$(date +%s%N)
helpers=()
tidy() {
  local status=$? pid
  set +e
  for pid in "${helpers[@]}"; do stop_process "$pid"; done
  # Which ends the script with the status that it finds.
  (exit "$status")
  clean_up
}
trap tidy EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# The disk of host B in the ways of old: an image of its own.
make_disk_b() {
  truncate -s "$((mib + 100))M" "$work/b/web.img"
  mkfs.ext4 -q -F "$work/b/web.img"
  mount_b
}
mount_b() {
  mkdir -p "$work/b/mnt/web"
  mount -o loop "$work/b/web.img" "$work/b/mnt/web"
}
a_runc() { "$work/a/runc" "$@" </dev/null >/dev/null 2>"$work/runc.err" || fail "runc $*: $(tail -n 3 "$work/runc.err")"; }
b_runc() { "$work/b/runc" "$@" </dev/null >/dev/null 2>"$work/runc.err" || fail "runc $*: $(tail -n 3 "$work/runc.err")"; }

# Stop it, copy the disk (without its holes), start it.
copy() {
  a_runc kill web KILL
  wait_until 20 "the container does not end" a_stopped
  umount "$work/a/mnt/web"
  on a detach web >&2
  # nc ends both ways when its input ends: this one's never does.
  mkfifo "$work/nothing"
  exec 8<>"$work/nothing"
  in_background hostb busybox nc -l -p 9999 <&8 >"$work/b/web.tar" &
  local receiver=$!
  helpers+=("$receiver")
  wait_until 10 "nobody listens on B" listens 9999
  tar -C "$work/a" -cSf - web.img | inside hosta busybox nc -w 10 10.78.0.2 9999
  wait "$receiver"
  helpers=()
  tar -C "$work/b" -xSf "$work/b/web.tar"
  mount_b
  a_runc delete -f web
  b_runc run -d -b "$work/b/bundles/web" web
}
a_stopped() { [ "$("$work/a/runc" state web | jq -r .status)" = stopped ]; }
listens() { [ -n "$(inside hostb ss -Htln "sport = $1")" ]; }

# Its files while it runs, then once more while it stands still, with its memory.
rsync_twice() {
  make_disk_b
  mkdir -p "$work/a/dump" "$work/b/dump"
  printf 'use chroot = no\nuid = root\ngid = root\nread only = no\n[web]\npath = %s\n[dump]\npath = %s\n' \
    "$work/b/mnt/web" "$work/b/dump" >"$work/rsyncd.conf"
  in_background hostb rsync --daemon --no-detach --config="$work/rsyncd.conf" --address=10.78.0.2 --port=8730 \
    --log-file="$work/rsyncd.log" </dev/null >/dev/null 2>&1 &
  helpers+=($!)
  wait_until 10 "rsync does not listen on B" listens 8730
  inside hosta rsync -aS --inplace --no-whole-file --delete "$work/a/mnt/web/" rsync://10.78.0.2:8730/web/
  say "the first pass is done; the container stands still"
  # criu locks the network of what it dumps, so no packet of it is answered by anybody meanwhile.
  a_runc checkpoint --tcp-established --image-path "$work/a/dump" --work-path "$work/a/dump.work" web
  sync -f "$work/a/mnt/web"
  inside hosta rsync -aS --inplace --no-whole-file --delete "$work/a/mnt/web/" rsync://10.78.0.2:8730/web/
  inside hosta rsync -aS "$work/a/dump/" rsync://10.78.0.2:8730/dump/
  # Without it criu would put the tasks into the group of host A.
  printf 'cgroup-root /%s-b/web\ntcp-established\n' "$prefix" >"$work/b/criu.conf"
  jq --arg conf "$work/b/criu.conf" '.annotations["org.criu.config"] = $conf' "$work/b/bundles/web/config.json" >"$work/new"
  mv "$work/new" "$work/b/bundles/web/config.json"
  mkdir -p "/sys/fs/cgroup/$prefix-b/web"
  b_runc restore -d -b "$work/b/bundles/web" --tcp-established --image-path "$work/b/dump" --work-path "$work/b/dump.work" web
}

lazily() {
  on a migrate web --to 10.78.0.2:10810 --container web --runtime runc --tcp-established --json >"$work/migrate.json" ||
    fail "the migration failed (status $?)"
}

set_the_stage
# As it is when somebody decides to move it: in use for a while.
sleep 2
say "$way: begins"
began=$(date +%s%3N)
case $way in
  copy) copy ;;
  rsync) rsync_twice ;;
  lazy) lazily ;;
  *) fail "there is no way $way" ;;
esac
[ "$way" = lazy ] || announce b
wait_until 60 "the service does not go on on B" log_above "$log_b" $(($(last_line "$log_b") + 20))
wait_until 30 "the client gets no replies from B" client_lives
ended=$(date +%s%3N)
sleep 1
stop_client
check_log "$log_b" || fail "the log on B is not whole"
[ "$(last_line "$log_b")" -ge "$(jq .last_number "$work/client.json")" ] || fail "a number that the client was told is durable is lost"
cp "$work/replies" "$out/$way.replies"
jq --arg way "$way" --argjson began "$began" --argjson ended "$ended" --argjson mib "$mib" --arg rate "$link_rate" \
  '. + {way: $way, began_ms: $began, ended_ms: $ended, mib: $mib, link: $rate}' "$work/client.json" >"$out/$way.json"
