#!/usr/bin/env bash
# Records the traces that examples/compare_orders.rs replays: what a disk with a Debian tree is asked for, before and
# after a moment at which it would move. Needs root, nbdkit, nbdfuse, a C compiler and python3; takes a minute.
#
#   examples/traces/record.sh [DIR [NAME...]]
#
# DIR (here) gets the traces; NAME: only these of container-start, database and build.
# The disk is nbdkit's (log filter), over FUSE and a loop device, with ext4. At the move it is unmounted and mounted again:
# whatever the host had in its page cache does not move with a container.
set -euo pipefail
traces=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
into=$(realpath -e "${1:-$traces}")
wanted=" ${*:2} "
[ $# -ge 2 ] || wanted=' container-start database build '
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
work=$(mktemp -d)
mkdir "$work/mnt" "$work/fuse" "$work/tree"
loop='' server=''

unmount() {
  if mountpoint -q "$work/mnt"; then umount "$work/mnt"; fi
  if [ -n "$loop" ]; then losetup -d "$loop" && loop=''; fi
  if mountpoint -q "$work/fuse"; then fusermount3 -u "$work/fuse"; fi
  if [ -n "$server" ]; then wait "$server" || true; fi
  server=''
}
cleanup() {
  unmount
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT

# mount_disk LOG: the disk at $work/mnt, what it is asked for in LOG.
mount_disk() {
  nbdfuse "$work/fuse/disk" --command nbdkit -s --exit-with-parent --filter=log file "$work/disk.img" "logfile=$1" &
  server=$!
  for _ in $(seq 100); do
    if [ -s "$work/fuse/disk" ]; then break; fi
    sleep 0.1
  done
  loop=$(losetup --find --show --direct-io=on "$work/fuse/disk")
  mount -o noatime "$loop" "$work/mnt"
}

# trace NAME SOURCE DESTINATION: what the container does before and after the move, in the tree.
trace() {
  local name=$1 source=$2 destination=$3
  [[ $wanted == *" $name "* ]] || return 0
  cp --sparse=always "$work/fresh.img" "$work/disk.img"
  mount_disk "$work/source.log"
  chroot "$work/mnt" /bin/sh -c "$source" >/dev/null
  unmount
  mount_disk "$work/destination.log"
  chroot "$work/mnt" /bin/sh -c "$destination" >/dev/null
  unmount
  /usr/bin/python3 "$traces/condense.py" "$work/disk.img" "$work/source.log" "$work/destination.log" >"$into/$name.trace"
  wc -lc "$into/$name.trace"
}

# The tree: a shell, python with its library, a C compiler with its headers, documents.
for path in /bin/sh /bin/ls /usr/bin/find /usr/bin/python3.11 /usr/bin/gcc /usr/bin/as /usr/bin/ld /bin/cat /usr/bin/wc /usr/bin/seq /usr/lib/gcc/x86_64-linux-gnu/12/cc1 \
  /usr/lib/python3.11/lib-dynload/*.so /usr/lib/x86_64-linux-gnu/lib{m,mvec,gcc_s}.so.?; do
  cp --parents -L "$path" "$work/tree"
  ldd "$path" | grep -o '/[^ ]*' | xargs -r cp --parents -L -t "$work/tree" || true
done
mkdir -p "$work/tree"/{tmp,dev,proc,var}
mknod -m 666 "$work/tree/dev/null" c 1 3
(
  cd /
  tar -cf - usr/lib/python3.11 usr/lib/python3 usr/lib/gcc/x86_64-linux-gnu usr/include usr/share/perl usr/share/zoneinfo \
    usr/lib/x86_64-linux-gnu/*crt*.o usr/lib/x86_64-linux-gnu/lib{c,m}.so usr/lib/x86_64-linux-gnu/libc_nonshared.a
) | tar -C "$work/tree" -xf -
ln -sf python3.11 "$work/tree/usr/bin/python3"
mkdir -p "$work/tree/src"
for number in $(seq 40); do
  printf '#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <math.h>\n#include <pthread.h>\nint f%s(int x) { printf("%%d", x); return x * %s; }\n' \
    "$number" "$number" >"$work/tree/src/f$number.c"
done
truncate -s 1G "$work/fresh.img"
mke2fs -q -t ext4 -d "$work/tree" "$work/fresh.img"

# A service in python starts from its package tree, and looks around.
trace container-start \
  'echo started >/var/log.old; cat /var/log.old' \
  'python3 -c "import json, http.server, sqlite3, asyncio, email.mime.text, xml.etree.ElementTree, logging.handlers"; ls -lR /usr/lib/python3.11/json; find /usr/share/zoneinfo/Europe | wc -l; python3 -c "import unittest, multiprocessing, urllib.request, ssl, decimal"'

# A database with a hot set: rows are updated and read by a Zipf-like law, before and after.
cat >"$work/db.py" <<'PYTHON'
import random, sqlite3, sys, time
seed, count = int(sys.argv[1]), int(sys.argv[2])
random.seed(seed)
db = sqlite3.connect("/var/db.sqlite")
db.execute("pragma cache_size = 200")
db.execute("pragma synchronous = full")
rows = 60000
# The hot rows are all over the table, and the same after the move.
place = list(range(rows)); random.Random(1).shuffle(place)
for turn in range(count):
    for _ in range(8):
        row = place[min(rows - 1, int(random.paretovariate(0.6)) - 1)]
        db.execute("select body from t where id = ?", (row,)).fetchone()
        if random.random() < 0.5:
            db.execute("update t set body = ? where id = ?", (random.randbytes(900), row))
    db.commit()
    time.sleep(0.002)
PYTHON
cat >"$work/fill.py" <<'PYTHON'
import random, sqlite3
db = sqlite3.connect("/var/db.sqlite")
db.execute("create table t (id integer primary key, body blob)")
db.executemany("insert into t values (?, ?)", ((i, random.randbytes(900)) for i in range(60000)))
db.commit()
PYTHON
# Its tree is the other one with the filled database in it.
database() {
  cp "$work/db.py" "$work/fill.py" "$work/tree/src"
  rm -f "$work/fresh.img"
  truncate -s 1G "$work/fresh.img"
  mke2fs -q -t ext4 -d "$work/tree" "$work/fresh.img"
  cp "$work/fresh.img" "$work/disk.img"
  mount_disk "$work/fill.log"
  chroot "$work/mnt" /usr/bin/python3 /src/fill.py
  unmount
  cp "$work/fresh.img" "$work/empty.img"
  cp "$work/disk.img" "$work/fresh.img"
  trace database 'python3 /src/db.py 2 600' 'python3 /src/db.py 3 600'
  mv "$work/empty.img" "$work/fresh.img"
}
[[ $wanted != *" database "* ]] || database

# A build that is half done when it moves.
# shellcheck disable=SC2016 # the shell in the tree expands it
trace build \
  'cd /src; for n in $(seq 20); do gcc -O1 -c f$n.c -o f$n.o; done' \
  'cd /src; for n in $(seq 21 40); do gcc -O1 -c f$n.c -o f$n.o; done; echo "int f1(int); int f30(int); int main() { return f1(2) + f30(3); }" >m.c; gcc -o m m.c f*.o; ls -l /src'
