#!/usr/bin/env bash
# Keeps a service's network where its disk is: calls a hook whenever this host becomes, or is no longer, the one where the
# service runs. The same on both hosts, for as long as the host is up (as a service of its own, with Restart=always).
#
#   examples/network-switch/follow.sh DISK [--silence SECONDS] -- HOOK [ARG...]
#
# calls `HOOK ARG... up DISK` or `HOOK ARG... down DISK`; see bridge.sh beside this file. The hook is called once at the
# beginning, and may be called again for what is so already. If it fails, it is called again every two seconds.
#
#   up    the disk is this host's: it was always here, it came here (active, complete), or it came back (rollback, cancel)
#   down  it is frozen for a move, was handed over or released, is being prepared here, is fenced, was taken back, or is
#         not known here
#
# Events of the node (`events --follow`) say when to look; what counts is its status. While the node does not answer, the
# network stays as it is, but for a disk that came here and is not complete: the other host may take that one back when the
# lease has ended, so after --silence (8, for the lease of 10 s: `serve --lease`, less its margin of a fifth) it is `down`.
# When this script ends, the network stays as it is. LAZY_MIGRATE_CONTROL says which node; `lazy-migrate` is taken from
# PATH, or is $LAZY_MIGRATE; needs jq. Ends only by a signal, or with 2 for wrong usage.
set -euo pipefail
say() { echo "follow: $*" >&2; }
usage() {
  say "$1; the head of $0 says what there is"
  exit 2
}
lazy_migrate=${LAZY_MIGRATE:-lazy-migrate}
disk='' silence=8 hook=()
while [ $# -gt 0 ]; do
  case $1 in
    --silence)
      [ $# -ge 2 ] || usage "option $1 needs a value"
      silence=$2
      shift
      ;;
    --)
      shift
      hook=("$@")
      break
      ;;
    *)
      [ -z "$disk" ] && [[ $1 != -* ]] || usage "unknown argument $1"
      disk=$1
      ;;
  esac
  shift
done
[ -n "$disk" ] && [ ${#hook[@]} -gt 0 ] || usage "a DISK and a HOOK are needed"
[[ $silence =~ ^[1-9][0-9]*$ ]] || usage "--silence $silence: a number of seconds"
command -v jq >/dev/null || usage "jq is missing; install the package jq"

follower=''
end_follower() {
  [ -z "$follower" ] || kill "$follower" 2>/dev/null || true
  follower=''
}
trap end_follower EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Seconds since the host was started; nobody sets this clock.
now() {
  local up
  read -r up _ </proc/uptime
  echo "${up%.*}"
}

# apply up|down WHY: calls the hook, if that is not so already.
is=''
apply() {
  [ "$is" != "$1" ] || return 0
  say "$1: $2"
  if "${hook[@]}" "$1" "$disk"; then
    is=$1
  else
    say "'${hook[*]} $1 $disk' failed; it is tried again in two seconds"
    is=''
  fi
}

# Looks at the disk, and does what follows from it.
heard=$(now) lent=0
look() {
  local status code=0 stands
  # Whatever it is that answers, it has to answer soon.
  status=$(timeout 2 "$lazy_migrate" status "$disk" --json 2>/dev/null) || code=$?
  case $code in
    0) ;;
    # The node answers, and does not know the disk.
    1) stands='not known here' ;;
    *)
      [ "$lent" = 0 ] || [ "$(now)" -lt "$((heard + silence))" ] ||
        apply down "the node has not answered for $silence s, and another host may take $disk back"
      return 0
      ;;
  esac
  heard=$(now)
  stands=${stands:-$(jq -r '"\(.role) \(.phase)"' <<<"$status")}
  lent=0
  case $stands in
    local* | pull* | 'source serving' | 'source preparing' | 'destination complete') apply up "$disk is $stands" ;;
    'destination active')
      lent=1
      apply up "$disk is $stands"
      ;;
    *) apply down "$disk is $stands" ;;
  esac
}

while :; do
  # From here on nothing is missed: what happened before is in the status.
  last=$(timeout 5 "$lazy_migrate" events --json 2>/dev/null | tail -n 1 | jq -r .seq) || last=''
  exec 7< <(exec "$lazy_migrate" events --follow --json --after "${last:-0}" 2>/dev/null)
  follower=$!
  look
  while :; do
    code=0
    read -r -t 2 -u 7 line || code=$?
    # Nothing for two seconds is a reason to look as well: a node that hangs tells no events.
    if [ "$code" = 0 ]; then
      [[ $line != *"\"disk\":\"$disk\""* ]] || look
    elif [ "$code" -gt 128 ]; then
      look
    else
      break
    fi
  done
  end_follower
  exec 7<&-
  # The node has stopped, or was not there: until it is back.
  look
  sleep 1
done
