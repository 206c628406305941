"""What we publish: folders with `hf_dataopt.json`, safetensors or parquet, and a card; saved, pushed, fetched, described.

Each room writes the files of its own kind and calls `finish`; `fetch` checks a folder or a Hub repository before the room
reads it; `push_folder` uploads a folder in one commit, so that a repository holds either all of an artifact or none of it.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from . import cards
from .artifact_kinds import KINDS, MODEL, PLACEHOLDER, usage
from .errors import HubError
from .safe_files import SAFE, check_names, check_safetensors, files_of, is_pickle, read_card, read_json

logger = logging.getLogger(__name__)

ABOUT, CARD = "hf_dataopt.json", "README.md"
FORMAT = 1
_PEFT_FORM = "[More Information Needed]"
_Result = TypeVar("_Result")
_REPO = re.compile(r"(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?", re.ASCII)


def finish(
    folder: Path,
    kind: str,
    *,
    about: Mapping[str, Any],
    metadata: Mapping[str, Any],
    code: Mapping[str, Any] | None = None,
    origin: tuple[str, str] | None = None,
    **card: Any,
) -> Path:
    """Write `hf_dataopt.json` and the card beside the files of an artifact.

    Args:
        folder: where those files are.
        kind: one of `KINDS`.
        about: facts for the JSON file.
        metadata: the card's YAML.
        code: values of the card's first code block.
        origin: (`"model"` or `"dataset"`, Hub name) of what the artifact was made from; a push inherits its licence.
        card: further values of the card's template.

    Returns:
        The folder.
    """
    record = {"format_version": FORMAT, "kind": kind, "hf_dataopt": _own_version(), "code": dict(code or {}), **about}
    if origin is not None and looks_like_repo(origin[1]):
        record["source"] = {"type": origin[0], "id": origin[1]}
    tags = ["hf-dataopt", kind.replace("_", "-"), *metadata.get("tags", [])]
    text = cards.render(
        kind, {**metadata, "tags": tags}, usage=cards.block(usage(kind, **(code or {})), "python"), **card
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    (folder / ABOUT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def read_about(folder: Path) -> dict[str, Any]:
    """`hf_dataopt.json` of a folder, checked.

    Raises:
        ValueError: none there, a newer format, or an unknown kind.
    """
    about = read_json(folder / ABOUT)
    found, number = about.get("kind"), about.get("format_version")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{folder / ABOUT} has format_version {number!r:.40}; it must be a number from 1")
    if number > FORMAT:
        raise ValueError(f"{folder} has format {number}, this version reads {FORMAT}; update hf_dataopt")
    if not isinstance(found, str) or found not in KINDS:
        raise ValueError(f"{folder} holds a {found!r:.80}, which this version does not know; update hf_dataopt")
    return about


def about_of(folder: Path) -> dict[str, Any]:
    """`read_about`, also for an adapter folder as PEFT itself writes it, without a record of ours.

    Raises:
        ValueError: no artifact of ours.
    """
    if not (folder / ABOUT).is_file() and (folder / "adapter_config.json").is_file():
        settings = read_json(folder / "adapter_config.json")
        if str(settings.get("peft_type")).startswith("CCM"):
            return {"format_version": FORMAT, "kind": "ccm_adapter", "code": adapter_code(settings)}
    return read_about(folder)


def adapter_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an adapter card's first code block, where no example was recorded."""
    base = settings.get("base_model_name_or_path")
    known = isinstance(base, str) and looks_like_repo(base)
    return {
        "model": base if known else MODEL,
        "dtype": "auto",
        "contexts": ["My cat is called Otto.", "He is grey."],
        "question": "What is my cat called?",
        "new_tokens": 16,
    }


