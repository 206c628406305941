"""The Hub: repositories checked before they are read, calls tried again, errors that say what to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from ..errors import HubError
from ..progress import told
from ..settings import check_flag, check_kind, check_text, optional
from .names import looks_like_repo
from .safe_files import CARD, MAX_CARD, SAFE, check_names, read_card

logger = logging.getLogger(__name__)

# of a download: an artifact of ours is a set of images, an adapter, or a context's keys and values
MOST_BYTES = 64 * 2**30

_Result = TypeVar("_Result")
# of the client's transport, whose library differs from version to version (httpx, httpx2)
_BROKEN_OFF = {"ReadError", "WriteError", "CloseError", "RemoteProtocolError"}


class PushOptions(TypedDict, total=False):
    """How an artifact is uploaded: `private`, looked at where the repository is made; `revision`, a branch, made if missing;
    `token`, default the one you logged in with; `create_pr`, a pull request instead; `commit_message`."""

    private: bool | None
    revision: str | None
    token: str | bool | None
    create_pr: bool
    commit_message: str | None


class HubOptions(TypedDict, total=False):
    """Where something is read from on the Hub: `revision`, a branch, tag or commit; `token`."""

    revision: str | None
    token: str | bool | None


def check_hub(*, revision: Any = None, token: Any = None) -> None:
    """Refuse what no Hub call takes, before one is made."""
    optional(check_text, "revision", revision, empty=False)
    if token is not None:
        check_kind("token", token, (str, bool), "give a token, True for the one you logged in with, or None")
        if isinstance(token, str) and not (token.isascii() and token.isprintable() and token.strip()):
            raise ValueError(
                "token is no token of the Hub: it is empty or holds signs that none has; get one with hf auth login"
            )


def check_push(
    repo_id: Any,
    *,
    private: Any = None,
    revision: Any = None,
    token: Any = None,
    create_pr: Any = False,
    commit_message: Any = None,
) -> None:
    """Refuse the arguments of a push that cannot be right, before anything is saved or sent."""
    if not looks_like_repo(check_text("repo_id", repo_id)):
        raise ValueError(f"{repo_id!r:.200} is no Hub name; give one such as me/name")
    check_hub(revision=revision, token=token)
    optional(check_flag, "private", private)
    check_flag("create_pr", create_pr)
    optional(check_text, "commit_message", commit_message, empty=False)


def download(
    repo_id: str,
    repo_type: str | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    only: tuple[str, ...] = (),
    most: int = MOST_BYTES,
) -> Path:
    """Files of a Hub repository in the Hub client's cache: plain names only, and no pickles.

    Args:
        repo_id: Hub name.
        repo_type: `"model"` or `"dataset"`; None takes the one that is there, models first.
        revision, token: of the Hub.
        only: patterns of names; default all that are no pickles.
        most: bytes that are downloaded; what the repository says of its files is asked first.

    Returns:
        The folder.

    Raises:
        ValueError: no Hub name, or a repository with file names that are refused, or with more bytes than `most`.
        HubError: it cannot be read; offline (`HF_HUB_OFFLINE=1`), it is not in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # exported, without saying so

    if not looks_like_repo(repo_id):
        raise ValueError(f"{repo_id!r:.200} is neither a folder nor a Hub name such as me/name")
    if offline():
        return cached(repo_id, repo_type, revision=revision)
    api = HfApi(token=token)
    with hub_errors(f"reading {repo_id}"):
        if repo_type is None:
            found = patiently(lambda: api.repo_exists(repo_id, repo_type="model"))
            repo_type = "model" if found else "dataset"
        info: Any = patiently(
            lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision, files_metadata=True)
        )
        check_names([one.rfilename for one in info.siblings or []], f"the repository {repo_id}")
        patterns = list(only) or [f"*{suffix}" for suffix in SAFE]
        wanted = filter_repo_objects(info.siblings or [], allow_patterns=patterns, key=lambda one: one.rfilename)
        total = sum(one.size or 0 for one in wanted)
        if total > most:
            raise ValueError(
                f"the repository {repo_id} holds {total:,} bytes to download, at most {most:,} are taken unasked; if you want "
                "them, run `hf download` and name the folder"
            )
        return Path(
            snapshot_download(
                repo_id, repo_type=repo_type, revision=info.sha or revision, token=token, allow_patterns=patterns
            )
        )


