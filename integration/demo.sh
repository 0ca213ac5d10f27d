#!/bin/bash
# Mounts a real image, reads it, damages an object, shows what happens, and takes everything away again.
# Each command is printed before its output. Exit codes: 0 done; 1 something was not as it should be; 4 not possible here.
set -euo pipefail
cd "$(dirname "$0")/.."
archive=$PWD/../shared/images/python-image.tar.gz
PATH=$PWD/.venv/bin:$PATH

[ -r "$archive" ] || {
    echo "demo: $archive is missing: it holds the image to mount" >&2
    exit 4
}

work=$(mktemp -d "${TMPDIR:-/tmp}/cfsfuse-demo.XXXXXX")
clean_up() {
    status=$?
    trap - EXIT
    cd /
    if grep -qF " $work/mnt " /proc/self/mountinfo; then
        cfsfuse umount --lazy "$work/mnt" || status=1
    fi
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP
cd "$work"
export XDG_CACHE_HOME=$work/cache

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

heading 'A composefs image: the tree in python.cfs, the contents in objects/'
run "tar -xzf $(realpath "$archive")"
run 'ls'
run 'cfsfuse ls python.cfs | head -n 5'

heading "Mount it as $(id -un); the image must have this digest, and every block read is verified"
mkdir mnt
run "cfsfuse mount python.cfs mnt -o basedir=objects,log=log,digest=$(cat digest)"
# shellcheck disable=SC2016 # $PWD is for the command
run 'grep cfsfuse /proc/self/mountinfo | grep "$PWD/mnt"'
run 'ls -l mnt'

heading 'Run a script from it'
# -S and -I: no other packages, no variables of the environment; what is not in the mount is this Python's own.
run 'python3 -S -I -c "
import sys
sys.path.insert(0, \"mnt\")
import http, http.cookies
print(http.HTTPStatus(451).phrase)
print(\"from\", http.__file__, \"and\", http.cookies.__file__)
"'

heading 'Overwrite one object; these files use it'
cfsfuse dump python.cfs >lines
# The object that most files use, and that the script above has not read.
object=$(awk '$3 ~ /^100/ && $9 ~ /\// && $1 !~ /^\/http\// { n[$9]++ } END { for (o in n) print n[o], o }' lines |
    sort -k1,1nr -k2 | awk 'NR == 1 { print $2 }')
run "cfsfuse objects python.cfs | grep '$object'"
run "cfsfuse dump python.cfs | awk '\$9 == \"$object\" { print \$1 }' | tee expected"
# Further names of the same file, which a dump gives as links to the first.
awk 'NR == FNR { first[$1] = 1; next } $3 ~ /^@/ && $9 in first { print $1 }' expected lines >links
cat links >>expected
run "cp --preserve objects/$object kept"
run "tr '[:lower:]' '[:upper:]' <kept >objects/$object"

heading 'Read every file of the mount: these fail'
run "find mnt -type f -exec sh -c 'for file; do cat \"\$file\" >/dev/null || echo \"\${file#mnt}\" >>failed; done' sh {} +"
diff <(sort expected) <(sort failed) || fail 'other files fail than those that use the object'
# shellcheck disable=SC2016 # likewise
run 'diff <(sort expected) <(sort failed) && echo "exactly those that use it: $(wc -l <failed) of $(find mnt -type f | wc -l)"'
wait_for_log
run 'cat log'
while read -r path; do
    grep -qF "ERROR $path: object $object: fs-verity digest: expected ${object/\//}, found " log ||
        fail "the log does not say why $path cannot be read"
done <expected

heading 'Restore it: they read again'
run "cp kept objects/$object"
run "(cd mnt && sha256sum $(sed 's|^/||' expected | xargs)) && sha256sum <kept"
while read -r path; do
    cmp kept "mnt$path" || fail "$path is not what it was"
done <expected
run 'find mnt -type f -exec cat {} + >/dev/null && echo "all files read"'

heading 'Unmount'
run 'cfsfuse umount mnt'
run 'ls mnt | wc -l'
[ "$(ls -A mnt)" = '' ] || fail 'something is left in mnt'
