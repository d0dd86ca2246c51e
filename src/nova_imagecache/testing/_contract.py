"""``BackendContract``: every promise of ``nova_imagecache.backends``, as tests that a plug-in's author inherits."""

from __future__ import annotations

from typing import ClassVar

from nova_imagecache.testing._contract_changes import ChangeContract
from nova_imagecache.testing._contract_crash import CrashContract, RecoveryContract
from nova_imagecache.testing._contract_disks import CreationContract, UsersContract
from nova_imagecache.testing._contract_publish import PublishContract
from nova_imagecache.testing._contract_removal import MarksContract, RemovalContract
from nova_imagecache.testing._contract_staging import StagingContract

CONTRACT_VERSION = 1
"""Grows when the contract asks for more than it did."""


class BackendContract(
    StagingContract,
    PublishContract,
    MarksContract,
    RemovalContract,
    CreationContract,
    UsersContract,
    ChangeContract,
    RecoveryContract,
    CrashContract,
):
    """The tests of a backend. They need pytest; each failure says in words which promise was broken.

        class TestMine(BackendContract):
            def make_backend(self, paths: BackendPaths) -> Backend:
                return MyBackend({}, paths)

    Hooks for what differs from disks that are files: ``make_paths``, ``read_disk``, ``write_disk``, ``litter``,
    ``act_in_child``. Settings: ``base_format`` (formats other than the preferred one get a class of their own),
    ``threads``, ``forks``, ``fault_modules``. A test that asks more than the storage can give is overridden with the
    reason in its place; so far as it is not, the backend keeps the whole contract.
    """

    contract_version: ClassVar[int] = CONTRACT_VERSION
