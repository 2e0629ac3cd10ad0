"""Files that appear whole or not at all: written under another name, looked at, and only then given theirs.

What is written is read back before it takes the place of what was there, since a library may swallow the error of a
full disk. While something is being made it has a name like `.3f9a01c2.partial`, and a lock that the system releases
when its process dies: by that lock, not by a process number that may be another's by now, the next run tells what a
killed one has left from what somebody is still at.
"""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from utils import UsageError, uninterrupted

_PARTIAL = re.compile(r"\.[0-9a-f]{8}\.partial")
LARGEST_JSON = 2**24  # bytes, 20 times as many in memory; those of a training of 1000 epochs have some 100 000
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # what file systems say then


def is_file_name(name: Any) -> bool:
    """Whether it names a file of the folder where it is used, and no other place; with room for an ending."""
    if not isinstance(name, str) or not name or name != Path(name).name or name == ".." or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= 240
    except UnicodeEncodeError:  # half a character, of JSON say
        return False


# --------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on failure.

    A reader, or a machine that lost power, so sees the old file or the new one, never half of one. The caller writes
    the file and, if it cannot be sure that the writing told every error, looks at it, before the block ends: `write`
    does both for what fits into memory.

    Raises:
        OSError: as the block does; with the name of the file, if it has none, or that of the temporary one.
    """
    path = Path(path)
    try:
        with _held(path.parent, _create_file) as (temporary, number):
            yield temporary
            _sync(number)
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        name = error.filename
        if error.errno is not None and (name is None or _PARTIAL.fullmatch(os.path.basename(str(name)))):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a stream into a new file, which appears whole or not at all: see `atomic_path`.

    What is written is read back at once, and compared. An error is kept until the end: there are libraries that
    swallow one, or do not survive it.
    """
    with atomic_path(path) as temporary, _Checked(temporary, "r+b") as stream:
        try:
            yield stream
        finally:
            if stream.error is not None:
                raise stream.error


class _Checked(io.FileIO):
    error = None  # the first; nothing is written any more after it

    @contextlib.contextmanager
    def _kept(self):
        try:
            yield
        except BaseException as error:  # a signal's, too
            self.error = self.error or error

    def write(self, data):
        view, start = memoryview(data).cast("B"), self.tell()
        with self._kept():
            for block in range(0, len(view), _BLOCK):
                if self.error is None:
                    self._write(view[block : block + _BLOCK], start + block)
        self.seek(start + len(view))
        return len(view)

    def _write(self, view, start):
        written = 0
        while written < len(view):
            written += os.pwrite(self.fileno(), view[written:], start + written)
        if os.pread(self.fileno(), len(view), start) != view.tobytes():
            raise OSError(errno.EIO, "what was written is not what is there")

    def truncate(self, size=None):
        with self._kept():
            super().truncate(size)
        return size


_BLOCK = 2**18  # bytes: of larger ones, the memory comes from the system each time, and costs more than the rest


def write(path: str | Path, *parts: bytes | memoryview, former: Path | None = None) -> None:
    """Write a file whole, of parts one after the other: see `atomic_path`.

    Args:
        former: name that the file which is replaced gets, if there is one: at every moment `path` is there and whole
    """
    with writing(path) as stream:
        for part in parts:
            stream.write(part)
        if former and stream.error is None and os.path.exists(path):
            _keep(path, former)


def _keep(path, former):
    former.unlink(missing_ok=True)
    try:
        os.link(path, former)
    except OSError:  # a file system without hard links
        with atomic_path(former) as temporary:
            shutil.copyfile(path, temporary)


