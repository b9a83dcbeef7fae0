#!/usr/bin/env bash
# Gives a host's node a new binary under containers that run: stop, install, start, and see that all is as it was.
#
#   examples/upgrade-node.sh --stop COMMAND --install COMMAND --start COMMAND
#
# for example, where the node is a systemd service:
#   examples/upgrade-node.sh --stop 'systemctl stop lazy-migrate' \
#     --install 'install -m 755 ./lazy-migrate /usr/bin/lazy-migrate' --start 'systemctl start lazy-migrate'
#
# While no node runs, the kernel holds the I/O of its devices: containers wait, and see no error. A container that came here
# in a migration that is not complete is stopped by its guard when its lease ends, and goes on when the new node has renewed
# it. So be quick: --install should only copy. Refused while a handover is under way. LAZY_MIGRATE_CONTROL says which node;
# `lazy-migrate` is taken from PATH, or is $LAZY_MIGRATE. Under systemd the unit needs KillMode=process.
set -euo pipefail
say() { echo "upgrade-node: $*" >&2; }
die() {
  say "$1"
  exit "${2:-1}"
}
stop='' install='' start=''
while [ $# -gt 0 ]; do
  case $1 in
    --stop | --install | --start)
      [ $# -ge 2 ] || die "option $1 needs a command" 2
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    *) die "unknown argument $1; the head of $0 says which there are" 2 ;;
  esac
done
[ -n "$stop" ] && [ -n "$install" ] && [ -n "$start" ] || die "--stop, --install and --start are all needed" 2
lazy_migrate=${LAZY_MIGRATE:-lazy-migrate}
disks() { "$lazy_migrate" status --json | jq -c '[.disks[] | {name, phase, device, epoch}]'; }

before=$(disks) || die "the node does not answer, so there is nothing to compare with; start it first" 4
moving=$(jq -r '[.[] | select(.phase == "frozen" or .phase == "preparing" or .phase == "ready") | .name] | join(" ")' <<<"$before")
[ -z "$moving" ] || die "$moving: a migration is about to hand over; wait for it, or cancel it" 3
# It must be the new one that fails to run, not the host.
began=$(date +%s%N)
sh -c "$stop" || die "the node could not be stopped; nothing was changed"
sh -c "$install" || say "the new binary could not be installed; the old one is started again"
sh -c "$start" || die "the node does not start: its devices wait meanwhile; install the old binary and start that"
deadline=$((SECONDS + 60))
until after=$(disks 2>/dev/null); do
  [ "$SECONDS" -lt "$deadline" ] || die "the node does not answer; its devices wait meanwhile; see its log" 5
  sleep 0.05
done
say "the node was away for $((($(date +%s%N) - began) / 1000000)) ms"

# A destination begins fenced, and goes on with the first heartbeat that is answered.
settled() { jq -e --argjson now "$(disks)" '. == $now' <<<"$before" >/dev/null; }
until settled; do
  [ "$SECONDS" -lt "$deadline" ] ||
    die "not everything is as it was: before $(jq -c . <<<"$before"), now $(disks)" 5
  sleep 0.1
done
for device in $(jq -r '.[].device | select(. != null)' <<<"$after"); do
  timeout 30 dd if="$device" of=/dev/null bs=4096 count=1 iflag=direct status=none || die "$device does not answer"
done
say "all is as it was: $(jq -r '[.[] | "\(.name) \(.phase)"] | join(", ")' <<<"$after")"
