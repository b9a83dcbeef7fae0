#!/usr/bin/env bash
# Moves a disk, with its container or alone, between two hosts that are reached by ssh: looks at both, makes what is missing
# (certificates, configuration, nodes that run), moves, waits until all of it has arrived, compares, and says how to go back.
# Typed on a third machine, or on the host that the disk leaves (--from here).
#
#   examples/two-hosts-ssh.sh --from SSH --to SSH --disk NAME [OPTION...]
#
#   --from, --to SSH   as ssh takes it: root@10.0.0.1, or a name in ~/.ssh/config; `here` is this machine. root has to be able
#                      to log in without a question, and lazy-migrate has to be installed
#   --image PATH       the disk's image on the first host, if it is not an export there yet
#   --container ID     its container moves along. It runs on the first host from the attached disk, and both hosts have a
#                      bundle for it in /etc/lazy-migrate/bundles/ID. Without this the disk moves alone: whoever uses it has
#                      stopped and unmounted it, and it is attached on the other host as soon as it belongs there
#   --runtime NAME     what runs the container (runc)
#   --tcp-established  keep its connections
#   --from-address, --to-address HOST   by which names or addresses the hosts dial each other (those that ssh uses)
#   --port N           the one port between them (10810)
#   --ssh COMMAND      ssh with options ('ssh -F FILE')
#   --anyway           although `lazy-migrate doctor` finds a fault
#
# What it makes on a host, only where it is missing: /etc/lazy-migrate/tls and config.toml, and a node that runs: the package's
# systemd service, or without systemd a process of its own (log: /var/log/lazy-migrate.log). A node that runs already is used as
# it is. Can be interrupted and typed again at any time: what is under way is the nodes' and goes on. stdout is the device on
# the second host; needs ssh and jq here. Exit status: 0 moved, all of it, and identical; 1 failed; 2 usage; 3 refused;
# 4 a host or a node is unreachable; 5 timed out.
set -euo pipefail
say() { echo "two-hosts: $*" >&2; }
die() {
  say "$1"
  exit "${2:-1}"
}
usage() { die "$1; the head of $0 says what there is" 2; }

declare -A ssh_to=([a]='' [b]='') address=([a]='' [b]='')
disk='' image='' container='' runtime=runc port=10810 ssh=ssh anyway=0 options=()
while [ $# -gt 0 ]; do
  case $1 in
    --anyway) anyway=1 ;;
    --tcp-established) options+=("$1") ;;
    --*)
      [ $# -ge 2 ] || usage "option $1 needs a value"
      case $1 in
        --from) ssh_to[a]=$2 ;;
        --to) ssh_to[b]=$2 ;;
        --from-address) address[a]=$2 ;;
        --to-address) address[b]=$2 ;;
        --disk | --image | --container | --runtime | --port | --ssh) printf -v "${1#--}" '%s' "$2" ;;
        *) usage "unknown option $1" ;;
      esac
      shift
      ;;
    *) usage "unknown argument $1" ;;
  esac
  shift
done
[ -n "${ssh_to[a]}" ] && [ -n "${ssh_to[b]}" ] && [ -n "$disk" ] || usage "--from, --to and --disk are needed"
[[ $port =~ ^[1-9][0-9]*$ ]] || usage "--port $port: a number"
command -v jq >/dev/null || die "jq is missing; install the package jq"
read -ra ssh <<<"$ssh"
command -v "${ssh[0]}" >/dev/null || die "${ssh[0]} is missing; install the package openssh-client"

