"""The part of ``BackendContract`` about making and finding root disks, and whom they depend on."""

from __future__ import annotations

from functools import partial

from nova_imagecache._models import BaseImage, FileLocation, RootDisk
from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.exceptions import BaseNotFoundError, DiskExistsError
from nova_imagecache.testing._contract_kit import (
    DISK_SIZE,
    GUEST_SIZE,
    LONG_ID,
    LONG_NAME,
    MIB,
    REFERENCES,
    ContractKit,
    in_threads,
    promise,
    refused,
    same,
)
from nova_imagecache.testing._promises import chapter

DISKS = (
    (LONG_ID, LONG_NAME),
    ("0", "0"),
    ("vm", "disk"),
    ("VM", "disk"),
    ("vm", "disk.rescue"),
    ("vm", "base"),
    ("vm", "json"),
    ("vm", "disk.base.old"),
    # these two read the same once they are joined by a dot, a dash
    ("vm.a", "b"),
    ("vm", "a.b"),
    ("vm-a", "b"),
    ("vm", "a-b"),
    ("vm_a", "b"),
    ("vm_", "disk"),
    ("vm.base", "disk"),
    ("vm.json", "disk"),
)
"""(disk id, name) at the limits of the grammar, and such as could be taken for each other."""


@chapter(
    "creation",
    "backends.Backend.create_root_disk",
    "backends.Backend.get_root_disk",
    "backends.Backend.iter_root_disks",
)
class CreationContract(ContractKit):
    """A root disk is made."""

    def test_disk_is_base_then_zeros(self, backend: Backend) -> None:
        """A disk says what it is, and reads as its base and then zeros."""
        base = self.publish(backend, "img")
        for disk_id, size in (("vm", DISK_SIZE), ("exact", GUEST_SIZE), ("odd", GUEST_SIZE + 512)):
            disk = self.create(backend, base, disk_id, "disk", size)
            told = (disk.disk_id, disk.name, disk.image_id, disk.virtual_size)
            same(told, (disk_id, "disk", "img", size), "a disk says whose it is, of which image, and its size")
            promise(disk.format in ("raw", "qcow2"), f"a disk states its format, not {disk.format!r}")
            allowed = REFERENCES[backend.properties.disk_kind]
            promise(disk.reference in allowed, f"the reference fits disk_kind: {disk.reference!r} is none of {allowed}")
            self.check_disk(backend, disk, self.sample(backend), "a disk reads as its base, then zeros up to its size")

    def test_large_disk(self, backend: Backend) -> None:
        """A disk may be far larger than its base, beyond 32 bits, and may grow further."""
        self.create(backend, self.publish(backend, "img"), size=self.large_size)
        for size in (self.large_size, self.large_size + MIB):
            disk = backend.resize_root_disk("vm", "disk", size)
            same(disk.virtual_size, size, "a large disk has the size it was asked for")
            same(backend.get_root_disk("vm", "disk"), disk, "get_root_disk tells the size of a large disk")

    def test_get_and_iter_agree(self, backend: Backend) -> None:
        """``create_root_disk``, ``get_root_disk`` and ``iter_root_disks`` tell of the same disks."""
        base = self.publish(backend, "img")
        made = [self.create(backend, base, disk_id) for disk_id in ("vm-1", "vm-2", "vm-3")]
        for disk in made:
            same(backend.get_root_disk(disk.disk_id, disk.name), disk, "get_root_disk tells what create_root_disk did")
        listed = sorted(backend.iter_root_disks(), key=lambda disk: disk.disk_id)
        same(listed, made, "iter_root_disks lists every disk once, as get_root_disk tells it")

    def test_disks_at_the_limits(self, backend: Backend) -> None:
        """Every disk id and name that the grammar allows is a disk of its own."""
        base = self.publish(backend, "img")
        for number, (disk_id, name) in enumerate(DISKS):
            self.create(backend, base, disk_id, name, GUEST_SIZE + 512 * number)
        for number, (disk_id, name) in enumerate(DISKS):
            disk = backend.get_root_disk(disk_id, name)
            size = GUEST_SIZE + 512 * number
            same(disk and disk.virtual_size, size, f"{disk_id!r} {name!r} is a disk of its own")
        listed = sorted((disk.disk_id, disk.name) for disk in backend.iter_root_disks())
        same(listed, sorted(DISKS), "disks of all ids and names are listed")
        self.check_users(backend, base, len(DISKS), "disks of all ids and names count as users")
        for number, (disk_id, name) in enumerate(DISKS, 1):
            backend.remove_root_disk(disk_id, name)
            left = len(DISKS) - number
            self.check_users(backend, base, left, f"removing {disk_id!r} {name!r} takes one user away")
            same(len(list(backend.iter_root_disks())), left, f"removing {disk_id!r} {name!r} removes one disk")

    def test_writes_never_reach_the_base(self, backend: Backend) -> None:
        """What a guest writes is in its own disk alone."""
        base, sample = self.publish(backend, "img"), self.sample(backend)
        written, other = self.create(backend, base, "vm-1"), self.create(backend, base, "vm-2")
        for offset in (0, MIB, GUEST_SIZE - 512, DISK_SIZE - 512):
            self.write_disk(backend, written, offset, b"guest!!!" * 64)
        content = self.read_disk(backend, written)
        promise(content[:8] == content[-512:-504] == b"guest!!!", "a guest's writes are in its disk")
        same(self.base_bytes(backend, base), sample.stored, "a guest's writes never reach the base")
        self.check_disk(backend, other, sample, "a guest's writes never reach another disk")
        later = self.create(backend, base, "vm-3")
        self.check_disk(backend, later, sample, "a guest's writes never reach a disk that is made later")

    def test_vanished_base(self, backend: Backend, paths: BackendPaths) -> None:
        """No disk is made of a base that is retired or purged, and nothing is left behind."""
        base = self.publish(backend, "img")
        retired = backend.retire_base(base)
        for state in ("retired", "purged"):
            words = f"create_root_disk on a base that is {state}"
            refused(BaseNotFoundError, partial(self.create, backend, base), f"{words} is BaseNotFoundError")
            self.check_no_disk(backend, paths, "vm", "disk", f"{words} leaves nothing behind")
            if state == "retired":
                self.check_users(backend, retired.base, 0, f"{words} leaves no user behind")
                backend.purge_base(retired)
        again = self.publish(backend, "img")
        self.check_users(backend, again, 0, "a disk that was not made is no user of the next base")
        self.check_disk(backend, self.create(backend, again), self.sample(backend), "the disk can be made after all")

    def test_replaced_base(self, backend: Backend) -> None:
        """A disk asked of a base that another has replaced is never made of the other's bytes."""
        old = self.publish(backend, "img", "old")
        backend.purge_base(backend.retire_base(old))
        new = self.publish(backend, "img", "new")
        refused(
            BaseNotFoundError,
            partial(self.create, backend, old),
            "a base that was replaced by one of another digest has vanished, whatever its name",
        )
        self.check_users(backend, new, 0, "a disk that was refused is no user of the new base")

    def test_existing_disk_is_untouched(self, backend: Backend) -> None:
        """A second disk of that id and name is refused, whatever it is of; the first stays as it is."""
        base, other = self.publish(backend, "img"), self.publish(backend, "other", "two")
        disk = self.create(backend, base)
        self.write_disk(backend, disk, 0, b"guest!!!" * 64)
        content = self.read_disk(backend, disk)
        for again, size in ((base, DISK_SIZE), (base, DISK_SIZE + MIB), (other, DISK_SIZE)):
            create = partial(self.create, backend, again, "vm", "disk", size)
            refused(DiskExistsError, create, "a disk that exists is not made again")
            same(backend.get_root_disk("vm", "disk"), disk, "a refused creation leaves the first disk's facts alone")
            same(self.read_disk(backend, disk), content, "a refused creation leaves the first disk's bytes alone")
        self.check_users(backend, base, 1, "a refused creation leaves the first disk's base one user")
        self.check_users(backend, other, 0, "a refused creation leaves no user of the other base")

    def test_foreign_file_is_untouched(self, backend: Backend) -> None:
        """A file that somebody else put where the disk goes is not overwritten, listed or removed."""
        base = self.publish(backend, "img")
        location = self.create(backend, base).location
        backend.remove_root_disk("vm", "disk")
        if not isinstance(location, FileLocation):
            return
        location.path.parent.mkdir(parents=True, exist_ok=True)
        location.path.write_bytes(b"somebody's")
        refused(DiskExistsError, partial(self.create, backend, base), "a file in the disk's place is DiskExistsError")
        same(location.path.read_bytes(), b"somebody's", "a file in the disk's place is left alone")
        self.check_users(backend, base, 0, "a refused creation leaves no user")

    def test_one_creator_wins(self, backend: Backend) -> None:
        """Of many who make one disk, of two images, exactly one does."""
        bases = [self.publish(backend, "img-0", "one"), self.publish(backend, "img-1", "two")]
        calls = [partial(self.create, backend, bases[index % 2]) for index in range(self.threads)]
        answers = in_threads(calls)
        made = [answer for answer in answers if isinstance(answer, RootDisk)]
        same(len(made), 1, f"exactly one of many creators makes the disk ({answers})")
        losers = {type(answer) for answer in answers if not isinstance(answer, RootDisk)}
        same(losers, {DiskExistsError}, "the others get DiskExistsError")
        same(backend.get_root_disk("vm", "disk"), made[0], "the disk is the one that the winner got")
        winner = 0 if made[0].image_id == "img-0" else 1
        self.check_disk(backend, made[0], self.sample(backend, ("one", "two")[winner]), "it reads as the winner's base")
        self.check_users(backend, bases[winner], 1, "losers leave no user of the winner's base")
        self.check_users(backend, bases[1 - winner], 0, "losers leave no user of the other base")

    def test_many_disks_at_once(self, backend: Backend) -> None:
        """Disks that are made at the same time are all made, and all counted."""
        base = self.publish(backend, "img")
        answers = in_threads([partial(self.create, backend, base, f"vm-{index}") for index in range(self.threads)])
        made = [answer for answer in answers if isinstance(answer, RootDisk)]
        same(len(made), self.threads, f"disks of several ids are made at once ({answers})")
        self.check_users(backend, base, self.threads, "disks that are made at once are all counted")
        for disk in made:
            self.check_disk(backend, disk, self.sample(backend), "a disk that is made beside others is whole")


