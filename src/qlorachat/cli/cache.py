"""`qlorachat cache`: what we keep in the user's cache, listed or cleared."""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field
from pydantic_settings import CliPositionalArg

from qlorachat.cli.settings import CommandSettings, parse
from qlorachat.errors import QlorachatError
from qlorachat.user_cache import Kind, cache_root, kept_files

MEANING: dict[Kind, str] = {
    "models": "converted models; made again when next used",
    "kernels": "CUDA kernels compiled for a card; made again when next used",
    "tuned": "what `qlorachat tune` measured; made again by that command alone",
}


class CacheSettings(CommandSettings):
    """List or clear what qlorachat keeps on disk; the hub's own cache is not touched."""

    action: CliPositionalArg[Literal["list", "clear"]] = Field("list", description="list or clear")
    kind: CliPositionalArg[Literal["all", Kind]] = Field(
        "all", description=f"{', '.join(MEANING)} or all"
    )


def cache(arguments: Sequence[str]) -> None:
    """Run `qlorachat cache`; QlorachatError when the disk does not allow it."""
    settings = parse(CacheSettings, arguments, command="cache")
    kinds: tuple[Kind, ...] = get_args(Kind) if settings.kind == "all" else (settings.kind,)
    try:
        kept = {kind: kept_files(kind) for kind in kinds}
        if settings.action == "clear":
            for kind in reversed(kinds):  # models last, since they may be in use
                _clear(kind, kept[kind])
    except OSError as error:
        done = "cleared" if settings.action == "clear" else "read"
        raise QlorachatError(
            f"The cache folder {cache_root()} can't be {done} ({error}): correct that, or set "
            "QLORACHAT_CACHE to another folder."
        ) from error
    if not any(kept.values()):
        named = "" if settings.kind == "all" else f"{settings.kind}: "
        print(f"{named}nothing is kept in {cache_root()}", file=sys.stderr)
    elif settings.action == "list":
        if settings.kind == "all":
            _list_kinds(kept)
        else:
            _list_entries(cache_root() / settings.kind, kept[settings.kind])


def _clear(kind: Kind, files: Mapping[Path, int]) -> None:
    if kind == "models":
        from qlorachat.checkpoints import clear

        clear()
    else:
        for path in files:
            path.unlink(missing_ok=True)
    if files:
        print(f"cleared {kind}: {_count(files)}, {_size(files.values())}", file=sys.stderr)


def _list_kinds(kept: Mapping[Kind, Mapping[Path, int]]) -> None:
    for kind, files in kept.items():
        print(f"{kind:<8} {_count(files):>10} {_size(files.values()):>11}  {MEANING[kind]}")
    total = [size for files in kept.values() for size in files.values()]
    print(f"{_size(total)} in {cache_root()}", file=sys.stderr)


def _list_entries(folder: Path, files: Mapping[Path, int]) -> None:
    """One line a model, which is a folder, or a file of another kind."""
    entries: dict[Path, list[int]] = {}
    for path, size in files.items():
        entries.setdefault(folder / path.relative_to(folder).parts[0], []).append(size)
    for entry, sizes in sorted(entries.items()):
        print(f"{_count(sizes):>10} {_size(sizes):>11}  {entry}")
    print(f"{_size(files.values())} in {folder}", file=sys.stderr)


def _count(files: Collection[object]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"


def _size(sizes: Collection[int]) -> str:
    total = sum(sizes)
    return f"{total / 1e6:.1f} MB" if total >= 1e5 else f"{total / 1e3:.1f} kB"