# One connection to each host, for all that is asked.
work=$(mktemp -d)
clean_up() {
  local host
  for host in a b; do
    [ "${ssh_to[$host]}" = here ] || "${shared[@]}" -O exit "${ssh_to[$host]}" 2>/dev/null || true
  done
  rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'say "interrupted; what is under way goes on, and typing it again goes on from there"; exit 130' INT
trap 'exit 143' TERM HUP
shared=("${ssh[@]}" -o BatchMode=yes -o ConnectTimeout=20 -o ControlMaster=auto -o "ControlPath=$work/%C" -o ControlPersist=60)

# feed HOST COMMAND...: runs a command there; stdin is its own. at: without any.
feed() {
  local host=$1
  shift
  local code=0
  if [ "${ssh_to[$host]}" = here ]; then
    "$@"
  else
    "${shared[@]}" "${ssh_to[$host]}" "$(printf '%q ' "$@")" || code=$?
    # ssh's own failure.
    [ "$code" != 255 ] || code=4
    return "$code"
  fi
}
at() { feed "$@" </dev/null; }
lm() { at "$1" lazy-migrate "${@:2}"; }
other() { [ "$1" = a ] && echo b || echo a; }
called() { echo "${address[$1]}"; }

reach() {
  local host=$1 name=${ssh_to[$1]}
  if [ -z "${address[$host]}" ]; then
    [ "$name" != here ] || usage "--$([ "$host" = a ] && echo from || echo to)-address is needed: by which name or address does the other host dial this one?"
    address[$host]=$("${ssh[@]}" -G "$name" | sed -n 's/^hostname //p')
  fi
  at "$host" true || die "cannot log in to $name; 'ssh $name true' has to work without a question" 4
  [ "$(at "$host" id -u)" = 0 ] || die "$name is not root there: nodes make devices and mounts" 3
  say "$(called "$host"): $(at "$host" lazy-migrate --version)" ||
    die "there is no lazy-migrate on $(called "$host"); install its package there" 1
}

# fit HOST: what doctor finds there, as far as this move needs it.
fit() {
  local host=$1 found faults
  found=$(lm "$host" doctor --json 2>/dev/null) || [ -n "$found" ] || die "lazy-migrate doctor does not work on $(called "$host")"
  # Who moves a disk alone needs no criu.
  faults=$(jq -r --arg container "$container" '.checks[] | select(.level == "fail")
    | select($container != "" or (.check | IN("criu", "runc", "crun", "podman", "cgroup") | not))
    | "\(.check): \(.found): \(.why); \(.do)"' <<<"$found")
  [ -n "$faults" ] || return 0
  say "$(called "$host") is not fit: $faults"
  [ "$anyway" = 1 ] || die "mend that first, or say --anyway" 3
}

runs() { lm "$1" status >/dev/null 2>&1; }
has() { at "$1" test -e "$2"; }

tls=/etc/lazy-migrate/tls config=/etc/lazy-migrate/config.toml
# certificates: both hosts have one of one authority, whose key stays where it is.
certificates() {
  local host ca='' made
  for host in a b; do
    if has "$host" "$tls/ca-key.pem"; then ca=$host; break; fi
  done
  if [ -z "$ca" ]; then
    has a "$tls" || has b "$tls" || {
      say "$(called a): making an authority and a certificate in $tls; keep its ca-key.pem where only you can read it"
      lm a tls init "$tls" --host "${address[a]}" >/dev/null
      ca=a
    }
  fi
  for host in a b; do
    ! has "$host" "$tls" || continue
    [ -n "$ca" ] || die "$(called "$host") has no certificates, and on neither host is the authority's key ($tls/ca-key.pem) to make some" 3
    say "$(called "$host"): a certificate, made with the authority of $(called "$ca")"
    made=$(at "$ca" mktemp -d)
    lm "$ca" tls init "$made/tls" --host "${address[$host]}" --ca "$tls" >/dev/null
    at "$host" rm -rf --one-file-system "$tls.new"
    at "$host" install -d -m 700 "$tls.new"
    at "$ca" tar -C "$made/tls" -c . | feed "$host" tar -C "$tls.new" -x --no-same-owner
    at "$host" mv -T "$tls.new" "$tls"
    at "$ca" rm -rf --one-file-system "$made"
  done
  [ "$(at a cat "$tls/ca-cert.pem")" = "$(at b cat "$tls/ca-cert.pem")" ] ||
    die "the hosts' certificates are of two authorities, so they do not believe each other: see $tls on both" 3
}

# configure HOST: writes the configuration, if there is none.
configure() {
  local host=$1
  ! has "$host" "$config" || return 0
  say "$(called "$host"): writing $config"
  {
    cat <<C
state-dir = "/var/lib/lazy-migrate"
nbd = ["unix:/run/lazy-migrate/nbd.sock"]
peer = "${address[$host]}:$port"
tls = "$tls"
allow-peer = ["${address[$(other "$host")]}"]
C
    [ -z "$container" ] || cat <<C
runtime = ["$runtime"]
bundle-dir = "/etc/lazy-migrate/bundles"
mount-dir = "/run/lazy-migrate/disks"
C
  } | feed "$host" tee "$config.new" >/dev/null
  [ -z "$container" ] || at "$host" install -d /etc/lazy-migrate/bundles
  at "$host" mv "$config.new" "$config"
}

# start HOST: a node.
start() {
  local host=$1 until=$((SECONDS + 60))
  if at "$host" test -d /run/systemd/system && at "$host" systemctl cat lazy-migrate >/dev/null 2>&1; then
    say "$(called "$host"): systemctl start lazy-migrate"
    at "$host" systemctl start lazy-migrate || die "it does not start; 'journalctl -u lazy-migrate' there says why"
  else
    say "$(called "$host"): starting a node; it ends with the host, or by 'kill \$(cat /run/lazy-migrate/node.pid)'"
    at "$host" install -d -m 700 /run/lazy-migrate /var/lib/lazy-migrate
    # shellcheck disable=SC2016 # another shell's
    at "$host" sh -c 'setsid lazy-migrate serve --config "$0" </dev/null >>/var/log/lazy-migrate.log 2>&1 &
      echo $! >/run/lazy-migrate/node.pid' "$config"
  fi
  until runs "$host"; do
    [ "$SECONDS" -lt "$until" ] ||
      die "the node of $(called "$host") does not answer; it said: $(at "$host" tail -n 3 /var/log/lazy-migrate.log 2>/dev/null)" 4
    sleep 0.2
  done
}

# look HOST: what the disk is there, '' if it is not; sets status.
look() { status=$(lm "$1" status "$disk" --json 2>/dev/null) || { runs "$1" || die "the node of $(called "$1") does not answer" 4; status='{}'; }; }
of() { jq -r "$1" <<<"$status"; }
stands() { of 'if .role then "\(.role) \(.phase)" else "" end'; }

for host in a b; do reach "$host"; done
for host in a b; do fit "$host"; done
for host in a b; do
  runs "$host" || [ -n "${certified:-}" ] || { has "$host" "$config" || { certificates; certified=1; }; }
  runs "$host" || { configure "$host"; start "$host"; }
done

look a
[ -n "$(stands)" ] || {
  [ -n "$image" ] || die "$(called a) has no disk $disk; --image PATH makes one" 3
  lm a add "$disk" "$image" >&2
  look a
}
to=${address[b]}:$port
case $(stands) in
  'source released' | 'source handed-over')
    [ "$(of .peer)" = "$to" ] || die "$disk was given to $(of .peer) already, not to $to" 3
    say "$disk was handed over to $to already; going on from there"
    ;;
  'local serving' | 'source serving' | 'source preparing' | 'destination complete')
    device=$(of '.device // empty')
    if [ -n "$container" ]; then
      [ -n "$device" ] || die "$disk is not attached on $(called a): the container has to run from it" 3
    elif [ -n "$device" ] && at a findmnt -n -S "$device" >/dev/null; then
      die "$device is mounted on $(called a): stop what uses it and unmount it, or say --container" 3
    fi
    # What is there of an earlier move in the other direction takes what was written since; not beside a device of its own.
    look b
    if [ "$(stands)" = 'source released' ] && [ -n "$(of '.device // empty')" ]; then lm b detach "$disk" >&2; fi
    say "moving $disk to $to"
    if [ -n "$container" ]; then
      lm a migrate "$disk" --to "$to" --container "$container" --runtime "$runtime" "${options[@]}" >&2
    else
      lm a prepare "$disk" --to "$to" >&2
      lm a handover "$disk" >&2
    fi
    ;;
  'source frozen') die "$disk is about to be handed over by somebody else; wait for that, or 'lazy-migrate cancel $disk'" 3 ;;
  *) die "$disk is $(stands) on $(called a), so it cannot be moved from there" 3 ;;
esac

look b
device=$(of '.device // empty')
[ -n "$device" ] || [ -n "$container" ] || device=$(lm b attach "$disk")
[ -n "$device" ] && echo "$device"
[ -n "$container" ] || say "$disk belongs to $(called b) and is $device there; what is missing is fetched when it is read"
lm b wait "$disk" >&2
verified=$(lm b verify "$disk") || die "$verified"
say "$verified"
look a
# The device of a disk that is given away for good shows what was once in it.
[ -z "$(of '.device // empty')" ] || lm a detach "$disk" >&2 || say "$(called a) still has it attached: unmount it, then 'lazy-migrate detach $disk'"
back="$0 --from ${ssh_to[b]} --to ${ssh_to[a]} --disk $disk"
[ "${ssh_to[a]}" != here ] || back+=" --to-address ${address[a]}"
[ "${ssh_to[b]}" != here ] || back+=" --from-address ${address[b]}"
[ -z "$container" ] || back+=" --container $container --runtime $runtime"
say "$disk has moved. Back, with what was written since: $back"
