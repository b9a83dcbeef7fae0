#!/usr/bin/env bash
# Empties a host: moves its disks, with their containers, to another one, some at a time, and waits until all of them are
# whole there. Typed on the host that is to be emptied, as often as one likes: what has moved already is left alone.
#
#   examples/drain.sh --to HOST:PORT [-j N] [--runtime NAME [OPTION...]] [-- DISK...]
#
#   -j N            so many migrations at a time (2)
#   --runtime NAME  each disk has a container of the same name; it moves along, with the further OPTIONs of `migrate`
#                   (--tcp-established, --link-timeout 10s, ...). Without it the disks move alone: whoever uses them has
#                   stopped, or freezes them.
#   DISK            only these; otherwise all that this node has to give away
#
# The destination's `serve --pull-rate` limits what all of them pull together; what a container waits for is fetched before
# anything that is pulled for any of them. LAZY_MIGRATE_CONTROL says which node; `lazy-migrate` is taken from PATH, or is
# $LAZY_MIGRATE. Exit status: 0 all have moved; 1 some have not, and are named. Ctrl-C begins no more; those that are under way
# are the node's and go on.
set -euo pipefail
say() { echo "drain: $*" >&2; }
die() {
  say "$1"
  exit "${2:-1}"
}
usage() { die "$1; the head of $0 says what there is" 2; }
lazy_migrate=${LAZY_MIGRATE:-lazy-migrate}
to='' jobs=2 runtime='' options=() disks=()
while [ $# -gt 0 ]; do
  case $1 in
    --to | -j | --runtime)
      [ $# -ge 2 ] || usage "option $1 needs a value"
      case $1 in --to) to=$2 ;; -j) jobs=$2 ;; --runtime) runtime=$2 ;; esac
      shift 2
      ;;
    --)
      shift
      disks=("$@")
      break
      ;;
    *)
      [ -n "$runtime" ] || usage "unknown argument $1"
      options+=("$1")
      shift
      ;;
  esac
done
[ -n "$to" ] || usage "--to is needed"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || usage "-j $jobs: a number of migrations"

status=$("$lazy_migrate" status --json) || die "the node does not answer" 4
if [ ${#disks[@]} = 0 ]; then
  # What pulls from elsewhere, or was given away already, is not this node's to give.
  mapfile -t disks < <(jq -r '.disks[] | select(.role == "local" or .phase == "complete" and .role == "destination"
    or .phase == "serving" and .role == "source") | .name' <<<"$status")
fi
[ ${#disks[@]} -gt 0 ] || { say "nothing to move"; exit 0; }

move() {
  local disk=$1 known
  known=$("$lazy_migrate" status "$disk" --json | jq -r '"\(.role) \(.phase)"')
  case $known in
    'source released') return ;;
    # Begun by an earlier run: it goes on by itself.
    'source handed-over') ;;
    *)
      if [ -n "$runtime" ]; then
        "$lazy_migrate" migrate "$disk" --to "$to" --container "$disk" --runtime "$runtime" "${options[@]}" >/dev/null
        return
      fi
      "$lazy_migrate" prepare "$disk" --to "$to" >/dev/null && "$lazy_migrate" handover "$disk" >/dev/null || return
      ;;
  esac
  "$lazy_migrate" wait "$disk" >/dev/null 2>&1
}

trap 'say "interrupted; what is under way goes on, lazy-migrate status shows it"; exit 130' INT TERM
declare -A moving=()
stayed=() moved=0
# One of those under way ends; which it was is told by its process number.
collect() {
  local pid status=0
  wait -n -p pid || status=$?
  if [ "$status" = 0 ]; then
    moved=$((moved + 1))
    say "${moving[$pid]} has moved ($moved of ${#disks[@]})"
  else
    stayed+=("${moving[$pid]}")
    say "${moving[$pid]} has not moved"
  fi
  unset "moving[$pid]"
}
for disk in "${disks[@]}"; do
  while [ ${#moving[@]} -ge "$jobs" ]; do collect; done
  move "$disk" &
  moving[$!]=$disk
done
while [ ${#moving[@]} -gt 0 ]; do collect; done
[ ${#stayed[@]} = 0 ] || die "not moved: ${stayed[*]}; the lines above say why, 'lazy-migrate status' how each stands"
say "all ${#disks[@]} have moved to $to"
