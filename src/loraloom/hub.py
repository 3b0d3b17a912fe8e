"""From what the user calls a model to a folder on this disk: a path, a Hugging Face id, or the small model.

Downloads go through huggingface_hub alone, so its variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE ...)
hold, and weights land in its cache, where every other tool finds them. Offline means that no request is made.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from . import files
from .errors import Failure, UserError
from .model_files import find_weights, gguf_given, has_tokenizer
from .small_model import NAMES, small_model

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "README.md")
NetworkError: type[Exception] = HfHubHTTPError.__bases__[
    0
]  # of httpx or httpx2, whichever this huggingface_hub uses
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Resolved:
    """Where a model is: `id` is what to write into files that travel, `commit` the hub's exact version."""

    path: Path
    kind: Literal["folder", "hub", "small"]
    id: str
    commit: str | None = None


def resolve(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    progress: bool = True,
) -> Resolved:
    """Find a model by a folder, a Hugging Face id or the small model's name; fetch it if it must be fetched.

    raises  UserError if there is no such model, or it is not here and cannot be fetched
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision is for Hugging Face ids, and {name} is a folder",
                hint="leave the revision out",
            )
        return Resolved(path, "folder", name)
    if path.is_file():
        if path.suffix == ".gguf":
            raise gguf_given(path)
        raise UserError(
            f"{name} is a file", hint="give the folder of a model, with config.json and the weights"
        )
    if name.lower() in NAMES:
        known = name.lower()
        return Resolved(small_model(known, offline=offline, progress=progress), "small", known)
    check_id(name)
    found = download(name, revision=revision, offline=offline, allow_pickle=allow_pickle, progress=progress)
    return Resolved(found, "hub", name, commit_of(found))


def check_id(name: str) -> None:
    """raises  UserError if the name is a path without a folder, or cannot be an id"""
    path = Path(name)
    local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")
    if local or (str(path.parent) != "." and path.parent.is_dir()):
        raise UserError(
            f"the folder {name} does not exist",
            hint="check the spelling; a Hugging Face id has the form owner/name",
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is neither a folder nor a possible Hugging Face id",
            hint="an id has the form owner/name, of letters, digits, '-', '_' and '.'",
        ) from error


def commit_of(snapshot: Path) -> str | None:
    """The commit in a snapshot's path; None for a copy in a folder of its own."""
    return snapshot.name if COMMIT.fullmatch(snapshot.name) else None


def is_offline(offline: bool) -> bool:
    """Offline by our argument, or by HF_HUB_OFFLINE, which huggingface_hub reads when it is imported."""
    return offline or bool(constants.is_offline_mode())


def download(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    local_dir: str | Path | None = None,
    allow_pickle: bool = False,
    endpoint: str | None = None,
    progress: bool = True,
) -> Path:
    """Fetch what is needed of a model, or find it in the cache. Returns its folder.

    .bin weights are fetched only if there are no safetensors and `allow_pickle` is set.
    raises  UserError or Failure in words: not found, gated, no network, not in the cache
    """
    offline = is_offline(offline)
    with explain(name, revision):
        if offline and local_dir is not None:
            raise UserError(
                f"offline, so nothing can be fetched into {local_dir}", hint="leave out --local-dir"
            )
        if offline or (revision and COMMIT.fullmatch(revision) and local_dir is None):
            found = cached(name, revision, allow_pickle)
            if found is not None and not (missing := incomplete(found, allow_pickle)):
                return found
            if offline:
                raise not_cached(name, found, missing if found else "")
        api = HfApi(endpoint=endpoint)
        info = api.model_info(name, revision=revision)
        wanted = choose(name, [item.rfilename for item in info.siblings or []], allow_pickle)
        with bars(progress):
            folder = snapshot_download(
                name, revision=revision, local_dir=local_dir, allow_patterns=wanted, endpoint=endpoint
            )
    return Path(folder)


def cached(name: str, revision: str | None, allow_pickle: bool) -> Path | None:
    """The snapshot in the cache, which may lack files, without a request; None if there is none."""
    patterns = [*SMALL_FILES, "*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(
            snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns)
        )
    except LocalEntryNotFoundError as error:  # newer versions say here where an unfinished snapshot lies
        found = getattr(error, "snapshot_path", None)
        return Path(found) if found else None


