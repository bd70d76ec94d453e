"""Files and folders that are on disk whole or not at all, whatever kills us meanwhile."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, mkdtemp

UNFINISHED = ".tmp-"  # in the name of what a kill may leave behind


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill; at the end of `with` it is synced and takes the name `target`.

    An error inside leaves nothing. With `replace`, a folder of that name gives way once the new
    one is whole; after a kill at that moment `sweep` brings it back. Raises OSError.
    """
    folder = Path(mkdtemp(prefix=f"{target.name}{UNFINISHED}", dir=target.parent))
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _share(path)
            sync(path)
        if replace and target.exists():
            old = Path(mkdtemp(prefix=f"{target.name}{UNFINISHED}", dir=target.parent))
            target.rename(old / target.name)
            try:
                folder.rename(target)
            except BaseException:
                (old / target.name).rename(target)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            folder.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, that is there whole or as it was before. Raises OSError."""
    with NamedTemporaryFile(
        dir=path.parent,
        prefix=f"{path.name}{UNFINISHED}",
        delete=False,
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows renames no open file
            _share(temporary)
            temporary.replace(path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def _share(path: Path) -> None:
    """Allow what the process allows new files: mkdtemp and safetensors allow their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove from `folder` what killed writers of the targets called `name` (a glob) left there.

    A folder that had given way and whose successor never came is brought back. Raises OSError.
    """
    for path in folder.glob(f"{name}{UNFINISHED}*"):
        if path.is_dir():
            target = path.with_name(path.name.rpartition(UNFINISHED)[0])
            old = path / target.name
            if old.is_dir() and not target.exists():
                old.rename(target)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk; Windows opens no folders and needs no such wait."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
