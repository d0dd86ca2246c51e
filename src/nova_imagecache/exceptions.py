"""Every error the library raises.

Each error has typed fields and makes its message from them: what happened, to which image or disk, in which stage, and
what to do next. All of them pickle, so that they cross process pools whole. None ever carries a token, password or key.

``retryable`` says whether the same call may succeed later with nothing changed; ``exit_code`` is what the command line
ends with (75 is ``EX_TEMPFAIL`` of sysexits.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nova_imagecache._models import Digest, DiskUser

EX_TEMPFAIL = 75


def _rebuild(cls: type[ImageCacheError], state: dict[str, Any]) -> ImageCacheError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    return error


class ImageCacheError(Exception):
    """The base of every error of this library.

    Attributes: ``detail`` (what happened), ``image_id``, ``disk_id``, ``name`` (of the root disk), ``stage`` (the step
    that failed) and ``todo`` (what to do next); all but ``detail`` may be None.
    """

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    default_todo: ClassVar[str | None] = None

    def __init__(
        self,
        detail: str = "",
        *,
        image_id: str | None = None,
        disk_id: str | None = None,
        name: str | None = None,
        stage: str | None = None,
        todo: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.image_id = image_id
        self.disk_id = disk_id
        self.name = name
        self.stage = stage
        self.todo = todo if todo is not None else self.default_todo

    def summary(self) -> str:
        """The first half of the message: what happened."""
        return self.detail or type(self).__name__

    def __str__(self) -> str:
        where = []
        if self.image_id is not None:
            where.append(f"image {self.image_id}")
        if self.disk_id is not None:
            where.append(f"disk {self.disk_id}" + (f"/{self.name}" if self.name else ""))
        if self.stage is not None:
            where.append(f"stage {self.stage}")
        text = self.summary() + (f" [{', '.join(where)}]" if where else "")
        return f"{text}. {self.todo}" if self.todo else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


class InvalidRequestError(ImageCacheError, ValueError):
    """An argument cannot be used: an id that is no path part, a size that is no size."""

    exit_code = 2
    default_todo = "Correct the argument and call again"


class ConfigError(ImageCacheError, ValueError):
    """The configuration, or the cache root it names, cannot be used. ``problems`` lists all of them."""

    exit_code = 2
    default_todo = "Correct the configuration and start again"

    def __init__(
        self, problems: Sequence[str], *, stage: str | None = "configuration", todo: str | None = None
    ) -> None:
        super().__init__("; ".join(problems), stage=stage, todo=todo)
        self.problems = tuple(problems)


# --- the image and where it comes from -------------------------------------------------------------------------------


class SourceError(ImageCacheError):
    """The image service could not give the image, or gave one that cannot be used."""

    default_todo = "Look at the image service's log"


class ImageNotFoundError(SourceError):
    """The source has no image by this id, or hides it from this token."""

    exit_code = 4
    default_todo = "Check the image id and that this token may see it"

    def summary(self) -> str:
        """The first half of the message: what happened."""
        return self.detail or "the image does not exist"


class ImageNotActiveError(SourceError):
    """The image exists but has no data to give: ``status`` is queued, saving, deactivated, deleted, killed ..."""

    exit_code = 3

    def __init__(self, status: str, *, image_id: str | None = None, stage: str | None = "metadata") -> None:
        todo = {
            "deactivated": "Ask an administrator of the image service to reactivate it",
            "queued": "Upload the image's data first",
        }.get(status, "Use an image whose status is active")
        super().__init__(f"the image is not active but {status}", image_id=image_id, stage=stage, todo=todo)
        self.status = status


class ImageRejectedError(SourceError):
    """The image's content is unsafe, or not what it claims to be. ``reason`` says why."""

    exit_code = 3
    default_todo = "Do not use this image: repair it and upload it as a new one"

    def __init__(
        self, reason: str, *, image_id: str | None = None, stage: str | None = "inspection", todo: str | None = None
    ) -> None:
        super().__init__(f"the image is refused: {reason}", image_id=image_id, stage=stage, todo=todo)
        self.reason = reason


class ImageCorruptError(SourceError):
    """The bytes that came are not the image: length or digest differ from what was announced."""

    default_todo = "Call again; if it happens again the image is damaged in its store"

    def __init__(
        self,
        expected: Digest | int | str | None,
        actual: Digest | int | str | None,
        *,
        image_id: str | None = None,
        stage: str | None = "verification",
    ) -> None:
        super().__init__(f"the image is damaged: expected {expected}, got {actual}", image_id=image_id, stage=stage)
        self.expected = expected
        self.actual = actual


