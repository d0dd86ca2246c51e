"""``BackendContract``: every promise of ``nova_imagecache.backends``, as tests that a plug-in's author inherits."""

from __future__ import annotations

from typing import ClassVar

from nova_imagecache.testing._contract_changes import ChangeContract
from nova_imagecache.testing._contract_disks import CreationContract, UsersContract
from nova_imagecache.testing._contract_errors import ErrorContract
from nova_imagecache.testing._contract_full import FullContract
from nova_imagecache.testing._contract_publish import PublishContract
from nova_imagecache.testing._contract_races import RaceContract
from nova_imagecache.testing._contract_recovery import RecoveryContract
from nova_imagecache.testing._contract_removal import MarksContract, RemovalContract
from nova_imagecache.testing._contract_staging import StagingContract
from nova_imagecache.testing._promises import CONTRACT_VERSION


class BackendContract(
    StagingContract,
    PublishContract,
    MarksContract,
    RemovalContract,
    CreationContract,
    UsersContract,
    ChangeContract,
    FullContract,
    ErrorContract,
    RecoveryContract,
    RaceContract,
):
    """The tests of a backend. They need pytest; each failure says in words which promise was broken, and where it is
    documented.

        class TestMine(BackendContract):
            def make_backend(self, paths: BackendPaths) -> Backend:
                return MyBackend({}, paths)

    Hooks for what differs from disks that are files: ``make_paths``, ``read_disk``, ``write_disk``, ``litter``,
    ``kept``, ``held_open``, ``leftovers``, ``act_in_child``. Hooks whose tests are skipped without them: ``filled``
    (storage without room), ``hidden_users`` (storage that cannot count). Settings: ``fault_modules`` (where the backend
    changes its storage; left out: the library's modules, and those of the backend's package with ``SEAMS``),
    ``base_format`` (formats other than the preferred one get a class of their own), ``actions``, ``threads``,
    ``forks``, ``large_size``. A test that asks more than the storage can give is overridden with the reason in its
    place; so far as it is not, the backend keeps the whole contract, of the ``api_version`` that
    ``contract_version`` names.
    """

    contract_version: ClassVar[int] = CONTRACT_VERSION
