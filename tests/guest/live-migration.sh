#!/usr/bin/env bash
# The whole product at once: a container with a client moves between two hosts, its disk after it. What is checked is in
# the example's inner part; here are the limits that its answer has to keep.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
programs=$(mktemp -d)
for program in service client; do
  gcc -static -O1 -o "$programs/$program" "$repo/examples/live-migration/$program.c"
done
install "$LAZY_MIGRATE_BIN" "$programs/lazy-migrate"
EXAMPLE_MIB=${EXAMPLE_MIB:-90} "$repo/examples/live-migration/inner.sh" "$programs" >"$programs/answer"
cat "$programs/answer"
# Most of the disk was needed by nobody before it came; some of it was. The holes of a 190 MiB disk did not travel.
tail -n 1 "$programs/answer" | jq -e '
  .verified == true and .client_lost == 0 and .frozen_ms > 0 and .frozen_ms < 30000
  and .client_longest_gap_ms >= .frozen_ms / 2 and .demand_fetches > 0
  and .pulled_bytes > 60 * 1048576 and .skipped_bytes > 20 * 1048576' >/dev/null ||
  { echo "the answer is not within its limits" >&2; exit 1; }
# Nothing is left behind: no namespace, no mount, no attached device, no process.
left=$(ip netns list | grep lm-example || true
  grep live-migration /proc/self/mountinfo || true
  grep -v '^0$' /sys/block/nbd*/size || true
  pgrep -a service || pgrep -a lazy-migrate || true)
[ -z "$left" ] || { echo "left behind: $left" >&2; exit 1; }
