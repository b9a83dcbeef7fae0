#!/usr/bin/env bash
# What every other guest test builds on, without any of our code: Debian's kernel attaches an NBD device, and Debian's
# runc and criu freeze, dump and restore a container whose root is on it. If this fails, the lab is broken, not the
# product.
# tests/run: timeout=300 memory=2048 disk=2
set -euo pipefail
cd /scratch
cleanup() {
  runc delete -f counter >/dev/null 2>&1 || true
  runc delete -f copy >/dev/null 2>&1 || true
  mountpoint -q /scratch/mnt && umount /scratch/mnt
  nbd-client -d /dev/nbd0 >/dev/null 2>&1 || true
}
trap cleanup EXIT

truncate -s 256M image
qemu-nbd -t -f raw -x disk --discard=unmap -k /run/nbd.sock --fork --pid-file=/run/nbd.pid image
modprobe nbd
nbd-client -unix /run/nbd.sock -N disk /dev/nbd0 -b 4096 >/dev/null
mkfs.ext4 -q /dev/nbd0
mkdir mnt
mount /dev/nbd0 mnt

root=/scratch/mnt/rootfs
mkdir -p "$root"/{bin,proc,sys,dev,tmp} bundle
cp /bin/busybox "$root/bin/"
ln -s busybox "$root/bin/sh"
cat >"$root/count" <<'C'
i=0
exec 3>>/count.log
while :; do i=$((i + 1)); echo $i >&3; busybox sync /count.log; busybox sleep 0.02; done
C
(cd bundle && runc spec)
jq --arg root "$root" '.root = {path: $root, readonly: false} | .process.terminal = false
  | .process.args = ["/bin/sh", "/count"] | .linux.namespaces |= map(select(.type != "cgroup"))' \
  bundle/config.json >config && mv config bundle/config.json

# last: the number that the container wrote last; waits until there is one above $1.
last() {
  local n
  for _ in $(seq 300); do
    n=$(tail -n 1 "$root/count.log" 2>/dev/null) || n=0
    [ "${n:-0}" -gt "$1" ] && { echo "$n"; return; }
    sleep 0.1
  done
  echo "the container does not count on from $1" >&2
  return 1
}
runc run -d -b bundle counter </dev/null >/dev/null 2>&1
first=$(last 3)
runc pause counter
cgroup=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$(runc state counter | jq .pid)/cgroup")
grep -qx 'frozen 1' "$cgroup/cgroup.events"
runc checkpoint --leave-running --image-path /scratch/images --work-path /scratch/work counter ||
  { grep Error work/dump.log; exit 1; }
grep -qx 'frozen 1' "$cgroup/cgroup.events"
frozen=$(last 0)
jq '.annotations["org.criu.config"] = "/scratch/criu.conf"' bundle/config.json >config
mkdir copy && mv config copy/config.json
echo 'cgroup-root /copy' >criu.conf
runc restore -d -b copy --image-path /scratch/images --work-path /scratch/work2 copy </dev/null >/dev/null 2>&1
after=$(last "$frozen")
echo "counted to $first, frozen at $frozen, restored to $after"
# Nothing was done twice or left out: the log is 1, 2, 3 and so on.
awk '$1 != NR { print "line " NR " says " $1; exit 1 }' "$root/count.log"
runc kill copy KILL