@chapter("users", "backends.Backend.iter_users", "backends.Backend.survey", "backends.DiskUser")
class UsersContract(ContractKit):
    """Who depends on a base."""

    def test_users_are_counted(self, backend: Backend) -> None:
        """Each disk is one user of its own base until it is removed."""
        base, other = self.publish(backend, "img"), self.publish(backend, "other", "two")
        self.check_users(backend, base, 0, "a new base has no users")
        names = [("vm-1", "disk"), ("vm-1", "disk.rescue"), ("vm-2", "disk")]
        for count, (disk_id, name) in enumerate(names, 1):
            self.create(backend, base, disk_id, name)
            self.check_users(backend, base, count, "every root disk is a user of its base")
        self.check_users(backend, other, 0, "a disk is no user of another base")
        self._check_words(backend, base, names)
        for count, (disk_id, name) in enumerate(names, 1):
            backend.remove_root_disk(disk_id, name)
            self.check_users(backend, base, len(names) - count, "a removed disk is no user any more")

    def test_users_of_a_retired_base(self, backend: Backend) -> None:
        """A retired base has the users it had, and loses them as they go."""
        base = self.publish(backend, "img")
        self.create(backend, base, "vm-1")
        self.create(backend, base, "vm-2")
        retired = backend.retire_base(base)
        self.check_users(backend, retired.base, 2, "a retired base keeps its users")
        backend.remove_root_disk("vm-1", "disk")
        self.check_users(backend, retired.base, 1, "a disk that is removed is no user of a retired base any more")
        backend.restore_base(retired)
        found = backend.find_base("img")
        promise(found, "a restored base is found")
        self.check_users(backend, found or base, 1, "a restored base has the users it had")

    def test_copies_are_no_users(self, backend: Backend) -> None:
        """Disks that stand alone are not counted."""
        base = self.publish(backend, "img")
        disk = self.create(backend, base)
        standing = disk.reference == "none"
        same(len(list(backend.iter_users(base))), 0 if standing else 1, "a user is a disk with a reference")

    def test_a_survey_tells_the_same(self, backend: Backend) -> None:
        """``survey`` tells of every base, its users and its bytes what one hears who asks for each, or nothing."""
        made = {image_id: self.publish(backend, image_id) for image_id in ("alone", "used", "marked", "retired")}
        for disk_id in ("vm-1", "vm-2"):
            self.create(backend, made["used"], disk_id)
        backend.touch_base(made["used"])
        backend.mark_unused(made["marked"], 1_000_000_000.0)
        backend.retire_base(made["retired"])
        surveys = list(backend.survey())
        same(
            sorted(survey.base.image_id for survey in surveys),
            ["alone", "marked", "used"],
            "a survey has every base that is listed, once",
        )
        for survey in surveys:
            base = survey.base
            same(base, backend.find_base(base.image_id), "a survey tells of a base what find_base tells")
            users = list(backend.iter_users(base))
            told = users if survey.users is None else list(survey.users)
            same(sorted(map(repr, told)), sorted(map(repr, users)), "a survey's users are those of iter_users, or None")
            allocated = backend.usage(base).allocated
            told_bytes = allocated if survey.allocated is None else survey.allocated
            same(told_bytes, allocated, "a survey's bytes are those of usage, or None")

    def _check_words(self, backend: Backend, base: BaseImage, names: list[tuple[str, str]]) -> None:
        for user in backend.iter_users(base):
            same(user.image_id, base.image_id, "a user says of which image")
            promise(user.known_by in ("link", "path", "clone"), f"a user says what it is known by: {user}")
            named = user.disk_id is None or (user.disk_id, user.name) in names
            promise(named, f"a user is named rightly or not at all: {user}")