def write_json(path: str | Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=4, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, deleted at the end with what is still in it; it may be renamed before."""
    with _held(Path(parent), os.mkdir) as (folder, _):
        yield folder


def writable_folder(path: str | Path) -> Path:
    """Create a folder, and make sure now that files can be written to it, not after hours of work.

    What killed processes have left there is deleted.
    """
    try:
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        for leftover in list(path.glob(".*.partial")):
            if _PARTIAL.fullmatch(leftover.name):
                _delete_if_left(leftover)
        with _held(path, _create_file):
            pass
    except (OSError, ValueError, RuntimeError) as error:  # a name with a null byte; "~somebody" unknown
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write to the output folder {path}: {reason}") from None
    return path


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is within such a block for the same folder: they are short."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


@contextlib.contextmanager
def claimed(path: str | Path, what: str) -> Iterator[None]:
    """Keep other processes from what a path stands for, until the block, or this process, ends.

    Where the file system has no locks, nobody is kept from it.

    Args:
        path: of a lock file, which is deleted at the end
        what: would be done twice, for the message
    Raises:
        UsageError: another process, or another thread, has it.
    """
    path, number = Path(path), None
    try:
        while number is None:
            number = _lock(path, os.O_CREAT)
            if number is None and path.exists():  # else it was deleted meanwhile, by who had it
                raise UsageError(f"another process is {what}: wait for its end, or use another folder")
        yield
    finally:
        if number is not None:
            with uninterrupted():
                path.unlink(missing_ok=True)
                os.close(number)


def _create_file(path):
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


@contextlib.contextmanager
def _held(folder, create):
    """A new path in a folder, and the number of the open file, whose lock says that somebody is at it.

    At the end, what still has that path is deleted, and only then the lock released.
    """
    path = number = None
    try:
        while number is None:  # somebody who looks for leftovers may come between the two
            path = folder / f".{secrets.token_hex(4)}.partial"
            try:
                create(path)
            except FileExistsError:
                path = None
                continue
            number = _lock(path)
        yield path, number
    finally:
        with uninterrupted():
            if path is not None:
                _delete(path)
            if number is not None:
                os.close(number)


def _lock(path, flags=0, without=True):
    """Open a file or folder and lock it; None if somebody else has the lock, or has deleted or replaced it.

    Args:
        flags: more of os.open
        without: whether it counts as locked where the file system has no locks; else they raise OSError
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK  # no other place, and no waiting for a pipe's other end
    number = None
    try:
        try:
            number = os.open(path, flags | os.O_RDWR, 0o666)  # NFS locks only what is open for writing
        except IsADirectoryError:
            number = os.open(path, flags | os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS or not without:
                raise
        there, locked = os.stat(path, follow_symlinks=False), os.fstat(number)
        if (there.st_dev, there.st_ino) == (locked.st_dev, locked.st_ino):
            result, number = number, None
            return result
    except (BlockingIOError, FileNotFoundError):
        if flags & os.O_CREAT and number is None:  # it is the folder that is missing
            raise
    finally:
        if number is not None:
            os.close(number)
    return None


def _delete_if_left(path):
    with contextlib.suppress(OSError):  # another user's, or without locks: it stays
        number = _lock(path, without=False)
        if number is not None:
            _delete(path)
            os.close(number)


def _delete(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(number):
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not know it
            raise


def sync_folder(folder):
    try:
        number = os.open(folder, os.O_RDONLY)
    except PermissionError:  # one may write to it, but not list it
        return
    try:
        _sync(number)
    finally:
        os.close(number)


# --------------------------------------------------------------------------------------- reading


def read(path: str | Path, largest: int | None = None) -> bytes:
    """The content of a regular file: a device or a pipe might never end.

    Raises:
        OSError: it is not one, cannot be read, or has more than `largest` bytes.
    """
    with open_regular(path) as stream:
        if largest is None:
            return stream.read()
        if os.fstat(stream.fileno()).st_size <= largest:
            data = stream.read(largest + 1)
            if len(data) <= largest:
                return data
    raise OSError(errno.EFBIG, f"larger than the {largest} bytes that such a file can have", str(path))


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, and nothing else, to read it. Raises OSError."""
    return open(path, "rb", opener=_open_regular)


def _open_regular(path, flags):
    number = os.open(path, flags | os.O_NONBLOCK)  # else to open a pipe waits for its other end
    if os.path.isfile(number):
        return number
    is_folder = os.path.isdir(number)
    os.close(number)
    if is_folder:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; `UsageError` if it is missing or not JSON."""
    try:
        return json.loads(read(path, LARGEST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {path}: {reason}") from None
