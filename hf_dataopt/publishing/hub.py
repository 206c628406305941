"""The Hub: repositories checked before they are read, calls tried again, errors that say what to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..errors import HubError
from ..settings import check_flag, check_kind, check_text, optional
from .names import looks_like_repo
from .safe_files import CARD, SAFE, check_names, read_card

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


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
) -> Path:
    """Files of a Hub repository in the Hub client's cache: plain names only, and no pickles.

    Args:
        repo_id: Hub name.
        repo_type: `"model"` or `"dataset"`; None takes the one that is there, models first.
        revision, token: of the Hub.
        only: patterns of names; default all that are no pickles.

    Returns:
        The folder.

    Raises:
        ValueError: no Hub name, or a repository with file names that are refused.
        HubError: it cannot be read.
    """
    from huggingface_hub import HfApi, snapshot_download

    if not looks_like_repo(repo_id):
        raise ValueError(f"{repo_id!r:.200} is neither a folder nor a Hub name such as me/name")
    api = HfApi(token=token)
    with hub_errors(f"reading {repo_id}"):
        if repo_type is None:
            repo_type = "model" if api.repo_exists(repo_id, repo_type="model") else "dataset"
        info: Any = patiently(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision))
        check_names([one.rfilename for one in info.siblings or []], f"the repository {repo_id}")
        patterns = list(only) or [f"*{suffix}" for suffix in SAFE]
        return Path(
            snapshot_download(
                repo_id, repo_type=repo_type, revision=info.sha or revision, token=token, allow_patterns=patterns
            )
        )


def listing(
    repo_id: str, repo_type: str, *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, int]:
    """Names and bytes of a repository's files; nothing is downloaded.

    Raises:
        HubError: it cannot be read.
    """
    from huggingface_hub import HfApi, RepoFile

    with hub_errors(f"reading {repo_id}"):
        tree = HfApi(token=token).list_repo_tree(repo_id, repo_type=repo_type, revision=revision, recursive=True)
        return {one.path: one.size for one in tree if isinstance(one, RepoFile)}


def licence_of(repo_id: str, repo_type: str, *, token: str | bool | None = None) -> str | None:
    """The licence in a Hub repository's card; None where there is none to be found, never a default."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        found = read_card(Path(hf_hub_download(repo_id, CARD, repo_type=repo_type, token=token)))[0].get("license")
    except (RepositoryNotFoundError, EntryNotFoundError, ValueError, OSError) as error:
        logger.info("no licence found for %s: %s", repo_id, error)
        return None
    return found if isinstance(found, str) else None


def patiently(call: Callable[[], _Result], tries: int = 4) -> _Result:
    """A call again after a server error; the Hub's client does so for uploads, but for none of these."""
    from huggingface_hub.errors import HfHubHTTPError

    for left in reversed(range(tries)):
        try:
            return call()
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if left == 0 or status < 500:
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
            raise HubError(f"{doing} failed: {error}") from error
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
        raise HubError(f"{doing} failed with status {status}: {hints.get(status or 0, str(error))}") from error
    except Exception as error:
        # the client's transport errors differ from version to version; whatever they are, the commit was not made
        raise HubError(
            f"{doing} failed ({type(error).__name__}: {error}); check the connection and try again"
        ) from error
