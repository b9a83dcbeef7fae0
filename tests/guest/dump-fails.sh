#!/usr/bin/env bash
# What goes wrong before the handover costs nothing: criu fails or is killed during the dump, the link dies in the middle
# of the checkpoint. A's container goes on, its client keeps its connection, and nothing is left on B, nor is anything
# touched there that was there before. And when only the `migrate` command is interrupted, the node goes on.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
set_the_stage

# criu_for_dumps SCRIPT...: what A's runc takes for criu when it dumps; without one, criu itself.
criu=$(command -v criu)
mkdir "$work/a/bin"
cp "$work/a/runc" "$work/a/runc.right"
criu_for_dumps() {
  if [ $# = 0 ]; then
    cp "$work/a/runc.right" "$work/a/runc.new"
  else
    printf '%s\n' '#!/bin/bash' "$@" >"$work/a/bin/criu"
    chmod +x "$work/a/bin/criu"
    cat >"$work/a/runc.new" <<R
#!/bin/bash
case " \$* " in *" checkpoint "*) PATH=$work/a/bin:\$PATH ;; esac
exec $work/a/runc.right "\$@"
R
    chmod +x "$work/a/runc.new"
  fi
  mv "$work/a/runc.new" "$work/a/runc"
}
# What waits for a word from here in the middle of the dump.
held="echo \$\$ >$work/dumping; until [ -e $work/go ]; do sleep 0.05; done; exec $criu \"\$@\""

say "B has a container of that name, which is somebody else's"
mkdir -p "$work/other/rootfs/bin"
cp /bin/busybox "$work/other/rootfs/bin/"
(cd "$work/other" && runc spec)
jq '.process.terminal = false | .process.args = ["/bin/busybox", "sleep", "600"]' "$work/other/config.json" >"$work/config.json"
mv "$work/config.json" "$work/other/config.json"
"$work/b/runc" run -d -b "$work/other" web </dev/null >/dev/null 2>&1
refused 3 'exists on this host already' on a "${migrate[@]}"
[ "$("$work/b/runc" state web | jq -r .status)" = running ] || fail "B's own container does not run any more"
a_is_as_it_was
"$work/b/runc" delete -f web
nothing_on_b

say "A: criu fails"
criu_for_dumps 'exit 1'
refused 1 'cancelled and the container goes on here' on a "${migrate[@]}"
a_is_as_it_was
nothing_on_b

say "A: criu is killed during the dump"
criu_for_dumps "CRIU=$criu exec $(realpath "$(dirname "${BASH_SOURCE[0]}")")/dying-criu \"\$@\""
refused 1 'cancelled and the container goes on here' on a "${migrate[@]}"
a_is_as_it_was
nothing_on_b

say "the link is cut in the middle of the checkpoint"
criu_for_dumps "$held"
in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >/dev/null 2>"$work/timeline" &
migrating=$!
wait_until 60 "criu was not called" test -e "$work/dumping"
cut_link
touch "$work/go"
status=0
wait "$migrating" || status=$?
[ "$status" = 4 ] || fail "status $status instead of 4: $(cat "$work/timeline")"
grep -q 'cancelled and the container goes on here' "$work/timeline" || fail "it said: $(cat "$work/timeline")"
say "as it should be, status $status: $(tail -n 1 "$work/timeline")"
a_is_as_it_was
mend_link
# B hears by its next beat that it is over.
nothing_on_b

say "the command is interrupted during the dump, and the node goes on"
rm "$work/dumping" "$work/go"
# A shell without job control has its background commands ignore SIGINT.
in_background hosta env --default-signal=INT "$programs/lazy-migrate" --control "$work/a/control.sock" "${migrate[@]}" >/dev/null 2>"$work/timeline" &
migrating=$!
wait_until 60 "criu was not called" test -e "$work/dumping"
kill -INT "$migrating"
status=0
wait "$migrating" || status=$?
[ "$status" -ge 128 ] || fail "the interrupted command answered $status: $(cat "$work/timeline")"
touch "$work/go"
on a wait web --for complete --timeout 120s >&2
goes_on "$log_b"
check_log "$log_b" || fail "B's log has a gap"
wait_until 30 "the client gets no replies from B" client_lives
client_is_content
[ "$("$work/a/runc" list -q)" = '' ] || fail "A still has the container"
