# Sourced. python: the interpreter that environments are made with.
#
# $PYTHON where it is set. Otherwise the system's, before another that stands earlier in PATH: Debian's modules of Ceph
# are made for it, and distributions build theirs with optimisations that one compiled at home mostly lacks (a third of
# the speed). Otherwise whatever python3 is.
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    # without ensurepip it makes no environment, and only root with apt can install that
    if { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; } || /usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null; then
        python=/usr/bin/python3
    fi
fi
