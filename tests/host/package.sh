#!/usr/bin/env bash
# The Debian package as an operator meets it, under a real systemd: installed, configured, used; its service crashed,
# stuck, restarted and upgraded under a file system that is in use; removed and purged, and what is refused and kept then.
#
# The package is built on this machine, from the program that was built for the tests; the rest happens in the guest (its
# kernel has NBD, and its systemd is nobody's). There systemd is the first process of a process namespace of its own; the host
# that it makes is `there`.
# tests/run: timeout=1300
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lab/common.sh"
if [ "${1:-}" != inside ]; then
  out=$(mktemp -d -p "$lab" package.XXXXXX)
  trap 'rm -rf --one-file-system "$out"' EXIT
  program=${LAZY_MIGRATE_BIN:-${CARGO_TARGET_DIR:-$repo/target}/debug/lazy-migrate}
  "$repo/packaging/build-deb" "$program" "$out"
  "$repo/tests/lab/guest" --timeout 600 --memory 2048 --disk 2 --share "$out" --env TMPDIR=/scratch -- "$repo/tests/host/package.sh" inside
  exit
fi

work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" package.XXXXXX)
mnt=$work/mnt log=$work/node.log config=/etc/lazy-migrate/config.toml state=/var/lib/lazy-migrate
mkdir "$mnt"
unshare='' manager=''

say() { printf '[%4d] %s\n' "$SECONDS" "$*"; }
fail() {
  echo "FAILED: $*" >&2
  tail -n 20 "$log" 2>/dev/null | sed 's/^/  node | /' >&2
  tail -n 20 "$work/systemd.log" 2>/dev/null | sed 's/^/  systemd | /' >&2
  dmesg | tail -n 10 | sed 's/^/  kernel | /' >&2
  exit 1
}
# wait_until SECONDS WHAT-IF-NOT COMMAND...
wait_until() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || fail "$what"
    sleep 0.1
  done
}
there() { nsenter -t "$manager" -p -m -- "$@"; }
lm() { there /usr/bin/lazy-migrate "$@"; }
clean_up() {
  local status=$?
  trap - EXIT
  # With the first process of their namespace, all others in it end; what a frozen device holds, the guest's end frees.
  [ -z "$unshare" ] || kill -KILL "$unshare" 2>/dev/null || true
  exit "$status"
}
trap clean_up EXIT

[ -x /lib/systemd/systemd ] || fail "systemd is missing; install package systemd"
say "the package has what it should have"
deb=$(echo /hostshare/*.deb)
dpkg-deb --info "$deb" | grep -E '^ (Depends|Recommends):'
dpkg-deb --contents "$deb" >"$work/contents"
for file in usr/bin/lazy-migrate usr/lib/systemd/system/lazy-migrate.service usr/share/man/man1/lazy-migrate-migrate.1.gz \
  usr/share/bash-completion/completions/lazy-migrate usr/share/zsh/vendor-completions/_lazy-migrate \
  usr/share/fish/vendor_completions.d/lazy-migrate.fish usr/share/doc/lazy-migrate/examples/config.toml \
  usr/share/doc/lazy-migrate/examples/{drain.sh,hooks/hooks.toml,network-switch/follow.sh} \
  usr/share/lazy-migrate/schemas/status.json; do
  grep -q " root/root .* ./$file\$" "$work/contents" || fail "$file is not in the package"
done

# dpkg's list of what is installed is short here: reading the machine's own, a file for each of its packages, takes a minute.
mkdir -p "$work/db"/{info,updates,triggers}
: >"$work/db/available"
for package in $(dpkg-deb -f "$deb" Depends | sed 's/([^)]*)//g; s/,/ /g'); do
  dpkg-query -s "$package" >>"$work/db/status"
  echo >>"$work/db/status"
  for file in /var/lib/dpkg/info/"$package".list /var/lib/dpkg/info/"$package":*.list; do [ ! -e "$file" ] || cp "$file" "$work/db/info/"; done
done
mount --bind "$work/db" /var/lib/dpkg

# Only what the service itself needs: the machine's own services have nothing to do here.
mkdir -p /run/systemd/system/lazy-migrate.service.d
for unit in /{usr/lib,etc}/systemd/system/{sysinit,local-fs,sockets,basic,timers,multi-user,network-online}.target.wants/*; do
  [ ! -e "$unit" ] && [ ! -L "$unit" ] || ln -sf /dev/null "/run/systemd/system/${unit##*/}"
