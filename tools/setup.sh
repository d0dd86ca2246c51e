#!/usr/bin/env bash
# Installs what is missing for one purpose, and nothing else. Quick when nothing is missing.
#
#   tools/setup.sh check|docs      the library and the development tools in .venv
#   tools/setup.sh demo|test       the same, and a real Glance in .venv-glance; test: Ceph and libvirt with their Python
#                                  modules too
#   tools/setup.sh bench           as test without libvirt, and the peers Nova and Ironic in .venv-nova and .venv-ironic
#
# PYTHON chooses the interpreter, 3.11 or newer (default: tools/interpreter.sh). The machine's configuration of pip and apt
# decides where packages come from. System packages are installed by root only; everybody else is told which to install.
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }
say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

purpose=${1:-}
case $purpose in
    check | docs | demo | test | bench) ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
PATH=$PATH:/usr/sbin:/sbin
. tools/interpreter.sh
glance_requirements=tests/services/glance-requirements.txt
with_ceph=no
case $purpose in test | bench) with_ceph=yes ;; esac

# Two runs at once, one after the other: neither sees a half-made environment.
mkdir -p .work/log
exec 9>.work/setup.lock
flock -n 9 || { say 'waiting for another setup of this folder'; flock 9; }

# --- the interpreter, and what the environments are made of -------------------------------------------------------

command -v "$python" >/dev/null || die "no $python: install Python 3.11 or newer, or name one with PYTHON=..."

# Prints the version, the name of its C interface, whether pip can be put into an environment, a key of what .venv and
# .venv-glance are made of (only the parts of pyproject.toml that pip reads, so that a changed lint rule installs
# nothing), and where it is.
facts=$("$python" - "$glance_requirements" <<'PYTHON'
import hashlib, importlib.util, os, pathlib, sys, sysconfig

if sys.version_info < (3, 11):
    sys.exit(f"setup: {sys.executable} is Python {sys.version.split()[0]}: 3.11 or newer is needed, name one with PYTHON=...")
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))
parts = [project.get(name) for name in ("build-system", "project", "dependency-groups")]
parts.append(project.get("tool", {}).get("setuptools"))
key = hashlib.sha256(repr(parts).encode()).hexdigest()
glance = hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest()
pip = importlib.util.find_spec("ensurepip") is not None and importlib.util.find_spec("venv") is not None
soabi = sysconfig.get_config_var("SOABI") or "none"
print("%d.%d" % sys.version_info[:2], soabi, "yes" if pip else "no", key, glance, os.path.realpath(sys._base_executable))
PYTHON
) || exit 1
read -r version soabi has_pip key glance_key executable <<<"$facts"

# --- system packages ----------------------------------------------------------------------------------------------

