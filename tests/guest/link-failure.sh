#!/usr/bin/env bash
# The link dies after the container was resumed on B: A takes it back, exactly where it was frozen.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$(mktemp -d)
LAZY_MIGRATE=$LAZY_MIGRATE_BIN EXAMPLE_MIB=${EXAMPLE_MIB:-240} "$repo/examples/live-migration.sh" --fail-link --here >"$out/answer"
cat "$out/answer"
# The client's connection had gone on to B, so it cannot live; one request was on its way when it broke. And it gives
# up a request after 8 s, which a slow machine's pauses may exceed.
tail -n 1 "$out/answer" | jq -e '.rolled_back == true and .verified == true
  and .client_lost <= 2 + .client_longest_gap_ms / 8000' >/dev/null ||
  { echo "the answer is not within its limits" >&2; exit 1; }
