"""Properties of rules: who may be removed, which ids may be names, whose record is whose."""

from __future__ import annotations

import contextlib
import re
import string
from dataclasses import replace
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from nova_imagecache import _args
from nova_imagecache._cleanup import BaseFacts, judge
from nova_imagecache.backends import BackendPaths
from nova_imagecache.backends.qcow2 import Qcow2Backend
from nova_imagecache.exceptions import InvalidRequestError

NOW = 1_700_000_000.0
TIMES = st.floats(0, 2 * NOW) | st.floats(NOW - 10, NOW + 10)
FACTS = st.builds(
    BaseFacts,
    image_id=st.just("img"),
    managed=st.booleans(),
    users=st.none() | st.integers(0, 3),
    pins=st.lists(st.just("me"), max_size=2).map(tuple),
    last_used=st.none() | TIMES,
    unused_since=st.none() | TIMES,
    allocated=st.integers(0, 1 << 40),
)
IDLE = st.just(0.0) | st.floats(0, 1e9)

FIRST = string.ascii_letters + string.digits
REST = FIRST + "._-"
IDS = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(FIRST),
    st.text(REST, max_size=20) | st.text(REST, min_size=120, max_size=126) | st.text(".", max_size=126),
)
LOWER = string.ascii_lowercase + string.digits
NAMES = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(LOWER),
    st.text(LOWER + ".-", max_size=31) | st.text(".", max_size=31),
).filter(lambda name: not name.endswith((".base", ".json")))
ANY_TEXT = st.text(max_size=140) | IDS | st.text(REST + "/\0 \n\u00e9\u0663", max_size=10)


class TestCleanup:
    """judge: over all figures."""

    @given(FACTS, IDLE, st.booleans())
    def test_nothing_that_anybody_needs_is_removed(self, base: BaseFacts, max_idle: float, in_use: bool) -> None:
        """Users, doubt about them, pins, the caller's word and foreign bases keep it; so does a missing mark."""
        item = judge(base, now=NOW, max_idle=max_idle, in_use=in_use)
        assert item.verdict in ("keep", "mark", "unmark", "remove")
        assert item.reason
        if item.verdict == "remove":
            assert base.managed
            assert base.users == 0
            assert not base.pins
            assert not in_use
            assert max_idle == 0 or (base.unused_since is not None and NOW - base.unused_since >= max_idle)
        if item.verdict == "mark":
            assert base.users == 0
            assert not base.pins

    @given(FACTS, IDLE, st.floats(0, 1e9))
    def test_removal_is_monotone_in_time(self, base: BaseFacts, max_idle: float, later: float) -> None:
        """What goes now would go later too, and if less idle time were granted."""
        if base.last_used is not None and base.last_used > NOW:
            base = replace(base, last_used=NOW - (base.last_used - NOW))
        now = judge(base, now=NOW, max_idle=max_idle, in_use=False)
        if now.verdict == "remove":
            assert judge(base, now=NOW + later, max_idle=max_idle, in_use=False).verdict == "remove"
            assert judge(base, now=NOW, max_idle=max_idle / 2, in_use=False).verdict == "remove"

    @given(FACTS, st.floats(0, NOW), st.floats(0, 1), st.floats(1, 1e9))
    def test_a_later_mark_never_helps_removal(
        self, facts: BaseFacts, marked: float, part: float, max_idle: float
    ) -> None:
        """A base that was marked later stays at least as long."""
        base = replace(facts, unused_since=marked)
        fresher = replace(facts, unused_since=marked + (NOW - marked) * part)
        if judge(base, now=NOW, max_idle=max_idle, in_use=False).verdict != "remove":
            assert judge(fresher, now=NOW, max_idle=max_idle, in_use=False).verdict != "remove"


class TestArguments:
    """Ids, names, sizes: what is taken is exactly the grammar."""

    @given(ANY_TEXT)
    def test_ids(self, text: str) -> None:
        """1 to 127 of a fixed set, beginning with a letter or digit; said here by hand."""
        fits = 1 <= len(text) <= 127 and text[0] in FIRST and all(letter in REST for letter in text)
        for check in (_args.image_id, _args.disk_id, _args.owner):
            taken = None
            with contextlib.suppress(InvalidRequestError):
                taken = check(text)
            assert taken == (text if fits else None)

    @given(ANY_TEXT | NAMES)
    def test_names(self, text: str) -> None:
        """1 to 32 of a smaller set, and no ending that is another file's."""
        fits = (
            1 <= len(text) <= 32
            and text[0] in LOWER
            and all(letter in LOWER + ".-" for letter in text)
            and not text.endswith((".base", ".json"))
        )
        taken = None
        with contextlib.suppress(InvalidRequestError):
            taken = _args.disk_name(text)
        assert taken == (text if fits else None)

    @given(IDS)
    def test_an_id_is_one_part_of_a_path(self, text: str) -> None:
        """Under any directory, it stays below it."""
        path = Path("/root") / _args.image_id(text)
        assert path.parent == Path("/root")
        assert path.name == text
        assert re.fullmatch(r"[^/\0]+", text)

    @given(st.integers())
    def test_sizes(self, size: int) -> None:
        """Above zero and within what an offset holds, in whole sectors."""
        try:
            rounded = _args.size(size)
        except InvalidRequestError:
            assert size <= 0 or size > (1 << 63) - 512
        else:
            assert 0 < size <= rounded < size + 512
            assert rounded % 512 == 0


class TestUserRecords:
    """Where the path reference of a root disk is written down."""

    backend = Qcow2Backend({}, BackendPaths(root=Path("/root"), disks_dir=Path("/disks")))

    @given(IDS, NAMES, IDS, NAMES)
    @example("a.b", "c", "a", "b.c")
    @example("a.b", "c", "a.b.c", "c")
    @example("a", "b.c", "a.b", "c")
    @example("a", "b.2ec", "a", "b-2ec")
    def test_no_two_disks_share_one(self, disk_id: str, name: str, other_id: str, other_name: str) -> None:
        """Both may hold dots, which is what lies between them."""
        first = self.backend.user_record("img", disk_id, name)
        second = self.backend.user_record("img", other_id, other_name)
        assert (first == second) == ((disk_id, name) == (other_id, other_name))

    @given(IDS, NAMES)
    @example("a" + "." * 126, "a" + "." * 31)
    def test_it_can_be_a_files_name(self, disk_id: str, name: str) -> None:
        """Not longer than filesystems allow, also with the suffix that it has while it is made."""
        path = self.backend.user_record("img", disk_id, name)
        assert path.parent == Path("/root/users/img")
        assert path.name.endswith(".json")
        assert len(path.name) + len(".0123456789abcdef") <= 255
