"""What every measurement needs: images, services, directories, and one way to run each of those who are compared."""

from __future__ import annotations

import functools
import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks import images, runner
from benchmarks.floors import TERMS
from services import ceph_bindings
from services import glance as glance_service
from services.ceph import CephCluster
from services.glance import ADMIN, GlanceServer

if TYPE_CHECKING:
    from benchmarks.images import Image
    from benchmarks.meter import Figures
    from benchmarks.scale import Scale

PEERS = ("nova", "ironic")
_TURNS = {"small": 3}
"""How often an image is measured in a round, if more than once: one turn of so short a time tells little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement: ``who`` is "ours", a peer, a physical term, or "bare pass"."""

    case: str
    who: str
    figures: Figures


class Bench:
    """Services start when they are first asked for and end with the block; images stay for the next run.

    Args:
        directory: of images, services and the roots that are measured: all on one file system.
        peers: those that are measured beside.
        cold: the images that are brought in cold.
    """

    def __init__(
        self,
        scale: Scale,
        directory: Path,
        *,
        rounds: int,
        peers: tuple[str, ...] = PEERS,
        cold: tuple[str, ...] = images.COLD,
    ) -> None:
        self.scale = scale
        self.cold = cold
        self.rounds = rounds
        self.peers = peers
        self.dir = directory.absolute()
        self.dir.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        missing = [name for name in self.peers if not runner.python_of(name).exists()]
        if missing:
            raise SystemExit(f"no {' and no '.join(missing)}: run `tools/setup.sh bench`, or give --no-peers")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- services and images

    @functools.cached_property
    def glance(self) -> GlanceServer:
        """A real Glance; what was uploaded to it stays for the next run."""
        if problem := glance_service.missing():
            raise SystemExit(problem)
        place = self.dir / f"glance-{self.scale.name}"
        options = {"filesystem_store_datadir": str(place / "images"), "filesystem_thin_provisioning": "true"}
        return self._stack.enter_context(GlanceServer(place, store_options=options))

    @functools.cached_property
    def ceph(self) -> CephCluster:
        """A real Ceph cluster of one node, in memory: what is measured is the clients' work, not a disk's."""
        if problem := ceph_bindings.missing():
            raise SystemExit(problem)
        return self._stack.enter_context(CephCluster(self.temporary() / "ceph"))

    def temporary(self) -> Path:
        """A new directory, removed when the run ends."""
        return self._stack.enter_context(runner.fresh(self.dir))

    @functools.cache  # noqa: B019 - a bench lives as long as its process
    def image(self, name: str) -> Image:
        """The image, on disk."""
        return images.image(name, self.scale, self.dir / f"images-{self.scale.name}")

    @functools.cache  # noqa: B019 - as above
    def served(self, name: str) -> Image:
        """The image, on disk and in Glance."""
        image = self.image(name)
        try:
            known = self.glance.show(image.image_id)
        except RuntimeError:
            properties = {"id": image.image_id, "visibility": "public"}  # Ironic takes none that are another project's
            self.glance.upload(Path(image.file), disk_format=image.disk_format, **properties)
            known = self.glance.show(image.image_id)
        if known["status"] != "active" or known["os_hash_value"] != image.sha512:
            raise SystemExit(f"Glance has another {name} image: remove {self.dir}")
        return image

    # --- those who are compared

    def config(self, root: Path, *, source: str = "glance", **changes: Any) -> Figures:
        """The library's configuration with its root below ``root``."""
        options: Figures = {"path": str(self._image_directory())}
        if source == "glance":
            options = {"endpoint": self.glance.url, "token": ADMIN}
        return {"root": str(root / "root"), "source": source, "source_options": options, **changes}

    def ours(self, what: str, *, config: Figures, watched: Path | None = None, **task: Any) -> Figures:
        """What the library needs for it."""
        return runner.measure("benchmarks.worker", {"what": what, "config": config, **task}, watched=watched)

    def peer(self, name: str, what: str, root: Path, *, watched: Path | None = None, **task: Any) -> Figures:
        """What the peer needs for it."""
        given = {"what": what, "root": str(root), "endpoint": self.glance.url, **task}
        return runner.measure(f"benchmarks.peers.{name}", given, watched=watched, python=runner.python_of(name))

    def turns(self, name: str, number: int) -> range:
        """The turns of this image in a round; they go on counting from the round before."""
        times = _TURNS.get(name, 1)
        return range(number * times, (number + 1) * times)

    def terms(self, image: Image) -> tuple[str, ...]:
        """The physical terms that this image has."""
        return tuple(term for term in TERMS if term != "decode" or image.disk_format != "raw")

    def term(self, name: str, root: Path, image: Image) -> Figures:
        """A physical term for this image."""
        task = {"term": name, "token": ADMIN, "target": str(root / "written"), **asdict(image)}
        if name == "download":
            task["url"] = f"{self.glance.url}/v2/images/{image.image_id}/file"
        return runner.measure("benchmarks.physical", task)

    def bare_pass(self, root: Path, image: Image) -> Figures:
        """What is left of a cold pass when the library is taken away."""
        url = f"{self.glance.url}/v2/images/{image.image_id}/file"
        task = {"url": url, "token": ADMIN, "directory": str(root), **asdict(image)}
        return runner.measure("benchmarks.bare_pass", task)

    def _image_directory(self) -> Path:
        """A directory that DirectorySource reads, with the images that need no Glance."""
        directory = self.dir / f"images-{self.scale.name}" / "by-id"
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("tiny", "small"):
            image = self.image(name)
            link = directory / f"{image.image_id}.img"
            if not link.exists():
                os.link(image.file, link)
            note = {"disk_format": image.disk_format, "os_hash_algo": "sha512", "os_hash_value": image.sha512}
            (directory / f"{image.image_id}.json").write_text(json.dumps(note), encoding="utf-8")
        return directory
