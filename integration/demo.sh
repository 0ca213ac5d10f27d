#!/bin/bash
# Builds an image of the Python standard library, mounts it, compares the two, damages an object, shows what happens, and
# takes everything away again. Nothing but this repository is needed, and nothing outside a temporary directory is
# changed. Each command is printed before its output.
# Exit codes: 0 done; 1 something was not as it should be; 4 not possible here.
set -euo pipefail
cd "$(dirname "$0")/.."
same_tree=$PWD/integration/same_tree.py
PATH=$PWD/.venv/bin:$PATH

work=$(mktemp -d "${TMPDIR:-/tmp}/cfsfuse-demo.XXXXXX")
clean_up() {
    status=$?
    trap - EXIT
    cd /
    for mount in mnt again; do
        if grep -qF " $work/$mount " /proc/self/mountinfo; then
            cfsfuse umount --lazy "$work/$mount" || status=1
        fi
    done
    chmod -R u+w "$work"
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP
cd "$work"
export XDG_CACHE_HOME=$work/cache
# Or the first import of a module, by root, would change the very directory that is being compared.
export PYTHONDONTWRITEBYTECODE=1

heading() {
    printf '\n\033[1m== %s\033[0m\n' "$*"
}
[ -t 1 ] || heading() {
    printf '\n== %s\n' "$*"
}

# Prints a command as one would type it, and runs it.
run() {
    printf '$ %s\n' "$1"
    bash -c "$1"
}

fail() {
    echo "demo: $*" >&2
    exit 1
}

# Waits until the log has a line for each file that cannot be read, ten seconds at most: it is written after the answer.
wait_for_log() {
    for _ in $(seq 100); do
        [ "$(grep -cF "object $object: " log)" -lt "$(wc -l <expected)" ] || return 0
        sleep 0.1
    done
    fail 'the log lacks errors'
}

store_size() {
    du --block-size=1K --summarize "$1" | cut -f 1
}

heading 'Build an image of the standard library of Python: the tree in python.cfs, the contents in objects/'
run "python3 -c 'import sysconfig; print(sysconfig.get_path(\"stdlib\"))' | tee source"
source=$(cat source)
run "cfsfuse mk --digest-store=objects --print-digest '$source' python.cfs | tee digest"
run 'ls -l python.cfs && ls objects | head -n 3'
size_of_one=$(store_size objects)

heading "Mount it as $(id -un); the image must have this digest, and every block read is verified"
mkdir mnt
run "cfsfuse mount python.cfs mnt -o basedir=objects,digest=$(cat digest)"
# shellcheck disable=SC2016 # $PWD is for the command
run 'grep cfsfuse /proc/self/mountinfo | grep "$PWD/mnt"'

heading 'Compare it with its source: names, contents, mode, owner, time, size, link targets, extended attributes'
echo '(Not compared: the size of directories, and numbers of links. They belong to the file system that a file is in.)'
run "python3 $same_tree '$source' mnt" || fail 'the image is not what it was made from'

heading 'Build an image of a changed copy, into the same store: one package less, one file edited'
run "cp -a '$source' changed"
run 'chmod -R u+w changed && rm -r changed/json && echo "# edited" >>changed/this.py'
run 'cfsfuse mk --digest-store=objects --print-digest changed changed.cfs | tee digest-of-changed'
run 'comm -12 <(cfsfuse objects python.cfs) <(cfsfuse objects changed.cfs) | wc -l    # objects that both use'
run 'comm -13 <(cfsfuse objects python.cfs) <(cfsfuse objects changed.cfs) | wc -l    # that the second alone uses'
run 'cfsfuse mk --digest-store=alone changed alone.cfs && cmp changed.cfs alone.cfs    # into a store of its own: the same'
echo "The store has $size_of_one KiB with the first image, $(store_size objects) KiB with both."
echo "Stores of their own have $((size_of_one + $(store_size alone))) KiB."

heading 'Mount that one too, and put something else in the place of an object; these files use it'
mkdir again
run "cfsfuse mount changed.cfs again -o basedir=objects,log=log,digest=$(cat digest-of-changed)"
cfsfuse dump changed.cfs >lines
# The object that most files use. Up to 1 MiB: of a larger one, only the damaged block could not be read.
object=$(awk '$3 ~ /^100/ && $9 ~ /\// && $1 !~ /\\/ && $2 <= 1048576 { n[$9]++ } END { for (o in n) print n[o], o }' lines |
    sort -k1,1nr -k2 | awk 'NR == 1 { print $2 }')
run "cfsfuse dump changed.cfs | awk '\$9 == \"$object\" { print \$1 }' | tee expected"
run "mv objects/$object kept"
run "tr '[:lower:]' '[:upper:]' <kept >objects/$object"

heading 'Read every file of that mount: these fail'
run "find again -type f -exec sh -c 'for file; do cat \"\$file\" >/dev/null || echo \"\${file#again}\" >>failed; done' sh {} +"
diff <(sort expected) <(sort failed) || fail 'other files fail than those that use the object'
# shellcheck disable=SC2016 # likewise
run 'diff <(sort expected) <(sort failed) && echo "exactly those that use it: $(wc -l <failed) of $(find again -type f | wc -l)"'
wait_for_log
run 'cat log'
while read -r path; do
    grep -qF "ERROR $path: object $object: fs-verity digest: expected ${object/\//}, found " log ||
        fail "the log does not say why $path cannot be read"
done <expected

heading 'Restore it: all is as it was'
run "mv kept objects/$object"
run "python3 $same_tree changed again" || fail 'the mount is not what it was'

heading 'Unmount'
run 'cfsfuse umount mnt && cfsfuse umount again'
run "find mnt again -mindepth 1 | wc -l"
[ "$(ls -A mnt)$(ls -A again)" = '' ] || fail 'something is left in the mount points'
