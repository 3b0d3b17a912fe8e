"""Files and folders that are written whole or not at all.

A file goes to a temporary name beside its place, is flushed to the disk and renamed over the old one. A
folder is filled under a temporary name and renamed into place. A kill at any instant leaves the old or
the new state, and at most a `.partial-` name that the next writer removes.

source  tests/test_kill.py kills a writer at every write, fsync and rename
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import Failure

PARTIAL = ".partial-"  # prefix of what is being written
OLD = ".old-"  # prefix of a folder that its successor has replaced
CHUNK = 1 << 20  # bytes per write
os.umask(UMASK := os.umask(0))
NEW_FILE = 0o666 & ~UMASK  # the permissions of a new file


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace the file `path` by `data`, whole or not at all.

    raises  Failure if the disk is full or the folder cannot be written
    """
    path = Path(path)
    temporary = path.with_name(PARTIAL + path.name)
    with explain(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[os.write(file.fileno(), view[:CHUNK]) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Replace the file `path` by `text` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Replace the file `path` by `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path | str, line: str) -> None:
    """Append one line in a single write, so that a kill leaves at most an unfinished last line.

    raises  Failure if the disk is full; no half of the line stays then
    """
    data = (line + "\n").encode()
    with explain(Path(path)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, data) < len(data):  # where the last bytes of a disk are taken
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """Fill a folder under a temporary name; on success it takes the place of `path`.

    An existing folder is moved aside first. Between the two renames neither stands under its name:
    `finish_folder(path)`, which readers call, completes the exchange after a kill.

    raises  Failure if the disk is full or the folder cannot be written; `path` is then as it was
    """
    path = Path(path)
    partial = path.with_name(PARTIAL + path.name)
    old = path.with_name(OLD + path.name)
    with explain(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        finish_folder(path)
        partial.mkdir()
        try:
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    os.chmod(
                        Path(folder) / name, NEW_FILE
                    )  # some libraries write files that only we may read
                    sync_file(Path(folder) / name)
                sync_folder(Path(folder))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def finish_folder(path: Path | str) -> None:
    """Complete or undo what a killed `whole_folder(path)` left behind."""
    path = Path(path)
    partial = path.with_name(PARTIAL + path.name)
    old = path.with_name(OLD + path.name)
    if old.exists() and not path.exists():
        # The old folder is moved aside only once the new one is whole, so the new one can be trusted.
        os.rename(partial if partial.exists() else old, path)
        sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def remove_folder(path: Path | str) -> None:
    """Remove a folder at once: a kill meanwhile leaves no half of it under its name."""
    path = Path(path)
    partial = path.with_name(PARTIAL + path.name)
    with explain(path):
        shutil.rmtree(partial, ignore_errors=True)
        os.rename(path, partial)
        shutil.rmtree(partial, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, where the system can."""
    if os.name == "posix":
        sync_file(path)


def digest(*parts: bytes | str) -> str:
    """The sha256 of the parts, with their lengths, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def file_digest(path: Path | str) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_digest(rows: Iterable[Any]) -> str:
    """What tells one set of examples from another, in their order; each as plain values."""
    return "sha256:" + digest(*(json.dumps(row) for row in rows))[:16]


@contextmanager
def explain(path: Path) -> Iterator[None]:
    """Say a full disk or a forbidden folder in the user's words."""
    try:
        yield
    except OSError as error:
        path = Path(*(part.removeprefix(PARTIAL) for part in path.parts))  # the name it would have had
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failure(
                f"the disk is full: {path} was not written",
                hint="free some space and try again; what had been written before is unharmed",
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise Failure(
                f"{path} cannot be written: a part of this path is a file", hint="choose another place"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Failure(
                f"no permission to write {path}",
                hint="choose another place with -o, or change its permissions",
            ) from error
        raise
