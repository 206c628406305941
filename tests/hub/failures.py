"""Run as a script: what a push and a load say when the Hub fails; its own Hub, its own process, no waiting."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub_server import HubServer


def main(folder: Path) -> dict[str, Any]:
    """Every scenario's outcome: what was raised, and what the repository holds after it."""
    with HubServer() as hub:
        os.environ |= hub.env()
        waits: list[float] = []
        time.sleep = waits.append  # type: ignore[assignment]
        return _scenarios(hub, folder, waits)


def _scenarios(hub: HubServer, folder: Path, waits: list[float]) -> dict[str, Any]:
    import torch
    from huggingface_hub import HfApi

    from hf_dataopt.cli import main as cli
    from hf_dataopt.kvzip.head_scores import load_head_scores, save_head_scores
    from hf_dataopt.publishing.artifacts import push_folder
    from hf_dataopt.publishing.hub import download

    found: dict[str, Any] = {}
    first, second = torch.zeros(2, 2), torch.ones(2, 2)
    save_head_scores(first, folder / "first", model_id="a/model")
    save_head_scores(second, folder / "second", model_id="a/model")

    def attempt(name: str, call: Callable[[], Any]) -> None:
        waits.clear()
        try:
            result = call()
            found[name] = {"result": result if isinstance(result, str | int) else "fine"}
        except Exception as error:  # noqa: BLE001 - what is raised is what is tested
            found[name] = {"error": type(error).__name__, "message": str(error)}
        found[name] |= {"waits": len(waits)}

    def holds() -> str:
        files = hub.files("model", "me/scores")
        return "nothing" if "hf_dataopt.json" not in files else "first" if files == hub_first else "other"

    attempt("wrong token", lambda: push_folder(folder / "first", "me/scores", token="hf_wrong"))
    found["wrong token"]["repos"] = len(hub.repos)
    attempt("no repo", lambda: load_head_scores("me/nowhere"))
    attempt(
        "no revision",
        lambda: (push_folder(folder / "first", "me/scores"), load_head_scores("me/scores", revision="v9")),
    )
    hub_first = hub.files("model", "me/scores")
    places = {"create": "repos/create", "preupload": "preupload", "commit": "/commit/"}
    for number, (kind, pattern) in enumerate(places.items()):
        hub.fail_next(2, pattern)
        attempt(f"500 on {kind}", functools.partial(push_folder, folder / "first", f"me/new-{number}"))
    hub.fail_next(2, "info/lfs")
    attempt("500 on lfs", lambda: push_folder(folder / "second", "me/lfs"))
    hub.fail_next(2, "/api/models/me/scores")
    attempt("500 on load", lambda: load_head_scores("me/scores") and "fine")
    hub.fail_next(50, "/commit/")
    attempt("500 for ever", lambda: push_folder(folder / "second", "me/scores"))
    found["500 for ever"]["holds"] = holds()
    hub._failures.clear()
    stops: dict[str, tuple[Any, ...]] = {
        "stopped at once": (0,),
        "stopped in the tensors": (40,),
        "stopped in the commit": (80, "/commit/"),
    }
    for name, where in stops.items():
        hub.lfs.clear()
        hub.stop_in_upload(*where)
        attempt(name, lambda: push_folder(folder / "second", "me/scores"))
        found[name] |= {"holds": holds(), "stopped": hub.stopped}
        hub.restart()
    attempt("afterwards", lambda: push_folder(folder / "second", "me/scores"))
    found["afterwards"] |= {"same": bool(torch.equal(load_head_scores("me/scores")[0], second))}

    attempt("branch", lambda: push_folder(folder / "first", "me/scores", revision="dev", commit_message="mine"))
    attempt("pull request", lambda: push_folder(folder / "first", "me/scores", create_pr=True).pr_url)
    found["branch"] |= {
        "main": bool(torch.equal(load_head_scores("me/scores")[0], second)),
        "dev": bool(torch.equal(load_head_scores("me/scores", revision="dev")[0], first)),
        "titles": hub.commits("model", "me/scores", "dev"),
    }
    found["pull request"]["branches"] = sorted(hub.repos["model", "me/scores"].branches)
    HfApi().create_repo("me/secret", private=True)
    push_folder(folder / "first", "me/secret")
    attempt("private, no token", lambda: load_head_scores("me/secret", token=False))
    attempt("private, token", lambda: load_head_scores("me/secret") and "fine")
    record = (folder / "first" / "hf_dataopt.json").read_bytes()
    for number, name in enumerate(("../../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json")):
        hub.add("model", f"me/evil-{number}", {"hf_dataopt.json": record, name: b"{}"})
        attempt(f"climbs {number}", functools.partial(load_head_scores, f"me/evil-{number}"))
    found["asked for evil"] = [one for one in hub.requests if "evil.json" in one]
    tensors = (folder / "first" / "head_scores.safetensors").read_bytes()
    hub.add(
        "model", "me/mixed", {"hf_dataopt.json": record, "head_scores.safetensors": tensors, "model.bin": b"\x80\x04"}
    )
    attempt("pickle in the repository", lambda: load_head_scores("me/mixed") and "fine")
    found["asked for pickles"] = [one for one in hub.requests if ".bin" in one]
    before = len(hub.requests)
    attempt("too many bytes", lambda: str(download("me/mixed", "model", most=len(record) + len(tensors) - 1)))
    found["too many bytes"]["downloads"] = [one for one in hub.requests[before:] if "resolve" in one]
    attempt("as many bytes", lambda: download("me/mixed", "model", most=len(record) + len(tensors)) and "fine")
    _fewer_shards(hub, folder)
    found["fewer shards"] = sorted(hub.files("dataset", "me/set"))
    attempt("shell", lambda: cli(["push", str(folder / "first"), "me/shell", "--private", "--json"]))
    attempt("shell, no artifact", lambda: cli(["push", str(folder), "me/shell"]))
    found["unknown"] = hub.unknown
    return found


def _fewer_shards(hub: HubServer, folder: Path) -> None:
    """A set of several shards, and files of somebody else's, then the set of one shard pushed over it."""
    from hf_dataopt.condensation.saved import save_condensed
    from hf_dataopt.publishing import dataset_files
    from hf_dataopt.publishing.artifacts import push_folder

    from ..publishing.made import condensed

    usual, dataset_files._SHARD_BYTES = dataset_files._SHARD_BYTES, 4000
    many = save_condensed(condensed(20), folder / "many")
    dataset_files._SHARD_BYTES = usual
    shards = {f"data/{path.name}": path.read_bytes() for path in (many / "data").iterdir()}
    assert len(shards) > 1
    others = dict.fromkeys(("notes.md", "data/notes.txt", "raw/train-00000-of-00001.parquet"), b"theirs")
    hub.add("dataset", "me/set", {**shards, **others})
    push_folder(save_condensed(condensed(2), folder / "few"), "me/set")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