packages=()
needs() { command -v "$1" >/dev/null || packages+=("$2"); }
if [ "$has_pip" = no ]; then
    case $(command -v "$python") in
        /usr/bin/* | /bin/*) packages+=(python3-venv) ;;
        *) die "$python has no ensurepip: install it, or name another interpreter with PYTHON=..." ;;
    esac
fi
[ "$purpose" = docs ] || needs qemu-img qemu-utils
# Reflinks and snapshots are tried on filesystems of their own; mounting one takes root.
if [ "$purpose" = test ] && [ "$(id -u)" = 0 ]; then needs mkfs.xfs xfsprogs; needs mkfs.btrfs btrfs-progs; fi
# A Ceph cluster of one node, and its Python modules, which PyPI does not have. Others than root may have neither.
debian_modules=/usr/lib/python3/dist-packages
if [ $with_ceph = yes ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    for program in ceph-mon ceph-osd ceph-mgr; do needs "$program" "$program"; done
    needs rbd ceph-common
    for module in rados rbd; do
        compgen -G "$debian_modules/$module.*.so" >/dev/null || packages+=("python3-$module")
    done
fi

# libvirtd, its guests, and what its Python module is compiled with: PyPI has only the source.
libvirt_module=.venv/lib/python$version/site-packages/libvirtmod.$soabi.so
if [ "$purpose" = test ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    needs libvirtd libvirt-daemon
    compgen -G '/usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so' >/dev/null ||
        packages+=(libvirt-daemon-driver-qemu)
    needs qemu-system-x86_64 qemu-system-x86
    # disks are held against libvirt's schemas
    needs virt-xml-validate libvirt-clients
    needs xmllint libxml2-utils
    # qemu's driver for disks in Ceph
    compgen -G '/usr/lib/*/qemu/block-rbd.so' >/dev/null || packages+=(qemu-block-extra)
    if [ ! -e "$libvirt_module" ]; then
        needs gcc gcc
        needs pkg-config pkg-config
        [ -e /usr/include/stdlib.h ] || packages+=(libc6-dev)
        [ -e /usr/include/libvirt/libvirt.h ] || packages+=(libvirt-dev)
        case $(command -v "$python") in
            /usr/bin/*) [ -e "/usr/include/python$version/Python.h" ] || packages+=("python$version-dev") ;;
        esac
    fi
fi

if [ ${#packages[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || die "missing: ${packages[*]} (Debian's names): install them, then run this again"
    [ "$(id -u)" = 0 ] || die "missing: ask root to run: apt-get install --no-install-recommends ${packages[*]}"
    say "apt: ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt=(apt-get -o DPkg::Lock::Timeout=300 -q)
    log=.work/log/apt.log
    { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${packages[@]}"; } </dev/null >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        die "apt could not install ${packages[*]}: see above and $log"
    }
fi

# --- virtual environments -----------------------------------------------------------------------------------------

# current NAME KEY: the environment is there, of this Python, in this place, and made of what KEY stands for.
current() { usable "$1" && [ "$(cat "$1/.made-of" 2>/dev/null)" = "$2" ]; }
usable() {
    [ -x "$1/bin/python" ] && [ "$(readlink -f "$1/bin/python")" = "$executable" ] || return 1
    # an environment cannot be moved: its scripts name the place where it was made
    ! grep -q '^command = ' "$1/pyvenv.cfg" || grep -qF " $here/$1" "$1/pyvenv.cfg"
}

# make_environment NAME KEY PIP-ARGUMENTS...: the key is written last, so that a run that was stopped is done again.
make_environment() {
    local name=$1 made_of=$2
    shift 2
    rm -f "$name/.made-of"
    usable "$name" || { rm -rf "./$name" && "$python" -m venv "$name"; }
    # 25.1 brings --group
    "$name/bin/python" -m pip install -q --disable-pip-version-check 'pip>=25.1'
    "$name/bin/python" -m pip install -q --disable-pip-version-check "$@"
    printf '%s\n' "$made_of" >"$name/.made-of"
}

jobs=() names=() logs=()
start() {
    local name=$1
    say "$name: installing $2"
    logs+=(".work/log/$name.log")
    names+=("$name")
    (make_environment "$name" "${@:3}") </dev/null >".work/log/$name.log" 2>&1 9>&- &
    jobs+=($!)
}

current .venv "$key" || start .venv 'the library and the development tools' "$key" -e . --group dev
case $purpose in
    demo | test | bench)
        current .venv-glance "$glance_key" ||
            start .venv-glance 'Glance (about half a minute)' "$glance_key" -r "$glance_requirements"
        ;;
esac
if [ "$purpose" = bench ]; then
    for peer in nova ironic; do
        requirements=benchmarks/peers/$peer.txt
        read -r peer_key _ < <(sha256sum "$requirements")
        current ".venv-$peer" "$peer_key" ||
            start ".venv-$peer" "$peer, to measure beside (about a minute)" "$peer_key" -r "$requirements"
    done
fi

failed=0
for i in "${!jobs[@]}"; do
    if wait "${jobs[$i]}"; then
        say "${names[$i]}: ready after $SECONDS s"
    else
        failed=1
        tail -n 30 "${logs[$i]}" >&2
        say "${names[$i]}: failed, see above and ${logs[$i]}" >&2
    fi
done
[ "$failed" = 0 ] || exit "$failed"

# --- Ceph's Python modules: Debian's files, for the Python that they were made for ---------------------------------

if [ $with_ceph = yes ]; then
    for program in ceph-mon ceph-osd ceph-mgr; do
        command -v "$program" >/dev/null || say "tests with Ceph cannot run: no $program; ask root for $program (Debian)"
    done
    for module in rados rbd; do
        file=$debian_modules/$module.$soabi.so
        if [ -e "$file" ]; then
            # nothing else of that directory becomes visible
            ln -sfn "$file" ".venv/lib/python$version/site-packages/${file##*/}"
        elif compgen -G "$debian_modules/$module.*.so" >/dev/null; then
            say "tests with Ceph cannot run: python3-$module is not for this Python ($soabi); use PYTHON=/usr/bin/python3"
        else
            say "tests with Ceph cannot run: no Python module $module; ask root for python3-$module (Debian)"
        fi
    done
fi

# --- libvirt's Python module: an extra of the library, compiled against libvirt-dev ---------------------------------

if [ "$purpose" = test ]; then
    for program in libvirtd qemu-system-x86_64; do
        command -v "$program" >/dev/null || say "tests with libvirt cannot run: no $program; ask root for it"
    done
    if [ -e "$libvirt_module" ]; then
        :
    elif ! command -v pkg-config >/dev/null || ! pkg-config --exists libvirt; then
        say 'tests with libvirt cannot run: nothing to compile its Python module with; ask root for libvirt-dev (Debian)'
    else
        say '.venv: compiling libvirt-python'
        log=.work/log/libvirt-python.log
        .venv/bin/python -m pip install -q --disable-pip-version-check -e '.[libvirt]' </dev/null >"$log" 2>&1 || {
            tail -n 30 "$log" >&2
            say "tests with libvirt cannot run: libvirt-python cannot be compiled, see above and $log"
        }
    fi
fi
