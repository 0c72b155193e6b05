"""Files that are there whole or not at all, and that one process at a time writes."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from tcinfer.errors import FileError

PREFIX, SUFFIX = ".tcinfer-", ".part"  # of temporary files
IN_USE = "is being written by another process: wait for its end, or choose another name"


class Writer:
    """A file that nobody else writes meanwhile: who tries to is refused. A context manager.

    The lock is the file's own, and goes from each version of it to the next (`replacing`): nothing is left beside it,
    and a process that dies gives it back.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises FileError where somebody else writes it."""
        self.path = followed(expanded(path))
        self._held = None if not self.path.is_file() else _lock(self.path)

    @property
    def holds(self) -> bool:
        """Whether there was a file to hold."""
        return self._held is not None

    def hold(self, handle: int) -> None:
        """Hold a new version, and let the old one go."""
        self.close()
        self._held = handle

    def close(self) -> None:
        if self._held is not None:
            os.close(self._held)
        self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def replacing(path: Path, private: bool = False, writer: Writer | None = None) -> Iterator[Path]:
    """Yields a temporary file's path beside `path`; at the end it is on disk and takes its place, in one step.

    A link is followed: the file that it points to is replaced. private: readable by its owner alone, whatever the
    umask; else a file that was there keeps its permissions. writer: who holds the file. What processes that were killed
    have left beside it is removed. Raises FileError where that cannot be; `path` is then as it was, and so it is after
    an exception within.
    """
    target = _checked(path, writer)
    temporary, handle = _temporary(path, target, private)
    try:
        yield temporary
        os.fsync(handle)
        os.replace(temporary, target)
        _sync_folder(target.parent)
        if writer is not None:
            writer.hold(os.dup(handle))
    except OSError as e:
        raise FileError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as a user names it: `~` is a home. Raises FileError for that of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileError(f"{path}: there is no such home") from None


def copy(source: Path, target: Path, private: bool = False) -> None:
    """A file's bytes under another name; else as `replacing`."""
    with replacing(target, private) as temporary:
        shutil.copyfile(source, temporary)


def check_writable(path: Path, writer: Writer | None = None) -> None:
    """Raise FileError where `replacing` could not begin; for before long work."""
    temporary, handle = _temporary(path, _checked(path, writer), private=True)
    temporary.unlink()
    os.close(handle)


def identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a version of a file from others; None where there is no file."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


def followed(path: Path) -> Path:
    """What a link points to. Raises FileError for a name that no file can have."""
    if "\0" in str(path):
        raise FileError(f"{path}: cannot be written: a name cannot hold a NUL")
    try:
        return Path(os.path.realpath(path)) if path.is_symlink() else path
    except OSError as e:  # a name that is too long
        raise FileError(f"{path}: cannot be written: {e.strerror}") from None


def _checked(path: Path, writer: Writer | None) -> Path:
    """The file to be replaced. Raises FileError for what is no file, or is somebody else's to write."""
    try:
        target = followed(path)
        if os.path.lexists(target) and not stat.S_ISREG(os.stat(target).st_mode):
            raise FileError(f"{path}: cannot be written: it is no regular file")
        if (writer is None or not writer.holds) and target.is_file():
            os.close(_lock(target))
    except OSError as e:
        raise FileError(f"{path}: cannot be written: {e.strerror}") from None
    return target


def _temporary(path: Path, target: Path, private: bool) -> tuple[Path, int]:
    """An empty file beside the target, locked, with the permissions that it gets in the end; those that others have
    left behind are gone."""
    try:
        # One name for each target: what a killed process has left is found without a look at the whole folder.
        name = hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()
        temporary = target.parent / f"{PREFIX}{name}{SUFFIX}"
        while True:
            with suppress(FileNotFoundError):  # left behind, or somebody is writing it: then after him
                left = os.open(temporary, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
                lock(left, wait=True)
                if _is(temporary, left):
                    temporary.unlink()
                os.close(left)
            try:
                handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600 if private else 0o666)
            except FileExistsError:
                continue
            lock(handle, wait=True)
            if _is(temporary, handle):  # else somebody took it for left behind, before it was locked
                break
            os.close(handle)
        if not private and target.exists():
            with suppress(PermissionError):  # some file systems have no modes
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
    except OSError as e:
        raise FileError(f"{path}: cannot be written: {e.strerror or e}") from None
    return temporary, handle


def _lock(path: Path) -> int:
    """A handle that holds a file's lock. Raises FileError where somebody else does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        lock(handle)
    except BlockingIOError:
        os.close(handle)
        raise FileError(f"{path}: {IN_USE}") from None
    return handle


def _is(path: Path, handle: int) -> bool:
    """Whether a path leads to an open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    return False


def lock(handle: int, wait: bool = False) -> None:
    """Lock an open file, where there are such locks. Raises BlockingIOError where somebody else has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # a file system without
        return


def _sync_folder(folder: Path) -> None:
    """The new name too survives a loss of power, where the file system can do that; the file has its place already."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
