"""What we publish: folders with `hf_dataopt.json`, safetensors or parquet, and a card; fetched and pushed.

Each room writes the files of its own kind (`writer.py`); `fetch` checks a folder or a Hub repository before the room reads it;
`push_folder` uploads a folder in one commit, so that a repository holds either all of an artifact or none of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Unpack

from ..settings import check_choice, check_path
from . import cards
from .adapters import SETTINGS, adapter_about, describe_plain, holds_form, write_settings
from .hub import check_hub, check_push, download, hub_errors, licence_of, patiently
from .kinds import KINDS, PLACEHOLDER
from .names import on_hub
from .record import ABOUT, belongs, check_files, inner_artifacts, list_files, read_about
from .safe_files import CARD, check_parquet, check_safetensors, files_of, is_pickle, read_card, read_json
from .writer import recover

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .hub import PushOptions

logger = logging.getLogger(__name__)


def about_of(folder: Path) -> dict[str, Any]:
    """`read_about`, also for an adapter folder as PEFT itself writes it, without a record of ours.

    Raises:
        ValueError: no artifact of ours.
    """
    if (folder / ABOUT).is_file():
        return read_about(folder)
    found = adapter_about(folder)
    if found is None:
        raise ValueError(f"{folder} holds no {ABOUT}: it is no artifact of hf_dataopt, or not all of one")
    return found


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
        ValueError: neither a folder nor a Hub name; names, links, sizes, hashes or headers that are refused; another kind.
        HubError: the repository cannot be read.

    Cost: one pass over the files for their hashes.
    """
    folder = check_path("source", source)
    check_hub(revision=revision, token=token)
    check_choice("kind", kind, tuple(KINDS))
    recover(folder.resolve())
    if not folder.is_dir():
        if not KINDS[kind].repo_type:
            raise ValueError(f"{str(source)!r:.200} is no folder; name the one that holds the {KINDS[kind].short}")
        folder = download(str(source), KINDS[kind].repo_type, revision=revision, token=token)
    files_of(folder)
    about = about_of(folder)
    if about["kind"] != kind:
        raise ValueError(f"{folder} holds a {KINDS[about['kind']].title}, not a {KINDS[kind].title}; load it as that")
    for path in belongs(folder, about):
        if path.suffix == ".safetensors":
            check_safetensors(path)
    missing = [name for name in KINDS[kind].needs if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; get the whole artifact again")
    check_files(folder, about)
    for path in belongs(folder, about):
        if path.suffix == ".parquet":  # opened when its hash is right
            check_parquet(path)
    if (folder / CARD).is_file():
        read_card(folder / CARD)
    return folder, about


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> CommitInfo:
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
        The commit, as every upload of the Hub's client; as text its URL.

    Raises:
        ValueError: the folder holds no artifact, or the name is no Hub name.
        HubError: the upload failed; nothing of it is in the repository (an empty new one may be left).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = check_path("folder", folder)
    check_push(
        repo_id, private=private, revision=revision, token=token, create_pr=create_pr, commit_message=commit_message
    )
    about = about_of(folder)
    kind = KINDS[about["kind"]]
    if not kind.repo_type:
        raise ValueError(f"a {kind.title} is not pushed alone; push the folder that it lies in")
    files = _contents(folder, about)
    api = HfApi(token=token)
    name: dict[str, Any] = {"repo_id": repo_id, "repo_type": kind.repo_type}
    message = commit_message or f"Upload {kind.title}"
    with hub_errors(f"pushing {folder} to {repo_id}"):
        patiently(lambda: api.create_repo(**name, private=private, exist_ok=True))
        if revision is not None and not revision.startswith("refs/"):
            patiently(lambda: api.create_branch(**name, branch=revision, exist_ok=True))
        before: Any = patiently(lambda: api.repo_info(**name, revision=revision))
        contents: dict[str, Any] = {**files, **_records(folder, repo_id, about, token)}
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

        made = patiently(commit, tries=1 if create_pr else 4)
    done: CommitInfo = made
    return done


def push_saved(save: Callable[[Path], Any], repo_id: str, **options: Unpack[PushOptions]) -> CommitInfo:
    """`push_folder` of what `save` writes into a folder that is gone afterwards.

    Args:
        save: called with the folder.
        repo_id: Hub name.
        options: of `push_folder`.

    Returns:
        The commit, as every upload of the Hub's client; as text its URL.
    """
    check_push(repo_id, **options)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artifact"
        save(folder)
        return push_folder(folder, repo_id, **options)


def _contents(folder: Path, about: Mapping[str, Any]) -> dict[str, Path]:
    """The files to upload, checked: those of the artifact and of the artifacts inside it, no pickles and nothing else."""
    found: dict[str, Path] = {}
    for place in [folder, *inner_artifacts(folder)]:
        own = about if place == folder else read_about(place)
        fetch(place, own["kind"])
        found |= {path.relative_to(folder).as_posix(): path for path in belongs(place, own)}
    pickles = [name for name in found if is_pickle(name)]
    if pickles:
        logger.warning("not pushed, since they are pickles: %s", ", ".join(pickles))
    there = {path.relative_to(folder).as_posix() for path in files_of(folder)}
    others = sorted(there - set(found))
    if others:
        logger.warning("not pushed, since no save has put them there: %s", ", ".join(others))
    return {name: path for name, path in found.items() if name not in pickles}


def _records(folder: Path, repo_id: str, about: Mapping[str, Any], token: str | bool | None) -> dict[str, bytes]:
    """The card as it is published: with the repository's name, and the licence of what the artifact was made from.

    An adapter's folder as PEFT writes it gets its record and, in place of PEFT's empty form, its card here. Its settings and
    a card of the user's, in which PEFT has entered the base model, are published without the path of one from a folder.
    """
    found: dict[str, bytes] = {}
    card = folder / CARD
    with TemporaryDirectory() as scratch:
        if not (folder / ABOUT).is_file():
            settings = write_settings(Path(scratch), read_json(folder / SETTINGS))
            made = describe_plain(Path(scratch), settings, name=repo_id)
            about = read_about(made)
            about["files"] = list_files(folder, skip=is_pickle) | about["files"]
            found[SETTINGS] = (made / SETTINGS).read_bytes()
            found[ABOUT] = (json.dumps(about, indent=2) + "\n").encode()
            if not card.is_file() or holds_form(folder):
                card = made / CARD
        if card.is_file():
            metadata, text = read_card(card)
            if SETTINGS in found:
                metadata["base_model"] = on_hub(metadata.get("base_model"))
            source = about.get("source")
            if "license" not in metadata and isinstance(source, dict):
                metadata["license"] = licence_of(str(source.get("id")), str(source.get("type")), token=token)
            found[CARD] = cards.with_metadata(text.replace(PLACEHOLDER, repo_id), metadata).encode()
    return found
