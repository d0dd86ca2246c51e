"""Tables in Markdown, made from the figures of a run."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.aims import aims
from benchmarks.floors import TERMS, floor_of
from benchmarks.results import Case, cases
from benchmarks.words import NOTHING, bytes_of, ratio, seconds, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.meter import Figures

_NOBODY = ""


def machine(document: Figures) -> str:
    """What the run was made with."""
    facts = document["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    where = f"{facts['cores']} cores ({facts['cpu']}), {bytes_of(facts['memory'])} of memory, {facts['filesystem']}"
    note = "" if document["scale"] == "full" else f" **Scale: {document['scale']}; these figures compare nothing.**"
    return (
        f"{where}, Linux {facts['kernel']}, Python {facts['python']}; {versions}. "
        f"{document['made_at']}, {document['rounds']} rounds.{note}"
    )


def reached(document: Figures) -> str:
    """Every aim, what was measured, and what stands in the way."""
    head = ["work", "must", "aim", "measured", "reached", "what stands in the way"]
    rows = [[one.work, one.must, one.aim, one.measured, one.verdict, one.in_the_way] for one in aims(document)]
    return table(head, rows)


def cold(document: Figures) -> str:
    """Seconds from Glance to the first root disk."""
    head = ["image", "ours", "Nova", "Nova / ours", "Ironic", "Ironic / ours"]
    rows = []
    for name in cases(document, "cold"):
        case = Case(document, "cold", name)
        row = [name, seconds(case.median("ours"))]
        for peer in ("nova", "ironic"):
            row += [seconds(case.median(peer)), ratio(case.ratio("ours", peer))]
        rows.append(row)
    return table(head, rows)


def floors(document: Figures) -> str:
    """The four terms of the same rounds, the CPU seconds of all processes over the cores, how far we are above, and how
    far a pass with no library around it is above its own floor."""
    head = ["image", *TERMS, "CPU / cores", "floor", "ours", "ours / floor", "bare pass", "bare pass / its floor"]
    rows = []
    for work, title in (("cold", "{}"), ("rbd-import", "{} into Ceph")):
        for name in cases(document, work):
            if found := floor_of(document, name, work):
                terms = [seconds(found.terms.get(term)) for term in TERMS]
                last = [seconds(found.cpu), found.slowest, seconds(found.seconds), ratio(found.times)]
                bare = floor_of(document, name, work, "bare pass")
                last += [seconds(bare.seconds if bare else None), ratio(bare.times if bare else None)]
                rows.append([title.format(name), *terms, *last])
    return table(head, rows)


def costs(document: Figures) -> str:
    """What noise does not touch: bytes, child processes, memory."""
    who = [("ours", "ours"), ("nova", "Nova"), ("ironic", "Ironic")]
    head = ["image", *(f"{what}, {title}" for what in ("written", "most on disk", "children") for _, title in who)]
    head.append("memory grown, ours")
    rows = []
    for name in cases(document, "cold"):
        case = Case(document, "cold", name)
        row = [name]
        row += [bytes_of(case.median(one, "written")) for one, _ in who]
        for one, _ in who:
            peak, before = case.median(one, "disk_peak"), case.median(one, "disk_before")
            row.append(bytes_of(None if peak is None or before is None else peak - before))
        for one, _ in who:
            count = case.median(one, "children")
            row.append(_NOBODY if count is None else f"{count:.0f}")
        rows.append([*row, bytes_of(case.median("ours", "memory_grown"))])
    return table(head, rows)


def warm(document: Figures) -> str:
    """A root disk of a base that is there; and the base alone."""
    head = ["work", "p50", "p95", "CPU each", "times ours"]
    rows = []
    for name in cases(document, "warm"):
        case = Case(document, "warm", name)
        what = "a link to a master image" if name == "a link" else f"root disk, {name}"
        for who, title in _WHO.items():
            if who in case:
                times = "" if who == "ours" else ratio(case.ratio("ours", who, "p50"))
                rows.append([f"{what}: {title}", *_each(case, who), times])
    case = Case(document, "hit", "ensure_base")
    if "ours" in case:
        rows.append(["`ensure_base` of a base that is there: ours", *_each(case, "ours"), _NOBODY])
    case = Case(document, "start-up", "import")
    if "ours" in case:
        rows.append(["`import nova_imagecache`", seconds(case.median("ours")), _NOBODY, _NOBODY, _NOBODY])
    return table(head, rows)


_WHO = {"ours": "ours", "qemu-img create": "bare `qemu-img create`", "nova": "Nova", "ironic": "Ironic"}


def _each(case: Case, who: str) -> list[str]:
    cpu, children, count = (case.median(who, name) for name in ("cpu", "cpu_children", "n"))
    each = None if cpu is None or not count else (cpu + (children or 0)) / count
    return [seconds(case.median(who, "p50")), seconds(case.median(who, "p95")), seconds(each)]


def crowd(document: Figures) -> str:
    """Many who want one cold image: when the first has it, and how long after that the others do."""
    head = [
        "processes x threads",
        "who",
        "downloads",
        "first base",
        "bases, p95 after it",
        "disks, p95 after it",
        "all",
    ]
    rows = []
    for name in cases(document, "crowd"):
        case = Case(document, "crowd", name)
        for who in ("ours", "nova"):
            if who in case:
                downloads = case.median(who, "downloads") or 0
                bases = _NOBODY if who == "nova" else seconds(case.median(who, "based.p95"))
                disks = _NOBODY if "alone" in name else seconds(case.median(who, "made.p95"))
                first = seconds(case.median(who, "first"))
                rows.append([name, who, f"{downloads:.0f}", first, bases, disks, seconds(case.median(who))])
    return table(head, rows)


def at_once(document: Figures) -> str:
    """Warm root disks at one moment, and as many one after the other."""
    head = ["root disks", "all at once", "one after the other", "times as fast", "p95 of each, at once"]
    rows = []
    for name in cases(document, "at-once"):
        case = Case(document, "at-once", name)
        each = [seconds(case.median("ours", figure)) for figure in ("seconds", "one_by_one", "p95")]
        pairs = zip(case.values("ours", "seconds"), case.values("ours", "one_by_one"), strict=True)
        times = [after / together for together, after in pairs]
        rows.append([name, each[0], each[1], ratio(statistics.median(times) if times else None), each[2]])
    return table(head, rows)


def cleanup(document: Figures) -> str:
    """A pass over bases that each have a disk."""
    head = ["bases and disks", "ours", "a second plan", "usage()", "Nova", "Nova / ours"]
    rows = []
    for name in cases(document, "cleanup"):
        case = Case(document, "cleanup", name)
        ours = [seconds(case.median("ours", figure)) for figure in ("seconds", "plan", "usage")]
        rows.append([f"{int(name):,}", *ours, seconds(case.median("nova")), ratio(case.ratio("ours", "nova"))])
    return table(head, rows)


def ceph(document: Figures) -> str:
    """Root disks and bases in Ceph."""
    head = ["work", "ours", "beside", "beside / ours"]
    rows = []
    case = Case(document, "rbd-clone", "clone")
    if "ours" in case:
        for figure, title in (
            ("p50", "the same steps by librbd alone"),
            ("clone_and_resize.p50", "clone, resize alone"),
        ):
            bare = case.median("librbd", figure)
            ours = case.median("ours", "p50")
            times = ratio(bare / ours if bare and ours else None)
            rows.append([f"root disk; beside: {title}", seconds(ours), seconds(bare), times])
    for name in cases(document, "rbd-import"):
        case = Case(document, "rbd-import", name)
        for who, download in (("tools", "download"), ("tools, unverified", "download without a look at the digest")):
            title = f"{name} to a base; beside: {download}, qemu-img convert, rbd import"
            times = ratio(case.ratio("ours", who))
            rows.append([title, seconds(case.median("ours")), seconds(case.median(who)), times])
    return table(head, rows)


TABLES: dict[str, Callable[[Figures], str]] = {
    "machine": machine,
    "reached": reached,
    "cold": cold,
    "floors": floors,
    "costs": costs,
    "warm": warm,
    "crowd": crowd,
    "at_once": at_once,
    "cleanup": cleanup,
    "ceph": ceph,
}
"""By the names that pages mark their places with."""


def everything(document: Figures) -> str:
    """All tables, for a terminal."""
    made = {name: make(document) for name, make in TABLES.items()}
    return "\n\n".join(f"{name}\n{text}" for name, text in made.items() if text != NOTHING)
