#!/usr/bin/env bash
# The whole product at once: a container with a client moves between two hosts, its disk after it. What is checked is in
# the example's inner part; here are the limits that its answer has to keep.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$(mktemp -d)
export EXAMPLE_REPORTS=$out/reports
mkdir "$EXAMPLE_REPORTS"
LAZY_MIGRATE=$LAZY_MIGRATE_BIN EXAMPLE_MIB=${EXAMPLE_MIB:-90} "$repo/examples/live-migration.sh" --here >"$out/answer" 2> >(tee "$out/story" >&2)
cat "$out/answer"
# Most of the disk was needed by nobody before it came; some of it was. The holes of a 190 MiB disk did not travel.
tail -n 1 "$out/answer" | jq -e '
  .verified == true and .client_lost == 0 and .frozen_ms > 0 and .frozen_ms < 30000
  and .client_longest_gap_ms >= .frozen_ms / 2 and .demand_fetches > 0
  and .pulled_bytes > 60 * 1048576 and .skipped_bytes > 20 * 1048576' >/dev/null ||
  { echo "the answer is not within its limits" >&2; exit 1; }
# What the operator saw: every step once and in order, whatever the figures are.
steps=$(sed -nE 's/^ *[0-9]+ ms  (web: .*)/\1/p' "$out/story" | sed -E 's/[0-9.]+ (KiB|MiB|ms)/N \1/g')
[ "$steps" = "web: prepared
web: frozen
web: checkpoint is there, N KiB
web: handed over
web: resumed, frozen for N ms
web: complete" ] || { echo "the timeline is: $steps" >&2; exit 1; }
/usr/bin/python3 -m jsonschema -i "$EXAMPLE_REPORTS/migrate.json" "$repo/schemas/migrate.json"
# The source's report has the time in which the container stood still: from the step "frozen" on, which comes when it is so,
# while what was told counts from the order to freeze.
jq -e --argjson told "$(tail -n 1 "$out/answer" | jq .frozen_ms)" '
  [.summary.windows[] | select(.kind == "frozen")] as $frozen
  | .summary.outcome == "complete" and .summary.frozen_ms == $told and ($frozen | length) == 1
  and ($frozen[0].to_ms - $frozen[0].from_ms | . <= $told + 1000 and . >= $told / 2)
  and ([.events[].event] | (index("frozen") < index("handed-over")) and (index("handed-over") < index("resumed")))
  ' "$EXAMPLE_REPORTS/a.json" >/dev/null ||
  { echo "the source's report does not show the pause: $(jq -c '[.summary, [.events[].event]]' "$EXAMPLE_REPORTS/a.json")" >&2; exit 1; }
jq -e '.summary.outcome == "complete" and .summary.background_fetches > 0 and (.waits | length) > 0' "$EXAMPLE_REPORTS/b.json" >/dev/null ||
  { echo "the destination's report: $(jq -c .summary "$EXAMPLE_REPORTS/b.json")" >&2; exit 1; }
grep -q '<html' "$EXAMPLE_REPORTS/a.html" && grep -q frozen "$EXAMPLE_REPORTS/a.html" || { echo "no page" >&2; exit 1; }
# Nothing is left behind: no namespace, no mount, no attached device, no process.
left=$(ip netns list | grep lm-example || true
  grep live-migration /proc/self/mountinfo || true
  grep -v '^0$' /sys/block/nbd*/size || true
  pgrep -a service || pgrep -a lazy-migrate || true)
[ -z "$left" ] || { echo "left behind: $left" >&2; exit 1; }
