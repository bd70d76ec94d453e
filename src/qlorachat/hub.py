"""The model hub: one way to bring a repository to disk, one clear line for each failure."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from qlorachat.errors import HubError

# seconds; the hub's own client would wait for the operating system's, minutes behind a firewall
PROBE_TIMEOUT = 5.0

_log = logging.getLogger(__name__)


def download(
    repository: str, *, revision: str | None, offline: bool, patterns: Sequence[str]
) -> Path:
    """The folder of a repository's files that match `patterns`, brought from the hub where needed.

    `revision` is a branch, tag or commit. With `offline` (or HF_HUB_OFFLINE) nothing but the hub's
    cache on disk is read. A hub that cannot be reached is not fatal when the cache holds all the
    files: that is logged as a warning. Raises HubError.
    """
    what = f"`{repository}`" + (f" at revision `{revision}`" if revision else "")
    if offline or is_offline_mode():
        missing = (
            f"{what} is not fully on disk and the hub is not asked (--offline or HF_HUB_OFFLINE): "
            "run once without it, or give a local folder."
        )
        return _fetch(repository, revision, patterns, local=True, missing=missing)
    if reason := why_unreachable(repository, revision=revision):
        _log.warning("The model hub cannot be reached (%s): looking on disk.", reason)
        missing = (
            f"The model hub cannot be reached ({reason}) and {what} is not on disk: check the "
            "connection or proxy, or give a local folder; what was downloaded before also works "
            "with --offline (HF_HUB_OFFLINE=1)."
        )
        return _fetch(repository, revision, patterns, local=True, missing=missing)
    broken = f"The download of {what} broke off: run the same again, what has come is kept."
    return _fetch(repository, revision, patterns, local=False, missing=broken)


def why_unreachable(
    repository: str, *, revision: str | None = None, dataset: bool = False
) -> str | None:
    """Why the hub cannot be reached, or None; a repository that it does not give is a HubError."""
    ask = HfApi().dataset_info if dataset else HfApi().model_info
    with _explained(repository, revision):
        try:
            ask(repository, revision=revision, timeout=PROBE_TIMEOUT)
        except HfHubHTTPError as error:
            if error.response.status_code >= 500:
                return f"it answers {error.response.status_code}"
            raise
        except (TransportError, OSError) as error:
            return str(error) or type(error).__name__
    return None


def _fetch(
    repository: str, revision: str | None, patterns: Sequence[str], *, local: bool, missing: str
) -> Path:
    """Download, or with `local` read the cache; `missing` is said when files are not there."""
    with _explained(repository, revision), _progress_on_terminals():
        try:
            folder = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=local,
            )
        except HfHubHTTPError:
            raise
        except (LocalEntryNotFoundError, TransportError) as error:
            raise HubError(missing) from error
    return Path(folder)


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turns the hub's refusals into one HubError each."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(
            f"`{repository}` is neither a folder here nor a repository id such as `owner/name`."
        ) from error
    except GatedRepoError as error:
        raise HubError(
            f"`{repository}` is gated: accept its licence on its model page, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"`{repository}` has no revision `{revision}`: give one of its branches, tags or "
            "commits, or leave it out."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"There is no folder `{repository}` here and no such repository on the hub: check the "
            "name; a private one needs `hf auth login` or HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        raise HubError(
            f"The model hub refused `{repository}` (status {error.response.status_code}): check "
            "HF_TOKEN or `hf auth login`, and try again later."
        ) from error


@contextmanager
def _progress_on_terminals() -> Iterator[None]:
    """No progress bars where stderr is a file or a pipe."""
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
