#!/usr/bin/env bash
# What goes wrong while memory is copied in rounds costs nothing: the container has never stood still, its client keeps its
# connection, and nothing of the rounds is left on either host.
# tests/run: timeout=1200 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
memory_mib=32
precopy=("${migrate[@]}" --memory precopy)

# What the nodes and their runc take for criu: a kernel that tracks no pages when there is a file `untracked`; else a word from
# here waits for it in `criu_says`, when runc makes a pre-dump.
criu=$(command -v criu)
mkdir "$work/bin"
cat >"$work/bin/criu" <<C
#!/bin/bash
if [ "\$1" = check ] && [ -e $work/untracked ]; then
  echo "mem_dirty_track is not supported"
  exit 1
fi
[ -z "\${PRE_DUMP:-}" ] || [ ! -e $work/criu_says ] || . $work/criu_says
exec $criu "\$@"
C
chmod +x "$work/bin/criu"
PATH=$work/bin:$PATH
set_the_stage
# Each start of a node writes its runc anew.
wrap_runc() {
  cp "$work/a/runc" "$work/a/runc.right"
  printf '#!/bin/bash\ncase " $* " in *" --pre-dump "*) export PRE_DUMP=1 ;; esac\nexec %q "$@"\n' "$work/a/runc.right" >"$work/a/runc.new"
  chmod +x "$work/a/runc.new"
  mv "$work/a/runc.new" "$work/a/runc"
}
wrap_runc

phase() { on "$1" status web --json | jq -r .phase; }
is_phase() { [ "$(phase "$1")" = "$2" ]; }
images_on_a() { find "$work/a/state/disks/web" -name 'checkpoint*' ! -name checkpoint.probe; }
no_images_on_a() { [ -z "$(images_on_a)" ]; }
# was_never_stopped: A runs as before, nothing of the attempt is left anywhere.
was_never_stopped() {
  a_is_as_it_was
  nothing_on_b
  wait_until 20 "A keeps what it dumped: $(images_on_a)" no_images_on_a
  [ "$("$work/a/runc" state web | jq -r .status)" = running ] || fail "A's container does not run"
}
# not_frozen: what was said last has no word of a container that stood still.
not_frozen() { ! grep -E 'ms  web: frozen' "$1" || fail "the container was frozen"; }
# begin OPTIONS...: a migration in the background.
begin() {
  : >"$work/timeline"
  in_background hosta "$programs/lazy-migrate" --control "$work/a/control.sock" "$@" >"$work/migrate.json" 2>"$work/timeline" &
  migrating=$!
}

say "the kernel does not track pages: refused, nothing begun"
touch "$work/untracked"
refused 3 'mem_dirty_track is not supported' on a "${precopy[@]}"
rm "$work/untracked"
is_phase a serving || fail "A is $(phase a)"
refused 2 '--memory lazy is not offered' on a "${migrate[@]}" --memory lazy
was_never_stopped

say "criu fails in the second round"
echo "[ ! -e $work/a/state/disks/web/checkpoint/pre-2 ] || exit 1" >"$work/criu_says"
refused 1 'cancelled and the container goes on here' on a "${precopy[@]}"
grep -q 'memory, round 1' "$work/stderr" || fail "there was no first round: $(cat "$work/stderr")"
not_frozen "$work/stderr"
was_never_stopped

say "criu is killed in the middle of a round"
# When it has begun to write its log it is about to stop the tasks and to look at their memory.
log=$work/a/state/disks/web/checkpoint.work/dump.log
cat >"$work/criu_says" <<C
$criu "\$@" &
until [ -e $log ] || ! kill -0 \$! 2>/dev/null; do :; done
[ ! -e $log ] || kill -KILL \$!
wait \$!
exit
C
refused 1 'criu was ended before it was done' on a "${precopy[@]}"
grep -q 'cancelled and the container goes on here' "$work/error" || fail "it said: $(cat "$work/error")"
not_frozen "$work/stderr"
was_never_stopped

# What waits for a word from here in the middle of a round.
held="echo \$\$ >$work/dumping; until [ -e $work/go ]; do sleep 0.05; done"
held_in_a_round() {
  rm -f "$work/go" "$work/dumping"
  echo "$held" >"$work/criu_says"
  begin "${precopy[@]}"
  wait_until 300 "criu was not called" test -e "$work/dumping"
}

say "cancelled in the middle of a round"
held_in_a_round
on a cancel web >&2
! wait "$migrating" || fail "a cancelled migration succeeded"
not_frozen "$work/timeline"
say "it said: $(tail -n 1 "$work/timeline")"
was_never_stopped

say "A's node is killed in the middle of a round"
held_in_a_round
kill -KILL "${node_pid[a]}"
wait "${node_pid[a]}" 2>/dev/null || true
touch "$work/go"
! wait "$migrating" || fail "a migration without a node succeeded"
[ -n "$(images_on_a)" ] || fail "there was nothing to tidy up"
start_node a
wrap_runc
was_never_stopped

say "the link is cut in the middle of a round"
held_in_a_round
cut_link
touch "$work/go"
status=0
wait "$migrating" || status=$?
[ "$status" = 4 ] || fail "status $status instead of 4: $(cat "$work/timeline")"
not_frozen "$work/timeline"
mend_link
was_never_stopped
rm "$work/criu_says"

say "and after all that it moves"
migrate=("${precopy[@]}")
move_for_good
client_is_content