done
# Where there is no journal.
printf '[Service]\nStandardError=append:%s\n' "$log" >/run/systemd/system/lazy-migrate.service.d/log.conf
: >/etc/fstab
unshare --pid --fork --kill-child --mount --mount-proc --propagation shared -- \
  env container=lab /lib/systemd/systemd --system --unit=basic.target --show-status=no \
  >"$work/systemd.log" 2>&1 </dev/null &
unshare=$!
first_of() { manager=$(pgrep -P "$unshare"); }
wait_until 20 "systemd does not start" first_of
runs() { there systemctl is-active --quiet "$1" 2>/dev/null; }
wait_until 60 "systemd does not come up" runs basic.target
say "systemd $(there systemctl --version | sed -n '1s/systemd //p') is up"

install_it() { there dpkg --force-unsafe-io -i "$deb" >"$work/dpkg" 2>&1 || fail "dpkg -i: $(cat "$work/dpkg")"; }
property() { there systemctl show lazy-migrate --value -p "$1"; }
install_it
say "installed: it starts nothing, for nobody has configured it"
[ "$(property ActiveState)/$(property ConditionResult)" = inactive/no ] || fail "the service is $(property ActiveState)"
[ "$(there systemctl is-enabled lazy-migrate)" = enabled ] || fail "the service is not enabled"
there systemd-analyze verify lazy-migrate.service 2>&1 | grep -i lazy-migrate && fail "systemd has objections to the unit"
zgrep -q 'state.-dir' /usr/share/man/man1/lazy-migrate-serve.1.gz || fail "no manual page for serve"
bash -c '. /usr/share/bash-completion/completions/lazy-migrate; complete -p lazy-migrate' >/dev/null || fail "no completion"

say "a wrong configuration is refused, once, with its line"
printf 'state-dir = "%s"\nnbds = []\n' "$state" >"$config"
there systemctl start lazy-migrate 2>/dev/null && fail "the service started"
grep -q "$config:2: unknown key 'nbds'" "$log" || fail "the log does not say what is wrong"
[ "$(property ExecMainStatus)/$(property NRestarts)" = 2/0 ] || fail "status $(property ExecMainStatus), $(property NRestarts) restarts"
there systemctl reset-failed lazy-migrate

say "configured by the example, and used"
cp /usr/share/doc/lazy-migrate/examples/config.toml "$config"
there systemctl start lazy-migrate || fail "the service does not start"
# Ready is ready: nothing has to be waited for.
lm status --json >/dev/null || fail "the service is ready, and does not answer"
[ "$(stat -c %a /run/lazy-migrate $state | tr '\n' ' ')" = '700 700 ' ] || fail "others may enter: $(stat -c %a /run/lazy-migrate $state)"
truncate -s 256M "$work/web.img" "$work/second.img"
lm add web "$work/web.img" >/dev/null
device=$(there lazy-migrate attach web)
mkfs.ext4 -q "$device"
there mount "$device" "$mnt"
# What a container's service does: each line is on the disk before the next is written.
cat >"$work/writer" <<'W'
echo $$ >"$1.pid"
i=0
while :; do i=$((i + 1)); echo $i >>"$1/log" && sync "$1/log" || exit 1; sleep 0.02; done
W
there bash "$work/writer" "$mnt" 2>"$work/writer.log" &
last() { there tail -n 1 "$mnt/log" 2>/dev/null || echo 0; }
above() { [ "$(last)" -gt "$1" ]; }
goes_on() { wait_until 60 "the writer does not go on: $1; $(cat "$work/writer.log")" above "$(($(last) + 10))"; }
goes_on "at first"
status_text() { [[ $(property StatusText) == "1 disk: 1 serving" ]]; }
wait_until 30 "systemd is not told how the node is: $(property StatusText)" status_text
node() { property MainPID; }
# The number is that of systemd's namespace.
is_another() { local now; now=$(node) && [ "$now" != 0 ] && [ "$now" != "$1" ] && lm status --json >/dev/null 2>&1; }
soft=$(there sh -c "grep '^Max open files' /proc/$(node)/limits" | awk '{print $4 "/" $5}')
[ "${soft%/*}" = "${soft#*/}" ] || fail "the limit on open files is $soft"

