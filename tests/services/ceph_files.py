"""The files that a Ceph cluster of one node is configured by."""

from __future__ import annotations

import base64
import os
import struct
import time
from collections.abc import Mapping

# A client may override any option of [client] for its own connection; the timeouts are there so that one that does
# not, qemu-img for instance, ends before the test's own time limit.
CONF = """\
[global]
fsid = {fsid}
mon host = {mon_host}
public network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
run dir = {dir}/run
crash dir = {dir}/log
# no admin sockets: their paths are limited to 107 characters
admin socket =
log file = {dir}/log/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0

[client]
log file =
keyring = {dir}/$cluster.$name.keyring
client mount timeout = {client_timeout}
rados osd op timeout = {client_timeout}
rados mon op timeout = {client_timeout}
rbd default features = layering,exclusive-lock,object-map,fast-diff,deep-flatten

[mon]
mon data = {dir}/mon
mon initial members = a
mon allow pool size one = true
mon allow pool delete = true
mon cluster log file = {dir}/log/cluster.log
# the disk of this machine may be nearly full
mon data avail warn = 2
mon data avail crit = 1
# proposals go out at once rather than once a second
paxos propose interval = 0.05
paxos min wait = 0.01
# a pool's quota is looked at with each tick
mon tick interval = 1
# a paused osd is not marked down: its clients wait for it
mon osd report timeout = 86400

[mgr]
mgr data = {dir}/mgr
keyring = {dir}/mgr/keyring
mgr initial modules =
mgr disabled modules = {disabled_modules}
mgr tick period = 1
mgr stats period = 1

[osd]
osd data = {dir}/osd
keyring = {dir}/osd/keyring
osd objectstore = {store}
osd mon shutdown timeout = 1
# how long an image stays in use by a client that died
osd client watch timeout = {watch_timeout}
# one thread: memstore counts its bytes without a lock, and is full with a count that came below zero
osd op num shards = 1
osd op num threads per shard = 1
osd memory target = 939524096
memstore device bytes = {size}
bluestore block size = {size}
bluestore block create = true
# closing a device waits for one round of its poll, and a start closes it five times
bdev aio poll ms = 10
bluestore cache autotune = false
bluestore cache size = 67108864
bluestore fsck on mkfs = false
bluestore fsck quick fix on mount = false
"""

DAEMONS: Mapping[str, Mapping[str, str]] = {
    "mon.": {"mon": "allow *"},
    "mgr.x": {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"},
    "osd.0": {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": "allow *"},
}

# As in production: Glance owns its pool, Nova owns its own and reads Glance's.
CLIENTS: Mapping[str, Mapping[str, str]] = {
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *", "mds": "allow *"},
    "client.glance": {
        "mon": "profile rbd",
        "mgr": "profile rbd pool=images",
        "osd": "profile rbd pool=images",
    },
    "client.nova": {
        "mon": "profile rbd",
        "mgr": "profile rbd pool=vms",
        "osd": "profile rbd pool=vms, profile rbd-read-only pool=images",
    },
}


def new_key() -> str:
    """A cephx secret: type 1 (AES), seconds, nanoseconds and length, then 16 random bytes."""
    return base64.b64encode(struct.pack("<HIIH", 1, int(time.time()), 0, 16) + os.urandom(16)).decode()


def keyring(entity: str, key: str, caps: Mapping[str, str]) -> str:
    """A keyring's text for one entity."""
    lines = [f"[{entity}]", f"\tkey = {key}", *(f'\tcaps {service} = "{cap}"' for service, cap in caps.items())]
    return "\n".join(lines) + "\n"
