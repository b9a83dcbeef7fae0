#!/usr/bin/env bash
# The container cannot be restored on B after the handover: A takes the disk back and its container goes on at once,
# nothing is lost, nothing is left on B, and the next migration succeeds.
# tests/run: timeout=600 memory=3072 disk=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"
set_the_stage

# Whatever the checks of `prepare` can see is right; what fails is seen by nobody before the restore.
say "B: the restore is refused by runc: a file that is to be mounted is missing"
bundle=$work/b/bundles/web/config.json
cp "$bundle" "$work/config.json"
jq '.mounts += [{destination: "/missing", type: "bind", source: "/nonexistent/file", options: ["rbind", "ro"]}]' \
  "$work/config.json" >"$bundle"
refused 1 'could not be restored.*goes on here' on a "${migrate[@]}"
a_is_as_it_was
nothing_on_b

# Not half way: runc then waits until the time of the restore is over, longer than the client does. A restore that hangs
# until then, and what is cleaned up after it, is in container_real.
say "B: criu fails at the restore"
cp "$work/config.json" "$bundle"
mkdir "$work/b/bin"
printf '#!/bin/sh\nexit 1\n' >"$work/b/bin/criu"
chmod +x "$work/b/bin/criu"
# Only for restores, or `prepare` would see it.
cp "$work/b/runc" "$work/b/runc.right"
cat >"$work/b/runc" <<R
#!/bin/bash
case " \$* " in *" restore "*) PATH=$work/b/bin:\$PATH ;; esac
exec $work/b/runc.right "\$@"
R
refused 1 'could not be restored.*goes on here' on a "${migrate[@]}"
a_is_as_it_was
nothing_on_b
cp "$work/b/runc.right" "$work/b/runc"

say "B: the container's root is not on the disk"
jq --arg root "$work/b/mnt/web/elsewhere" '.root.path = $root' "$work/config.json" >"$bundle"
refused 1 'could not be restored.*goes on here' on a "${migrate[@]}"
a_is_as_it_was
nothing_on_b

say "B: all is right"
cp "$work/config.json" "$bundle"
move_for_good
client_is_content
