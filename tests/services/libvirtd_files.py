"""The files that a libvirtd of its own is configured by, and how it is started."""

from pathlib import Path

QEMU_ID = 64055
"""User and group libvirt-qemu, by the number that Debian gives them."""

USER = f"libvirt-qemu:x:{QEMU_ID}:{QEMU_ID}::/nonexistent:/usr/sbin/nologin"
GROUP = f"libvirt-qemu:x:{QEMU_ID}:"

DAEMON = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0777"
log_outputs = "2:file:{dir}/log/libvirtd.log"
host_uuid = "{uuid}"
"""

# No virtlogd, cgroups, security modules or namespaces for each guest: none of them is there in a bare container.
QEMU = """\
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = [ ]
namespaces = [ ]
user = "+{user}"
group = "+{user}"
dynamic_ownership = {owners}
remember_owner = {owners}
"""


def with_qemu_user(path: Path, line: str) -> str:
    """The machine's passwd or group with a line for libvirt-qemu, without whom libvirtd does not start."""
    name = line.partition(":")[0]
    lines = [other for other in path.read_text().splitlines() if other.partition(":")[0] != name]
    return "\n".join([*lines, line]) + "\n"


# Nothing of the machine's own libvirt is touched. Without a usable /dev/kvm libvirt does not spend seconds on looking
# at it, and guests are the same everywhere. The shell stays, to reap the guests.
START = """\
for part in etc:/etc/libvirt run:/run/libvirt lib:/var/lib/libvirt log:/var/log/libvirt cache:/var/cache/libvirt; do
    mkdir -p "${part#*:}" && mount --bind "$1/${part%%:*}" "${part#*:}" || exit 1
done
for file in passwd group; do mount --bind "$1/etc/$file" "/etc/$file" || exit 1; done
if [ -e /dev/kvm ]; then
    : >"$1/no-kvm" && chmod 000 "$1/no-kvm" && mount --bind "$1/no-kvm" /dev/kvm || exit 1
    mount -o remount,bind,ro /dev/kvm || exit 1  # not even for root
fi
libvirtd -f "$1/etc/libvirtd.conf" -p "$1/run/libvirtd.pid" &
wait $!
"""
