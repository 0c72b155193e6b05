"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcinfer.errors import FileError


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """Yields a temporary file's path beside `path`; at the end it is on disk and takes its place, in one step.

    private: readable by its owner alone, whatever the umask; else a file that was there keeps its permissions. Raises
    FileError where that cannot be; `path` is then as it was, and so it is after an exception within.
    """
    temporary, mode = _temporary(path, private)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as e:
        raise FileError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


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


def check_writable(path: Path) -> None:
    """Raise FileError where `replacing` could not begin; for before long work."""
    _temporary(path, private=True)[0].unlink()


def _temporary(path: Path, private: bool) -> tuple[Path, int]:
    """An empty file beside `path`, and the permissions that it gets at the end."""
    try:
        mode = _mode(path, private)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tcinfer-", suffix=".part")
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise FileError(f"{path}: cannot be written: {getattr(e, 'strerror', None) or e}") from None
    os.close(handle)
    return Path(name), mode


def _mode(path: Path, private: bool) -> int:
    """The permissions that the new file gets. Raises FileError where `path` is something that is no file."""
    if "\0" in str(path):
        raise ValueError("a name cannot hold a NUL")
    if os.path.lexists(path) and not os.path.islink(path):  # a link itself is replaced
        found = os.stat(path).st_mode
        if not stat.S_ISREG(found):
            raise FileError(f"{path}: cannot be written: it is no regular file")
        if not private:
            return stat.S_IMODE(found)
    if private:
        return 0o600
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """The new name too survives a loss of power (where folders can be opened at all)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