say "crashed: the writer waits, and goes on"
before=$(node)
there kill -KILL "$before"
wait_until 60 "systemd does not start it again" is_another "$before"
goes_on "after a crash"

say "what the node starts is in the service's group, knows nothing of systemd, and is not ended with the node"
lm add second "$work/second.img" >/dev/null
there lazy-migrate attach second --via fuse >/dev/null
helper=$(there pgrep -x nbdfuse)
# runc would take it for the container's.
there grep -qz NOTIFY_SOCKET "/proc/$helper/environ" && fail "what the node starts sees systemd's notification socket"
group=$(there sed -n 's/^0:://p' "/proc/$helper/cgroup")
[[ $group == */lazy-migrate.service ]] || fail "nbdfuse is in another group: $group"
# nbdfuse itself is of no use without the node that it knew, so something else stands for it.
lm detach second >/dev/null
there sh -c "echo \$\$ >'/sys/fs/cgroup$group/cgroup.procs'; echo \$\$ >'$work/helper'; exec sleep 10000" &
wait_until 20 "the helper does not start" test -s "$work/helper"
helper=$(cat "$work/helper")

say "stuck: the watchdog ends it"
before=$(node)
there kill -STOP "$before"
wait_until 90 "the watchdog does not end it" is_another "$before"
# Who is stopped ends by nothing but SIGKILL, and nobody else sends it.
[ "$(property NRestarts)" = 2 ] || fail "$(property NRestarts) restarts"
goes_on "after it was stuck"

say "restarted, and upgraded: a new node each time, and the same writer"
before=$(node)
there systemctl restart lazy-migrate
is_another "$before" || fail "it is not another node"
goes_on "after a restart"
before=$(node)
install_it
is_another "$before" || fail "an upgrade does not start the new version: $(cat "$work/dpkg")"
goes_on "after an upgrade"
there kill -0 "$helper" || fail "what the node had started was ended with it"
there kill "$helper"
dmesg | grep -E "I/O error.*${device##*/}|EXT4-fs error" && fail "the kernel saw an error"

say "not removed while a disk is used"
there dpkg -r lazy-migrate >"$work/dpkg" 2>&1 && fail "it was removed under a mounted disk"
grep -q 'a disk is attached' "$work/dpkg" || fail "it does not say why: $(cat "$work/dpkg")"
runs lazy-migrate || fail "the service was stopped by a removal that was refused"
goes_on "after a removal that was refused"

say "removed: configuration and state stay; purged: a disk is not thrown away"
there kill "$(cat "$mnt.pid")"
# shellcheck disable=SC2016 # they are awk's
there awk '$1 != NR { print "line " NR " says " $1; exit 1 }' "$mnt/log" || fail "the log has a gap"
wait_until 30 "the file system is in use" there umount "$mnt"
lm detach web >/dev/null
there dpkg -r lazy-migrate >"$work/dpkg" 2>&1 || fail "dpkg -r: $(cat "$work/dpkg")"
[ ! -e /usr/bin/lazy-migrate ] && [ -e $config ] && [ -d $state/disks/web ] || fail "the wrong things are gone"
there pgrep -x lazy-migrate && fail "the node runs"
there dpkg -P lazy-migrate >"$work/dpkg" 2>&1 || fail "dpkg -P: $(cat "$work/dpkg")"
grep -q 'is kept, for there are disks in it: second web' "$work/dpkg" || fail "it does not say what it keeps: $(cat "$work/dpkg")"
[ -d $state/disks/web ] || fail "the disk's record is gone"

say "installed again over what was kept, emptied, and purged: nothing is left"
install_it
cp /usr/share/doc/lazy-migrate/examples/config.toml "$config"
there systemctl start lazy-migrate
[ "$(lm status --json | jq -r '[.disks[].name] | join(" ")')" = "second web" ] || fail "the disks are not there: $(lm status)"
lm remove web >/dev/null
lm remove second >/dev/null
there dpkg -P lazy-migrate >"$work/dpkg" 2>&1 || fail "dpkg -P: $(cat "$work/dpkg")"
left=$(ls -d /etc/lazy-migrate $state /run/lazy-migrate /usr/share/doc/lazy-migrate /etc/systemd/system/*/lazy-migrate.service 2>/dev/null || true
  there dpkg -l lazy-migrate 2>/dev/null | grep '^[a-z][a-z] ' | grep -v '^un' || true)
[ -z "$left" ] || fail "left behind: $left"
say "all as it should be"
