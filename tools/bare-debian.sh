#!/usr/bin/env bash
# Proves README's two commands on a fresh Debian 12: makes a minimal root in a folder, with git, make and python3 and
# nothing else, clones this repository into it and runs the commands there. Needs root, debootstrap and about 3 GB.
#
#   tools/bare-debian.sh [--worktree] [--keep] [TARGET...]      TARGET: of make, or "setup"; default: demo test
#
#   --worktree   take the files as they are now, not the last commit
#   --keep       leave the root there, and say where
#   BASE=/var/tmp, SUITE=bookworm, MIRROR=(the first one that this machine's apt uses for SUITE)
#
# The machine's own configuration of apt and pip, its certificates and its proxy variables are taken along.
# CI=true is set: a missing service is a failure.
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; }
say() { printf '\n=== %s\n' "$*"; }
die() { printf 'bare-debian: %s\n' "$*" >&2; exit 1; }

worktree=no keep=no targets=()
for arg in "$@"; do
    case $arg in
        --worktree) worktree=yes ;;
        --keep) keep=yes ;;
        -h | --help) usage; exit 0 ;;
        -*) usage >&2; exit 2 ;;
        *) targets+=("$arg") ;;
    esac
done
[ ${#targets[@]} -gt 0 ] || targets=(demo test)

here=$(cd "$(dirname "$0")/.." && pwd)
PATH=$PATH:/usr/sbin:/sbin
suite=${SUITE:-bookworm}
[ "$(id -u)" = 0 ] || die 'must be root: it makes a root directory and enters it'
for tool in debootstrap unshare git; do
    command -v "$tool" >/dev/null || die "no $tool: apt-get install --no-install-recommends debootstrap util-linux git"
done
mirror=${MIRROR:-}
# apt itself reads its sources, in whichever of the two formats they are
[ -n "$mirror" ] || mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Release: $suite" | sed -n 1p)
[ -n "$mirror" ] || die "this machine's apt has no source for $suite: name one with MIRROR=..."

# --- the root goes away at the end, whatever the end is -------------------------------------------------------------

root=$(mktemp -d "${BASE:-/var/tmp}/bare-debian.XXXXXXXX")
chmod 755 "$root"
child=
cleanup() {
    local status=$?
    trap - EXIT INT TERM
    # the first process of its own pid namespace: everything inside ends with it, and the mounts with their namespace
    if [ -n "$child" ]; then
        kill "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    if [ "$keep" = yes ]; then echo "bare-debian: kept $root"; else rm -rf --one-file-system "$root"; fi
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# inside COMMAND...: runs it in the root, with mounts and processes of its own and nothing of this shell's environment
# but how to reach the network.
inside() {
    local name reach=()
    while IFS= read -r name; do reach+=("$name=${!name}"); done < <(
        compgen -e | grep -E '^(PIP_|SSL_CERT_|REQUESTS_CA_BUNDLE$|CURL_CA_BUNDLE$|(https?|ftp|all|no)_proxy$|(HTTPS?|FTP|ALL|NO)_PROXY$|CI$)'
    )
    # $1 and $@ are the inner shell's
    # shellcheck disable=SC2016
    unshare --mount --pid --fork --kill-child bash -euc '
        # a root that is a mount point: what runs inside may make mount namespaces of its own
        mount --rbind "$1" "$1"
        mount -t proc proc "$1/proc"
        mount --rbind /dev "$1/dev"
        mount --rbind /sys "$1/sys"
        exec chroot "$@"
    ' inside "$root" env -i HOME=/root CI=true TERM="${TERM:-dumb}" LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        "${reach[@]}" "$@" </dev/null &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

# --- a fresh Debian -------------------------------------------------------------------------------------------------

say "$suite in $root"
SECONDS=0
eval "$(apt-config shell apt_proxy Acquire::http::Proxy)"
[ -z "${apt_proxy:-}" ] || export http_proxy="${http_proxy:-$apt_proxy}"
debootstrap --variant=minbase --include=python3,git,make,ca-certificates "$suite" "$root" "$mirror" >"$root.log" 2>&1 || {
    tail -n 20 "$root.log" >&2
    rm -f "$root.log"
    die 'debootstrap failed, see above'
}
rm -f "$root.log"

for file in /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/apt.conf /etc/apt/apt.conf.d /etc/apt/auth.conf.d \
    /etc/apt/preferences.d /etc/apt/trusted.gpg.d /etc/apt/keyrings /usr/share/keyrings /usr/local/share/ca-certificates \
    /etc/pip.conf /etc/resolv.conf /etc/hosts; do
    [ -e "$file" ] || continue
    if [ -d "$file" ]; then mkdir -p "$root$file" && cp -aL "$file/." "$root$file/"; else cp -L "$file" "$root$file"; fi
done
# sources.list.d alone may hold them all
[ -e /etc/apt/sources.list ] || rm -f "$root/etc/apt/sources.list"
for file in "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
    if [ -f "$file" ]; then install -D -m 600 "$file" "$root/root/${file#"$HOME"/}"; fi
done
inside update-ca-certificates >/dev/null 2>&1

say "the repository ($([ "$worktree" = yes ] && echo 'files as they are now' || echo 'last commit'))"
project=/srv/nova-imagecache
mkdir -p "$root$project"
if [ "$worktree" = yes ]; then
    git -C "$here" ls-files -z --cached --others --exclude-standard |
        (cd "$here" && while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done) |
        tar -C "$here" --null --no-recursion -T - -cf - | tar -C "$root$project" --no-same-owner -xf -
    git -C "$root$project" init -q
else
    git -c safe.directory='*' clone -q --no-hardlinks "$here" "$root$project"
fi
echo "ready after $SECONDS s; $(du -shx "$root" | cut -f1); $(inside python3 --version); $(inside sh -c 'dpkg-query -f . -W | wc -c') packages"

# --- the commands ---------------------------------------------------------------------------------------------------

results=() failed=0
for target in "${targets[@]}"; do
    say "make $target"
    SECONDS=0 status=0
    if [ "$target" = setup ]; then
        inside "$project/tools/setup.sh" test || status=$?
    else
        inside make -C "$project" "$target" || status=$?
    fi
    results+=("$target: exit status $status after $SECONDS s")
    [ "$status" = 0 ] || failed=1
done
say 'on a bare Debian'
printf '%s\n' "${results[@]}"
echo "size of the root: $(du -shx "$root" | cut -f1)"
exit "$failed"