class SourceUnavailableError(SourceError):
    """The image service does not answer, or stopped in the middle, and went on doing so for all retries."""

    retryable = True
    exit_code = EX_TEMPFAIL
    default_todo = "Call again later"


class SourceForbiddenError(SourceError):
    """The image service refused the token, or the token may not read this image."""

    default_todo = "Use a token that is valid and may read the image"


# --- storage ---------------------------------------------------------------------------------------------------------


class BackendError(ImageCacheError):
    """The backend's storage failed. ``backend`` is its name, None where the cache root itself is meant."""

    default_todo = "Look at the cause and at the storage"

    def __init__(
        self,
        detail: str = "",
        *,
        backend: str | None = None,
        image_id: str | None = None,
        disk_id: str | None = None,
        name: str | None = None,
        stage: str | None = None,
        todo: str | None = None,
    ) -> None:
        super().__init__(detail, image_id=image_id, disk_id=disk_id, name=name, stage=stage, todo=todo)
        self.backend = backend


class BackendNotFoundError(BackendError):
    """No plug-in is installed under this name. ``available`` lists those that are."""

    exit_code = 2

    def __init__(self, name: str, available: Sequence[str], *, group: str = "nova_imagecache.backends") -> None:
        found = ", ".join(available) or "none"
        super().__init__(
            f"no plug-in {name!r} in {group}; available: {found}",
            backend=name,
            stage="loading",
            todo=f"Use one of the available names, or install the package that brings {name!r}",
        )
        self.name = name
        self.available = tuple(available)
        self.group = group


class BackendUnavailableError(BackendError):
    """The storage does not answer."""

    retryable = True
    exit_code = EX_TEMPFAIL
    default_todo = "Call again when the storage is back"


class NoSpaceError(BackendError):
    """The storage has no room. Bytes, each None where nobody counted: ``needed``, ``free``, and what cannot be evicted:
    of bases that are ``pinned``, ``in_use``, or ``recent``: unused now, and used within the last five minutes; and of
    what is ``left_alone``: it stands in the place of bases and cannot be read as one.
    """

    exit_code = EX_TEMPFAIL
    default_todo = "Free space, raise the limit, unpin, or run cleanup --max-idle 0: plan_cleanup(max_idle=0) in Python"

    def __init__(
        self,
        *,
        needed: int | None = None,
        free: int | None = None,
        pinned: int | None = None,
        in_use: int | None = None,
        recent: int | None = None,
        left_alone: int | None = None,
        limit: str | None = None,
        backend: str | None = None,
        image_id: str | None = None,
        disk_id: str | None = None,
        name: str | None = None,
        stage: str | None = None,
    ) -> None:
        parts = [f"{what} {n}" for what, n in (("needed", needed), ("free", free)) if n is not None]
        parts += [f"{what} {n}" for what, n in (("pinned", pinned), ("in use", in_use)) if n is not None]
        parts += [f"used within the last five minutes {recent}"] if recent is not None else []
        parts += [f"in bases that cannot be read {left_alone}"] if left_alone else []
        detail = "no space left" + (f" ({', '.join(parts)} bytes)" if parts else "")
        detail += f": {limit} would be exceeded" if limit else ""
        later = "Call again in five minutes, when what was used just now may go. Sooner: "
        todo = later + self.default_todo if recent else None
        if left_alone:
            told = "See what cannot be read, and what to do with it: nova-imagecache check, or check() in Python. "
            todo = told + (todo or self.default_todo)
        super().__init__(detail, backend=backend, image_id=image_id, disk_id=disk_id, name=name, stage=stage, todo=todo)
        self.needed = needed
        self.free = free
        self.pinned = pinned
        self.in_use = in_use
        self.recent = recent
        self.left_alone = left_alone
        self.limit = limit


class CommandError(BackendError):
    """A child process failed. ``argv``, ``returncode`` (negative: the signal; None: timed out) and ``stderr``."""

    default_todo = "Read the command's own words above"

    def __init__(
        self,
        argv: Sequence[str],
        returncode: int | None,
        stderr: str,
        *,
        backend: str | None = None,
        image_id: str | None = None,
        disk_id: str | None = None,
        stage: str | None = None,
    ) -> None:
        end = "timed out" if returncode is None else f"ended with {returncode}"
        super().__init__(
            f"{argv[0] if argv else 'command'} {end}: {stderr.strip() or 'no message'}",
            backend=backend,
            image_id=image_id,
            disk_id=disk_id,
            stage=stage,
        )
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stderr = stderr


# --- bases -----------------------------------------------------------------------------------------------------------