def offline() -> bool:
    """Whether the Hub's client was told to make no calls (`HF_HUB_OFFLINE=1`)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached(repo_id: str, repo_type: str | None, *, revision: str | None = None) -> Path:
    """The newest that earlier downloads have left in the Hub client's cache: their commits, branches do not stay there.

    Raises:
        HubError: nothing of it.
    """
    from huggingface_hub import CacheNotFound, scan_cache_dir

    kinds = [repo_type] if repo_type else ["model", "dataset"]
    try:
        repos = [one for one in scan_cache_dir().repos if one.repo_id == repo_id and one.repo_type in kinds]
    except CacheNotFound:
        repos = []
    found = [one for repo in repos for one in repo.revisions if revision in (None, one.commit_hash, *one.refs)]
    if found:
        return max(found, key=lambda one: one.last_modified).snapshot_path
    at = f" at {revision}" if revision else ""
    raise HubError(
        f"reading {repo_id} failed: HF_HUB_OFFLINE is set, and the Hub's cache does not hold it{at}; unset that to "
        "download it, or name a folder"
    )


def listing(
    repo_id: str, repo_type: str, *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, int]:
    """Names and bytes of a repository's files; nothing is downloaded.

    Raises:
        HubError: it cannot be read.
    """
    from huggingface_hub import HfApi, RepoFile

    api = HfApi(token=token)
    with hub_errors(f"reading {repo_id}"):
        tree = patiently(
            lambda: list(api.list_repo_tree(repo_id, repo_type=repo_type, revision=revision, recursive=True))
        )
        return {one.path: one.size for one in tree if isinstance(one, RepoFile)}


def licence_of(repo_id: str, repo_type: str, *, token: str | bool | None = None) -> str | None:
    """The licence in a Hub repository's card; None where there is none to be found, never a default."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        sizes = patiently(lambda: HfApi(token=token).get_paths_info(repo_id, CARD, repo_type=repo_type))
        if sum(getattr(one, "size", 0) for one in sizes) > MAX_CARD:
            raise ValueError(f"its card is larger than {MAX_CARD:,} bytes")
        card = patiently(lambda: hf_hub_download(repo_id, CARD, repo_type=repo_type, token=token))
        found = read_card(Path(card))[0].get("license")
    except (RepositoryNotFoundError, EntryNotFoundError, ValueError, OSError) as error:
        logger.info("no licence found for %s: %s", repo_id, error)
        return None
    return found if isinstance(found, str) else None


def patiently(call: Callable[[], _Result], tries: int = 4) -> _Result:
    """A call again after a server error or a connection that broke off; the Hub's client does so for uploads only."""
    from huggingface_hub.errors import HfHubHTTPError

    for left in reversed(range(tries)):
        try:
            return call()
        except Exception as error:
            status = getattr(error.response, "status_code", 0) if isinstance(error, HfHubHTTPError) else 0
            broken_off = {type(error).__name__, type(error.__cause__).__name__} & _BROKEN_OFF
            if left == 0 or (status < 500 and not broken_off):
                raise
            time.sleep(2.0 ** (tries - left - 1))
    raise RuntimeError("unreachable")


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Say what failed and what to do, whatever library below raised it."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (ValueError, HubError) as error:
        if isinstance(error, HfHubHTTPError):
            raise HubError(f"{doing} failed: {told(error, 400)}") from error
        raise
    except RepositoryNotFoundError as error:
        hint = "no such repository, or a private one that your token does not see; check the name, then `hf auth login`"
        raise HubError(f"{doing} failed: {hint}") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{doing} failed: no such revision; name a branch, tag or commit that exists") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hints = {
            401: "the token was refused; `hf auth login`, or pass token=...",
            403: "the token may not write there; use one with write access",
            412: "somebody else committed in the meantime; push again",
        }
        raise HubError(f"{doing} failed with status {status}: {hints.get(status or 0, told(error, 400))}") from error
    except Exception as error:
        # the client's transport errors differ from version to version; whatever they are, the commit was not made
        raise HubError(
            f"{doing} failed ({type(error).__name__}: {told(error, 400)}); check the connection and try again"
        ) from error
