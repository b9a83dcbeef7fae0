#!/usr/bin/env bash
# Plugs a service's network namespace into this host's bridge, and tells the network that its address is here now; or
# unplugs it. The hook of follow.sh, on every host where the service may be:
#
#   examples/network-switch/follow.sh web -- examples/network-switch/bridge.sh /etc/lazy-migrate/network/web
#
# The file says what is what on this host, as shell variables:
#
#   BRIDGE=br0        the host's bridge, on the network where the service's clients are
#   PORT=veth-web     the host's end of a veth pair
#   NETNS=web         the service's network namespace, as `ip netns` names it; there on both hosts before a move
#   INTERFACE=eth0    the other end of the pair, in there, up and with the service's address: on both hosts the same
#
# The switches, and the clients if the hardware addresses differ, learn where the address is now by gratuitous ARP. Connections
# are kept if both hosts give the interface the same hardware address, and the migration was told --tcp-established. Needs
# root, iproute2, iputils-arping and util-linux. May be called for what is so already. Exit status: 0 done; 1 failed; 2 usage.
set -euo pipefail
die() {
  echo "bridge: $1" >&2
  exit "${2:-1}"
}
[ $# -ge 2 ] || die "usage: bridge.sh SETTINGS up|down [DISK]" 2
[ -r "$1" ] || die "cannot read the settings $1" 2
BRIDGE='' PORT='' NETNS='' INTERFACE=''
# shellcheck source=/dev/null
. "$1"
[ -n "$BRIDGE" ] && [ -n "$PORT" ] && [ -n "$NETNS" ] && [ -n "$INTERFACE" ] ||
  die "$1: BRIDGE, PORT, NETNS and INTERFACE are all needed" 2

announce() {
  local address found=0
  while read -r address; do
    found=1
    # Twice, for a port that has just come up may lose the first.
    nsenter --net="/run/netns/$NETNS" arping -q -U -c 2 -w 3 -I "$INTERFACE" "$address" ||
      die "cannot announce $address from $INTERFACE of $NETNS"
  done < <(ip -n "$NETNS" -4 -o address show dev "$INTERFACE" scope global | sed -nE 's:.* inet ([0-9.]+)/.*:\1:p')
  [ "$found" = 1 ] || die "$INTERFACE of $NETNS has no address to announce"
}

case $2 in
  up)
    command -v arping >/dev/null || die "arping is missing; install the package iputils-arping"
    ip link set dev "$PORT" master "$BRIDGE" up
    announce
    ;;
  down) ip link set dev "$PORT" nomaster down ;;
  *) die "unknown argument $2; usage: bridge.sh SETTINGS up|down [DISK]" 2 ;;
esac
