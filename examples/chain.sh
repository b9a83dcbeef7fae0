#!/usr/bin/env bash
# Moves a disk on to a third host while it is still arriving from the first: typed on the host in the middle, at any time
# after the disk came there. A disk moves on when all of it is here, so this waits for that, with progress, and moves it on
# at once.
#
#   examples/chain.sh DISK --to HOST:PORT [--hurry] [--timeout SECONDS] [--container ID --runtime NAME [OPTION...]]
#
#   --hurry         the rest is read through the disk's device as well, so it comes as fast as the link and the first host
#                   can: what is read is not limited by this node's `serve --pull-rate`, as the background is, which a
#                   running node keeps. Attaches the disk for that long if it is not. Slows other disks' pulls down.
#   --timeout       give up waiting for the rest after this long (as long as it takes); nothing is undone
#   --container, --runtime  its container moves along, with the further OPTIONs of `migrate` (--tcp-established, ...).
#                   Without them the disk moves alone: whoever uses it has stopped.
#
# When the first host is not heard, the disk stands still here (fenced) and nothing is lost: this says so and goes on
# waiting. If the first host takes the disk back meanwhile, there is nothing to move on, and it ends with 3.
# Can be interrupted and typed again at any time: it goes on where things stand. LAZY_MIGRATE_CONTROL says which node;
# `lazy-migrate` is taken from PATH, or is $LAZY_MIGRATE; needs jq. Exit status: 0 the third host has all of it; 1 failed;
# 2 usage; 3 refused; 4 node or peer unreachable; 5 timed out.
set -euo pipefail
say() { echo "chain: $*" >&2; }
die() {
  say "$1"
  exit "${2:-1}"
}
usage() { die "$1; the head of $0 says what there is" 2; }
lazy_migrate=${LAZY_MIGRATE:-lazy-migrate}
disk='' to='' hurry=0 timeout='' container='' runtime='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --to | --timeout | --container | --runtime)
      [ $# -ge 2 ] || usage "option $1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --hurry) hurry=1 ;;
    *)
      if [ -z "$disk" ] && [[ $1 != -* ]]; then disk=$1; elif [ -n "$runtime" ]; then options+=("$1"); else
        usage "unknown argument $1"
      fi
      ;;
  esac
  shift
done
[ -n "$disk" ] && [ -n "$to" ] || usage "a DISK and --to are needed"
[ -n "$container" ] && [ -n "$runtime" ] || [ -z "$container$runtime" ] || usage "--container and --runtime go together"
[[ $timeout =~ ^[0-9]*$ ]] || usage "--timeout $timeout: a number of seconds"
command -v jq >/dev/null || die "jq is missing; install the package jq"

# Sets status; a node that is being started again is waited for.
look() {
  local code=0 until=$((SECONDS + 60))
  until status=$("$lazy_migrate" status "$disk" --json); do
    code=$?
    [ "$code" = 4 ] && [ "$SECONDS" -lt "$until" ] && [ -n "${seen:-}" ] || exit "$code"
    sleep 1
  done
  seen=1
}
of() { jq -r "$1" <<<"$status"; }

reader='' attached=''
end_hurry() {
  [ -z "$reader" ] || { kill "$reader" 2>/dev/null && wait "$reader" 2>/dev/null; } || true
  reader=''
  [ -z "$attached" ] || timeout 20 "$lazy_migrate" detach "$disk" >/dev/null || say "$disk stays attached to $attached"
  attached=''
}
trap end_hurry EXIT
trap 'say "interrupted; nothing is undone, type it again to go on"; exit 130' INT
trap 'exit 143' TERM HUP

# All of it is read once, so all of it is asked for.
begin_hurry() {
  local device
  device=$(of '.device // empty')
  if [ -z "$device" ]; then
    device=$("$lazy_migrate" attach "$disk") || die "--hurry needs the disk's device" $?
    attached=$device
  fi
  say "reading all of $device"
  dd if="$device" of=/dev/null bs=1M iflag=direct status=none &
  reader=$!
}

# here: true when all of it is here; says what it is waiting for whenever that changes.
said=''
here() {
  local now peer
  look
  peer=$(of .peer)
  case $(of '"\(.role) \(.phase)"') in
    'destination complete' | 'local serving' | 'source serving') return ;;
    'destination active')
      now=$(of '"\(.present_bytes * 100 / .size | floor)% of \(.size) bytes are here\(if .paused then "; paused: \(.paused)" else "" end)"')
      ;;
    'destination fenced') now="its source $peer is not heard: $disk stands still until it is, and nothing is lost" ;;
    'destination discarded') die "$disk is discarded here: $peer has taken it back, and there it can be moved" 3 ;;
    destination*) die "$disk was not handed over to this host yet: it is $(of .phase)" 3 ;;
    # By an earlier run.
    'source handed-over' | 'source released' | 'source preparing' | 'source frozen') return ;;
    *) die "$disk is $(of .role) $(of .phase) here, so it cannot be moved on" 3 ;;
  esac
  [ "$now" = "$said" ] || say "$now"
  said=$now
  return 1
}

until here; do
  [ "$hurry" = 0 ] || [ -n "$reader" ] || [ "$(of .phase)" != active ] || begin_hurry
  [ -z "$timeout" ] || [ "$SECONDS" -lt "$timeout" ] || die "$disk is not complete after $timeout s; it goes on arriving" 5
  # Ends as soon as it is so; why it did not, the next look tells.
  "$lazy_migrate" wait "$disk" --timeout 2s >/dev/null 2>&1 || [ $? = 5 ] || sleep 1
done
end_hurry

stands=$(of '"\(.role) \(.phase)"') moved_to=$(of '.peer // empty')
case $stands in
  'source released') ;;
  'source handed-over') say "$disk was handed over to $moved_to already; waiting until it has all of it" ;;
  *)
    say "all of $disk is here; moving it on to $to"
    if [ -n "$runtime" ]; then
      "$lazy_migrate" migrate "$disk" --to "$to" --container "$container" --runtime "$runtime" "${options[@]}" >/dev/null
    else
      "$lazy_migrate" prepare "$disk" --to "$to" >/dev/null
      "$lazy_migrate" handover "$disk" >/dev/null
      say "$disk belongs to $to: it can be used there"
    fi
    look
    moved_to=$(of .peer)
    ;;
esac
"$lazy_migrate" wait "$disk" >/dev/null
[ "$moved_to" = "$to" ] || die "$disk has moved, but to $moved_to, by an earlier command" 3
say "$disk is at $to, all of it; there 'lazy-migrate status $disk' shows it. 'lazy-migrate remove $disk' makes this host forget it"