def incomplete(folder: Path, allow_pickle: bool) -> str:
    """What a cached model lacks, in words; empty if it is whole."""
    if not (folder / "config.json").exists():
        return "config.json"
    try:
        kind = find_weights(folder).kind
    except UserError as error:
        return ", ".join(error.details) or error.message
    if kind not in ("safetensors", "bin") or (kind == "bin" and not allow_pickle):
        return "the weights (model.safetensors)"
    return "" if has_tokenizer(folder) else "the tokenizer (tokenizer.json)"


def not_cached(name: str, folder: Path | None, missing: str) -> UserError:
    what = f"{missing} of {name} is" if folder else f"the model {name} is"
    return UserError(
        f"offline, and {what} not in the cache {constants.HF_HUB_CACHE}",
        hint=f"once, with a network and without --offline or HF_HUB_OFFLINE: loraloom download {name}",
    )


def choose(name: str, listed: list[str], allow_pickle: bool) -> list[str]:
    """Which of a repository's files to fetch.

    raises  UserError if it holds no weights that we may read
    """
    top = [item for item in listed if "/" not in item]
    small = [item for item in top if any(fnmatch(item, pattern) for pattern in SMALL_FILES)]
    small = [item for item in small if not item.endswith(".bin.index.json")]
    if weights := [item for item in top if fnmatch(item, "model*.safetensors")]:
        return small + weights
    if "adapter_config.json" in top and "config.json" not in top:
        raise UserError(
            f"{name} is an adapter, not a model",
            hint="give its base as the model (base_model_name_or_path in its adapter_config.json)",
        )
    if weights := [item for item in top if fnmatch(item, "pytorch_model*.bin")]:
        if not allow_pickle:
            raise UserError(
                f"{name} has its weights only as .bin files, which are programs that could do anything when read",
                hint="if you trust its owner: model.allow_pickle=true",
            )
        return small + weights + [item for item in top if item.endswith(".bin.index.json")]
    if weights := [item for item in listed if item.endswith(".gguf")]:
        raise UserError(
            f"{name} holds GGUF files only, which cannot be trained on directly",
            details=weights[:8],
            hint="take the original model; or fetch one of the files and convert it: loraloom convert FILE DST",
        )
    raise UserError(
        f"{name} holds no model weights", details=[f"it holds: {', '.join(listed[:8]) or 'nothing'}"]
    )


@contextmanager
def bars(show: bool) -> Iterator[None]:
    """huggingface_hub's own progress bars (on stderr), or none."""
    if are_progress_bars_disabled() or (show and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def explain(name: str, revision: str | None) -> Iterator[None]:
    """Say the hub's errors in the user's words."""
    place = constants.ENDPOINT
    try:
        with files.explain(Path(constants.HF_HUB_CACHE)):
            yield
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: its owner asks you to accept conditions first",
            hint=f"accept them at {place}/{name}, then log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no revision {revision!r}", hint=f"see its branches and tags at {place}/{name}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no model {name} on the hub, and no folder of that name here",
            hint="check the spelling; if the model is private, log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except OfflineModeIsEnabled as error:
        raise not_cached(name, None, "") from error
    except HfHubHTTPError as error:
        raise http_error(name, place, error) from error
    except (NetworkError, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise Failure(
            f"no connection to {place}: {first_line(error)}",
            hint="check the network, the proxy and HF_ENDPOINT; --offline uses only what is in the cache",
        ) from error


def http_error(name: str, place: str, error: HfHubHTTPError) -> UserError:
    """An answer of the hub with an error code."""
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403):
        return UserError(
            f"the hub refused access to {name} ({status})",
            hint="the token is wrong, expired or lacks rights: log in with `hf auth login`, or renew HF_TOKEN",
        )
    if status == 429:
        return Failure(
            f"{place} asks to slow down (429)", hint="wait some minutes, or log in for a higher limit"
        )
    return Failure(f"{place} answered with an error for {name}: {first_line(error)}", hint="try again later")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