def fetch(
    source: str | Path, kind: str, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Path, dict[str, Any]]:
    """A folder to read an artifact from: a local one as it is, or a Hub repository's files.

    Args:
        source: folder, or Hub name.
        kind: what it must be.
        revision: branch, tag or commit (Hub only).
        token: of the Hub.

    Returns:
        The folder, checked, and its `hf_dataopt.json`.

    Raises:
        ValueError: neither a folder nor a Hub name; names, links, sizes or headers that are refused; another kind.
        HubError: the repository cannot be read.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = download(str(source), KINDS[kind].repo_type, revision=revision, token=token)
    files = files_of(folder)
    about = about_of(folder)
    if about["kind"] != kind:
        raise ValueError(f"{folder} holds a {KINDS[about['kind']].title}, not a {KINDS[kind].title}; load it as that")
    for path in files:
        if path.suffix == ".safetensors":
            check_safetensors(path)
    missing = [name for name in KINDS[kind].needs if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; get the whole artifact again")
    if (folder / CARD).is_file():
        read_card(folder / CARD)
    return folder, about


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
    with _hub_errors(f"reading {repo_id}"):
        if repo_type is None:
            repo_type = "model" if api.repo_exists(repo_id, repo_type="model") else "dataset"
        info: Any = _patiently(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision))
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

    with _hub_errors(f"reading {repo_id}"):
        tree = HfApi(token=token).list_repo_tree(repo_id, repo_type=repo_type, revision=revision, recursive=True)
        return {one.path: one.size for one in tree if isinstance(one, RepoFile)}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload an artifact in one commit; it replaces what an earlier push of ours put there.

    Args:
        folder: written by one of our `save` functions.
        repo_id: Hub name; made if missing.
        private: only looked at when the repository is made.
        revision: branch, made if missing; default `main`.
        token: of the Hub; default the one you logged in with.
        create_pr: open a pull request instead.
        commit_message: default names the kind.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ValueError: the folder holds no artifact, or the name is no Hub name.
        HubError: the upload failed; nothing of it is in the repository (an empty new one may be left).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    if not looks_like_repo(repo_id):
        raise ValueError(f"{repo_id!r:.200} is no Hub name; give one such as me/name")
    about = about_of(folder)
    kind = KINDS[about["kind"]]
    fetch(folder, about["kind"])
    files = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    left_out = [name for name in files if is_pickle(name)]
    if left_out:
        logger.warning("not pushed, since they are pickles: %s", ", ".join(left_out))
    api = HfApi(token=token)
    name: dict[str, Any] = {"repo_id": repo_id, "repo_type": kind.repo_type}
    message = commit_message or f"Upload {kind.title}"
    with _hub_errors(f"pushing {folder} to {repo_id}"):
        _patiently(lambda: api.create_repo(**name, private=private, exist_ok=True))
        if revision is not None and not revision.startswith("refs/"):
            _patiently(lambda: api.create_branch(**name, branch=revision, exist_ok=True))
        before: Any = _patiently(lambda: api.repo_info(**name, revision=revision))
        contents: dict[str, Any] = {path: at for path, at in files.items() if path not in left_out}
        contents |= _records(folder, repo_id, about, token)
        # shards of an earlier push would be read as part of this data set
        stale = [one.rfilename for one in before.siblings or [] if one.rfilename not in contents]
        stale = [path for path in stale if path.startswith("data/") and path.endswith(".parquet")]

        def commit() -> Any:
            deletions = [CommitOperationDelete(path_in_repo=path) for path in stale]
            additions = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=what) for path, what in contents.items()]
            # with the parent named, a commit that was made although the server said 500 is not made twice
            return api.create_commit(
                **name,
                operations=[*deletions, *additions],
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=before.sha,
            )

        made = _patiently(commit, tries=1 if create_pr else 4)
    return made.pr_url or made.commit_url


def push_saved(save: Callable[[Path], Any], repo_id: str, **options: Any) -> str:
    """`push_folder` of what `save` writes into a folder that is gone afterwards.

    Args:
        save: called with the folder.
        repo_id: Hub name.
        options: of `push_folder`.

    Returns:
        URL of the commit, or of the pull request.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        save(Path(folder))
        return push_folder(folder, repo_id, **options)


def _records(folder: Path, repo_id: str, about: Mapping[str, Any], token: str | bool | None) -> dict[str, bytes]:
    """The card as it is published: with the repository's name, and the licence of what the artifact was made from.

    An adapter's folder as PEFT writes it gets its record and, in place of PEFT's empty form, its card here.
    """
    from tempfile import TemporaryDirectory

    found: dict[str, bytes] = {}
    card = folder / CARD
    with TemporaryDirectory() as scratch:
        if not (folder / ABOUT).is_file():
            from .ccm.saved import describe_adapter

            settings = read_json(folder / "adapter_config.json")
            base = settings.get("base_model_name_or_path")
            known = base if isinstance(base, str) and looks_like_repo(base) else None
            made = describe_adapter(Path(scratch), settings, about["code"], base=known, name=repo_id)
            found[ABOUT], about = (made / ABOUT).read_bytes(), read_about(made)
            if not card.is_file() or _PEFT_FORM in card.read_text(encoding="utf-8"):
                card = made / CARD
        if card.is_file():
            metadata, text = read_card(card)
            source = about.get("source")
            if "license" not in metadata and isinstance(source, dict):
                metadata["license"] = licence_of(str(source.get("id")), str(source.get("type")), token=token)
            found[CARD] = cards.with_metadata(text.replace(PLACEHOLDER, repo_id), metadata).encode()
    return found


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


def looks_like_repo(name: str) -> bool:
    """Whether a name can be one on the Hub (and is no path)."""
    return bool(_REPO.fullmatch(name)) and ".." not in name and "--" not in name and not Path(name).exists()


def hub_name(model: Any) -> str | None:
    """The Hub name a model was loaded by; None for a folder: paths of this machine go into no file."""
    name = getattr(model.config, "name_or_path", None)
    return name if name and looks_like_repo(name) else None


def _own_version() -> str | None:
    try:
        return version("hf-dataopt")
    except PackageNotFoundError:
        return None


def _patiently(call: Callable[[], _Result], tries: int = 4) -> _Result:
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
def _hub_errors(doing: str) -> Iterator[None]:
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