class BaseNotFoundError(ImageCacheError):
    """The cache has no base of this image."""

    exit_code = 4
    default_todo = "Bring it in first: ensure, or ensure_base in Python"

    def summary(self) -> str:
        """The first half of the message: what happened."""
        return self.detail or "the cache has no base of this image"


class BaseInUseError(ImageCacheError):
    """The base has ``users`` and therefore stays."""

    exit_code = 3
    default_todo = "Remove the root disks that depend on it first, or flatten them: flatten_root_disk in Python"

    def __init__(self, users: Sequence[DiskUser], *, image_id: str | None = None, stage: str | None = None) -> None:
        names = [f"{u.disk_id or 'unnamed'}/{u.name or '?'}" for u in users[:5]]
        more = f" and {len(users) - 5} more" if len(users) > 5 else ""
        super().__init__(
            f"the base is used by {len(users)} root disk(s): {', '.join(names)}{more}", image_id=image_id, stage=stage
        )
        self.users = tuple(users)


class BasePinnedError(ImageCacheError):
    """The base is pinned by ``owners`` and therefore stays."""

    exit_code = 3
    default_todo = "Unpin it, or wait until its pins end"

    def __init__(self, owners: Sequence[str], *, image_id: str | None = None, stage: str | None = None) -> None:
        super().__init__(f"the base is pinned by {', '.join(owners)}", image_id=image_id, stage=stage)
        self.owners = tuple(owners)


class BaseCorruptError(ImageCacheError):
    """The base's bytes are no longer those that were published."""

    default_todo = "It is in quarantine and not used again; the next ensure fetches a new one"


class UsersUnknownError(ImageCacheError):
    """Nobody can say who uses the base, so it stays."""

    exit_code = 3
    default_todo = "Make what knows the users reachable and call again"


# --- root disks ------------------------------------------------------------------------------------------------------


class DiskNotFoundError(ImageCacheError):
    """There is no root disk by this id and name, or nothing that says what it is."""

    exit_code = 4
    default_todo = "Check the disk id and name"

    def summary(self) -> str:
        """The first half of the message: what happened."""
        return self.detail or "there is no such root disk"


class DiskExistsError(ImageCacheError, FileExistsError):
    """A root disk, or a file, of that name exists and is not what was asked for; it is left untouched."""

    exit_code = 3
    default_todo = "Remove it first, or ask for another name"

    def summary(self) -> str:
        """The first half of the message: what happened."""
        return self.detail or "the root disk exists already"


class DiskInUseError(ImageCacheError):
    """Somebody has the root disk open."""

    exit_code = 3
    default_todo = "Stop the instance first"

    def summary(self) -> str:
        """The first half of the message: what happened."""
        return self.detail or "the root disk is in use"


class DiskTooSmallError(ImageCacheError):
    """The asked ``size`` is below ``virtual_size``, the least the image or the existing disk needs (both bytes)."""

    exit_code = 3
    default_todo = "Ask for a larger disk"

    def __init__(
        self,
        size: int,
        virtual_size: int,
        *,
        image_id: str | None = None,
        disk_id: str | None = None,
        name: str | None = None,
        stage: str | None = "size check",
    ) -> None:
        super().__init__(
            f"a disk of {size} bytes is too small: at least {virtual_size} are needed",
            image_id=image_id,
            disk_id=disk_id,
            name=name,
            stage=stage,
        )
        self.size = size
        self.virtual_size = virtual_size


# --- time ------------------------------------------------------------------------------------------------------------


class LockTimeoutError(ImageCacheError, TimeoutError):
    """Somebody else works on the same thing and made no progress for ``waited`` seconds. ``path`` is the lock.

    Of another host's import into a pool of Ceph no progress is seen: that alone is waited for for so long at most.
    """

    retryable = True
    exit_code = EX_TEMPFAIL
    default_todo = "See who holds the lock (lslocks), or raise lock_timeout"

    def __init__(
        self,
        path: str,
        waited: float,
        *,
        image_id: str | None = None,
        disk_id: str | None = None,
        stage: str | None = "locking",
    ) -> None:
        super().__init__(
            f"waited {waited:.1f} s for {path} without progress", image_id=image_id, disk_id=disk_id, stage=stage
        )
        self.path = path
        self.waited = waited


class DeadlineError(ImageCacheError, TimeoutError):
    """The caller's ``deadline`` passed."""

    exit_code = EX_TEMPFAIL
    default_todo = "Call again with more time"

    def summary(self) -> str:
        """The first half of the message: what happened."""
        return self.detail or "the deadline passed"


class CancelledError(ImageCacheError):
    """The caller set its ``cancel`` event."""

    def summary(self) -> str:
        """The first half of the message: what happened."""
        return self.detail or "cancelled by the caller"
