"""The part of ``BackendContract`` about bases that are published: found, listed, recorded, measured."""

from __future__ import annotations

from functools import partial

from nova_imagecache._models import BaseImage
from nova_imagecache.backends import Backend, BackendPaths
from nova_imagecache.testing._contract_kit import (
    GUEST_SIZE,
    LONG_ID,
    MIB,
    ContractKit,
    Sample,
    in_threads,
    promise,
    same,
)
from nova_imagecache.testing._promises import chapter

IMAGE_IDS = (
    LONG_ID,
    "0",
    "img",
    "Img",
    "img.1",
    "img-1",
    "img_1",
    "img.base",
    "img.json",
    "a..b",
    "end.",
    "end-",
    "end_",
)
"""Ids at the limits of the grammar, and such as differ by little."""


@chapter(
    "publishing",
    "backends.BaseWriter.publish",
    "backends.Backend.find_base",
    "backends.Backend.iter_bases",
    "backends.Backend.usage",
)
class PublishContract(ContractKit):
    """A base becomes visible."""

    def test_one_winner(self, backend: Backend) -> None:
        """Of many who publish one image, exactly one wins; the others get the winner's base and leave nothing."""
        before = backend.capacity()
        samples = [self.sample(backend, f"racer-{index}") for index in range(self.threads)]
        writers = [self.stage(backend, "img", sample) for sample in samples]
        records = [self.record("img", sample, source=f"racer-{i}") for i, sample in enumerate(samples)]
        answers = in_threads([partial(w.publish, r) for w, r in zip(writers, records, strict=True)])
        bases = [answer for answer in answers if isinstance(answer, BaseImage)]
        same(len(bases), len(writers), f"publish answers everybody with a base ({answers})")
        found = backend.find_base("img")
        promise(found, "the winner's base is found")
        same({base.record.source for base in bases}, {bases[0].record.source}, "all publishers get the same base")
        same(found and found.record, bases[0].record, "the base that is found is the one that publishers got")
        winner = samples[records.index(bases[0].record)]
        same(self.base_bytes(backend, bases[0]), winner.stored, "the winner's bytes go with the winner's record")
        same(len(list(backend.iter_bases())), 1, "one image has one base")
        same(backend.capacity().staging, before.staging, "losers of publish leave nothing in staging")

    def test_late_loser_gets_the_first(self, backend: Backend) -> None:
        """Who publishes later changes nothing."""
        late = self.sample(backend, "late")
        writer = self.stage(backend, "img", late)
        first = self.publish(backend, "img", "first")
        answer = writer.publish(self.record("img", late))
        same(answer.record, first.record, "a late publish returns the base that was first")
        same(
            self.base_bytes(backend, first),
            self.sample(backend, "first").stored,
            "a late publish leaves the first base's bytes alone",
        )

    def test_find_and_iter_agree(self, backend: Backend, paths: BackendPaths) -> None:
        """``publish``, ``find_base``, ``iter_bases`` and another process tell of the same base."""
        made = {image_id: self.publish(backend, image_id, image_id) for image_id in ("one", "two")}
        other = self.make_backend(paths)
        listed = {base.image_id: base for base in backend.iter_bases()}
        same(set(listed), set(made), "iter_bases lists every base once")
        for image_id, base in made.items():
            found = backend.find_base(image_id)
            same(found, listed[image_id], "find_base and iter_bases agree")
            same(other.find_base(image_id), found, "another object over the same storage finds the same")
            promise(found and (found.record, found.location) == (base.record, base.location), "publish told the same")
        other.close()

    def test_record_round_trips(self, backend: Backend) -> None:
        """Every field of the record comes back as it was, digest or none, in any script."""
        full = self.publish(
            backend,
            "full",
            source_format="vmdk",
            source_size=12345,
            made_by="qemu-img convert",
            source="glance-日本 ü \\ \" ' \n",
            fetched_at=1_700_000_000.123456,
            inspector=7,
        )
        bare = self.publish(backend, "bare", source_digest=None, evidence="none")
        for base in (full, bare):
            found = backend.find_base(base.image_id)
            promise(found, "a published base is found")
            fields = base.record.__dataclass_fields__ if found else ()
            for field in fields:
                wanted = getattr(base.record, field)
                same(getattr(found and found.record, field), wanted, f"the record's {field} comes back as it was")
        sample = self.sample(backend)
        same(full.record.source, "glance-日本 ü \\ \" ' \n", "publish returns the record that it was given")
        same((bare.digest, bare.record.evidence), (None, "none"), "a record may have no digest")
        same(bare.record.size, len(sample.stored), "the record's size is what was handed in")

    def test_sizes_beyond_32_bits(self, backend: Backend) -> None:
        """A base of 5 GiB that is all hole is recorded and measured as such."""
        size = 5 * 2**30 + 512
        sample = Sample(format=backend.properties.base_formats[-1], stored=b"", guest=b"")
        if "raw" in backend.properties.base_formats:
            sample = Sample(format="raw", stored=b"", guest=b"")
        writer = backend.stage_base("img", sample.format)
        writer.set_size(size)
        base = writer.publish(self.record("img", sample, virtual_size=size, size=size))
        found = backend.find_base("img")
        same(found and found.record.virtual_size, size, "a large virtual size is recorded")
        same(backend.usage(base).virtual_size, size, "a large virtual size is reported by usage")

    def test_ids_at_the_limits(self, backend: Backend) -> None:
        """Every id that the grammar allows is a base of its own."""
        made = {image_id: self.publish(backend, image_id, source=f"of {image_id}") for image_id in IMAGE_IDS}
        same(
            sorted(base.image_id for base in backend.iter_bases()),
            sorted(IMAGE_IDS),
            "every id of the grammar works, and none is taken for another",
        )
        for image_id in made:
            found = backend.find_base(image_id)
            same(found and found.record.source, f"of {image_id}", f"the base of {image_id!r} is its own")
        backend.purge_base(backend.retire_base(made["img"]))
        same(
            {base.image_id for base in backend.iter_bases()},
            set(IMAGE_IDS) - {"img"},
            "a base goes alone, whatever other ids look like",
        )

    def test_reopened_storage(self, backend: Backend, paths: BackendPaths) -> None:
        """What one object published is whole for the next one, marks included."""
        base = self.publish(backend, "img")
        backend.mark_unused(base, 1_700_000_000.0)
        disk = self.create(backend, base)
        other = self.make_backend(paths)
        found = other.find_base("img")
        same(found, backend.find_base("img"), "a base and its marks outlive the object that made them")
        promise(found and self.base_bytes(other, found) == self.sample(backend).stored, "so do its bytes")
        same(other.get_root_disk("vm", "disk"), disk, "a root disk outlives the object that made it")
        other.close()

    def test_usage_is_sane(self, backend: Backend) -> None:
        """``usage`` tells a base's sizes; ``capacity`` tells the storage's, staging and trash included."""
        before = backend.capacity()
        promise(0 <= before.free <= before.total, "free space is between 0 and the total")
        promise(before.total > 0, "the storage's total is above 0")
        writer = self.stage(backend, "img", self.sample(backend))
        writer.sync()
        if before.complete:
            promise(backend.capacity().staging > before.staging, "what is being written counts as staging")
        base = writer.publish(self.record("img", self.sample(backend)))
        usage = backend.usage(base)
        same(usage.virtual_size, GUEST_SIZE, "usage tells the virtual size")
        promise(0 < usage.allocated <= len(self.sample(backend).stored) + MIB, "allocated bytes are those on storage")
        same(backend.capacity().staging, before.staging, "a published base is staging no more")
        retired = backend.retire_base(base)
        if before.complete:
            promise(backend.capacity().trash > before.trash, "a retired base counts as trash")
        backend.purge_base(retired)
        same(backend.capacity().trash, before.trash, "a purged base takes no space")
