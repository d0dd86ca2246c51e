"""Backend ``rbd``: root disks are clones in Ceph. An image that Glance keeps in the same cluster is cloned where it
lies; any other is brought in once for the whole cluster and cloned for everybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nova_imagecache.backends import BackendError, BackendProperties, Claim, Fact, _rbd_claim, _rbd_look
from nova_imagecache.backends._rados import bindings
from nova_imagecache.backends._rbd_names import SNAPSHOT
from nova_imagecache.backends._rbd_options import FEATURES
from nova_imagecache.backends._rbd_recovery import RecoverableRbd

if TYPE_CHECKING:
    from collections.abc import Iterator


class RbdBackend(RecoverableRbd):
    """Clones in a pool that all hosts share. Needs Ceph's bindings rados and rbd; connects when first used."""

    properties = BackendProperties(base_formats=("raw",), disk_kind="clone", storage="rbd", local=False, shared=True)

    def claim_import(self, image_id: str) -> Claim | None:
        return _rbd_claim.claim_import(self.store, image_id)

    def check(self) -> list[Fact]:
        return list(self._facts())

    def _facts(self) -> Iterator[Fact]:
        try:
            rados, rbd = bindings()
            versions = ".".join(str(part) for part in rbd.RBD().version())
            yield Fact(name="bindings", value=f"librbd {versions}, {rados.__name__} beside it")
        except BackendError as err:
            yield Fact(name="bindings", value="missing", problem=str(err))
            return
        try:
            yield Fact(name="cluster", value=self.store.connection.fsid())
            yield Fact(name="monitors", value=", ".join(f"{h}:{p}" for h, p in self.store.connection.monitors()))
            yield Fact(name="pool", value=f"{self.options.pool}, {len(_rbd_look.names(self.store.io))} images")
            yield Fact(name="clone format", value="1" if self.store.clones_need_protection() else "2")
            bits = self.store.features()
            yield Fact(name="features", value=", ".join(name for name, bit in FEATURES.items() if bits & bit))
            capacity = self.capacity()
            useless = list(self.useless_bases(_rbd_look.names(self.store.io)))
        except BackendError as err:
            yield Fact(name="cluster", value="not usable", problem=str(err))
            return
        for name in useless:
            words = "no disk can be made of it, and nothing brought in in its place: call recover, or rename that image"
            yield Fact(name=name, value=f"damaged, or without a snapshot {SNAPSHOT} that can be opened", problem=words)
        counted = capacity.total > 0
        problem = None if counted else "the cluster counts no bytes: start a ceph-mgr"
        yield Fact(name="free bytes", value=str(capacity.free), problem=problem)
        if self.options.glance_store is not None:
            yield Fact(name="glance_store", value=self.options.glance_store)
        missing = "libvirt cannot open the disks without a secret: set backend_options.secret_uuid"
        secret = self.options.secret_uuid
        yield Fact(name="secret_uuid", value=secret or "none", problem=None if secret else missing)
