#!/usr/bin/env bash
# Runs the suites of what builds on the library, against the library as it is in this folder: every folder of examples/
# that has tests, and tests/examples, the suite of the examples that are single files.
#
#   tools/downstream.sh [--list] [WHAT...] [-- PYTEST-ARGUMENT...]
#
#   WHAT     a folder of examples/ by its name, "examples" for tests/examples, or the path of any other project
#   --list   print what there is, one a line
#
# A project with a pyproject.toml is built and installed as its users install it, entry points and all, into a directory
# of its own that only its tests see; .venv and the project's folder stay as they are. What it needs beyond the library
# is installed there too, and the version that it asks of the library is looked at. `make test` runs the same.
set -euo pipefail

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }
say() { printf 'downstream: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

here=$(cd "$(dirname "$0")/.." && pwd)
python=$here/.venv/bin/python
list=no what=()
while [ $# -gt 0 ]; do
    case $1 in
        --list) list=yes ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        -*) usage >&2; exit 2 ;;
        *) what+=("$1") ;;
    esac
    shift
done

known() {
    local folder
    for folder in "$here"/examples/*/; do
        ! compgen -G "${folder}tests/test_*.py" >/dev/null || basename "$folder"
    done
    ! compgen -G "$here/tests/examples/test_*.py" >/dev/null || echo examples
}
if [ "$list" = yes ]; then known; exit 0; fi
[ -x "$python" ] || die "no .venv: run make check once"
if [ ${#what[@]} -eq 0 ]; then mapfile -t what < <(known); fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Prints what a distribution in a directory needs and .venv has not; ends with an error if that is this library.
requirements=$(cat <<'PYTHON'
import importlib.metadata as metadata, sys
from packaging.requirements import Requirement

(found,) = metadata.distributions(path=[sys.argv[1]])
for line in found.requires or ():
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        continue
    try:
        there = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        there = None
    if there is not None and requirement.specifier.contains(there, prereleases=True):
        continue
    if requirement.name.lower().replace("_", "-") == "nova-imagecache":
        sys.exit(f"downstream: {found.name} {found.version} needs {requirement}; this is {there}")
    print(requirement)
PYTHON
)

# run_project FOLDER PYTEST-ARGUMENT...: each step says what to do where it fails, for bash does not stop in a condition
run_project() {
    local folder=$1 name site needs needed
    shift
    name=$(basename "$folder")
    [ -d "$folder/tests" ] || { say "$folder has no tests"; return 1; }
    site=$scratch/$name.site
    mkdir "$site" && cp -R "$folder" "$scratch/$name" || return
    if [ -e "$folder/pyproject.toml" ]; then
        install --no-deps --target "$site" "$scratch/$name" || return
        needs=$("$python" -c "$requirements" "$site") || return
        if [ -n "$needs" ]; then
            mapfile -t needed <<<"$needs"
            install --target "$site" "${needed[@]}" || return
        fi
    else
        site=$scratch/$name
    fi
    # its own configuration of pytest, in its own folder: nothing of this repository's is taken along
    (cd "$scratch/$name" && PYTHONPATH=$site exec "$python" -m pytest -p no:cacheprovider --rootdir . --timeout 180 "$@" tests)
}
install() { "$python" -m pip install -q --disable-pip-version-check "$@"; }

failed=()
for one in "${what[@]}"; do
    say "$one"
    if [ "$one" = examples ]; then
        (cd "$here" && exec "$python" -m pytest -q -p no:cacheprovider "$@" tests/examples) || failed+=("$one")
    elif [ -d "$here/examples/$one" ]; then
        (run_project "$here/examples/$one" -q "$@") || failed+=("$one")
    elif [ -d "$one" ]; then
        (run_project "$(cd "$one" && pwd)" -q "$@") || failed+=("$one")
    else
        die "$one is no folder of examples/ and no path; there are: $(known | paste -sd ' ')"
    fi
done
[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
say "${#what[@]} suites passed"
