#!/usr/bin/env bash
# Moves a disk back to the host that it came from: typed on the host where it is now. Only what was written since it came is
# sent, into the image that it lay in before, as long as the other host still shows the disk (released) and nobody wrote to that
# image.
#
#   examples/move-back.sh DISK [--to HOST:PORT] [--there COMMAND [--from-scratch]] [--container ID --runtime NAME [OPTION...]]
#
#   --to             that host's peer address; without it the one that the disk came from, which the node knows until
#                    something was tried with it
#   --there COMMAND  what is `lazy-migrate` on that host, for example 'ssh root@10.0.0.1 lazy-migrate': then a device that the
#                    old disk still has there is detached first, and it is told how much was sent
#   --from-scratch   what that host still has of the disk cannot be used: it is forgotten there, and all of the disk is sent to
#                    a new place. The old image stays where it is
#   --container, --runtime  its container moves along, with the further OPTIONs of `migrate` (--tcp-established, ...).
#                    Without them the disk moves alone: whoever uses it has stopped.
#
# While the other host still has what is missing here, a `rollback` there is the other way back: at once, but what was
# written here is lost. This one waits until all is here, and loses nothing. Can be interrupted and typed again at any time.
# LAZY_MIGRATE_CONTROL says which node; `lazy-migrate` is taken from PATH, or is $LAZY_MIGRATE; needs jq. Exit status: 0 the
# disk is there, all of it; 1 failed; 2 usage; 3 refused; 4 node or peer unreachable; 5 timed out.
set -euo pipefail
say() { echo "move-back: $*" >&2; }
die() {
  say "$1"
  exit "${2:-1}"
}
usage() { die "$1; the head of $0 says what there is" 2; }
lazy_migrate=${LAZY_MIGRATE:-lazy-migrate}
disk='' there='' to='' from_scratch=0 container='' runtime='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --there | --to | --container | --runtime)
      [ $# -ge 2 ] || usage "option $1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --from-scratch) from_scratch=1 ;;
    *)
      if [ -z "$disk" ] && [[ $1 != -* ]]; then disk=$1; elif [ -n "$runtime" ]; then options+=("$1"); else
        usage "unknown argument $1"
      fi
      ;;
  esac
  shift
done
[ -n "$disk" ] || usage "a DISK is needed"
[ "$from_scratch" = 0 ] || [ -n "$there" ] || usage "--from-scratch needs --there"
[ -n "$container" ] && [ -n "$runtime" ] || [ -z "$container$runtime" ] || usage "--container and --runtime go together"
command -v jq >/dev/null || die "jq is missing; install the package jq"
trap 'say "interrupted; type it again to go on"; exit 130' INT
trap 'exit 143' TERM HUP

look() { status=$("$lazy_migrate" status "$disk" --json); }
of() { jq -r "$1" <<<"$status"; }
# On the other host.
over_there() {
  local command
  read -ra command <<<"$there"
  "${command[@]}" "$@" </dev/null
}

look
case $(of '"\(.role) \(.phase)"') in
  'destination active' | 'destination fenced')
    say "$disk is still arriving from $(of .peer); waiting for the rest ('lazy-migrate rollback $disk' there would be quicker, and lose what was written here)"
    "$lazy_migrate" wait "$disk" >/dev/null
    look
    ;;
esac
from=$(of '.peer // empty') stands=$(of '"\(.role) \(.phase)"')
to=${to:-$from}
case $stands in
  'source released' | 'source handed-over') ;; # by an earlier run
  'destination complete' | 'source serving' | 'source preparing')
    [ -n "$to" ] || usage "--to is needed: this node does not know (any more) where $disk came from"
    if [ -n "$there" ]; then
      # Only what was given away there for good is touched there.
      if old=$(over_there status "$disk" --json 2>/dev/null); then
        old_stands=$(jq -r '"\(.role) \(.phase)"' <<<"$old")
        case $old_stands in
          'source released')
            [ -z "$(jq -r '.device // empty' <<<"$old")" ] || over_there detach "$disk" >/dev/null
            [ "$from_scratch" = 0 ] || over_there remove "$disk" >/dev/null
            ;;
          'destination preparing' | 'destination ready' | 'destination discarded') ;; # of an earlier attempt
          *) die "$disk is $old_stands on the other host: that is not what it gave away; see 'status $disk' there" 3 ;;
        esac
      else
        # No such disk there is no fault; whether the host answers at all is another question.
        over_there status --json >/dev/null || die "'$there' does not answer" 4
      fi
    fi
    say "moving $disk back to $to"
    if [ -n "$runtime" ]; then
      "$lazy_migrate" migrate "$disk" --to "$to" --container "$container" --runtime "$runtime" "${options[@]}" >/dev/null
    else
      "$lazy_migrate" prepare "$disk" --to "$to" >/dev/null
      "$lazy_migrate" handover "$disk" >/dev/null
      say "$disk belongs to $to: it can be used there"
    fi
    look
    ;;
  *) die "$disk is $stands here, so there is nothing to move back" 3 ;;
esac
"$lazy_migrate" wait "$disk" >/dev/null
look
[ "$(of .peer)" = "$to" ] || die "$disk has moved to $(of .peer), not to $to, by an earlier command" 3
[ -z "$there" ] || say "$(over_there status "$disk" --json | jq .pulled_bytes) bytes were sent"
say "$disk is back at $to, all of it; 'lazy-migrate remove $disk' makes this host forget it"
