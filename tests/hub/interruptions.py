"""Run as a script: a push that loses its connection at request k, for every k; and what is said without a network."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub_server import HubServer


def main(folder: Path) -> dict[str, Any]:
    """Counts of every kind of interruption, and messages."""
    with HubServer() as hub:
        os.environ |= hub.env()
        time.sleep = lambda seconds: None
        found = _interrupted(hub, folder)
        found |= _offline(folder)
        hub.stopped = True  # connections that are still open too
    return found | _dead(folder)


def _interrupted(hub: HubServer, folder: Path) -> dict[str, Any]:
    import torch

    from hf_dataopt.errors import HubError
    from hf_dataopt.kvzip.head_scores import load_head_scores, save_head_scores
    from hf_dataopt.publishing.artifacts import push_folder

    values = torch.zeros(2, 2), torch.ones(2, 2)
    for value, name in zip(values, ("first", "second"), strict=True):
        save_head_scores(value, folder / name, model_id="a/model")

    def states() -> dict[str, dict[str, bytes]]:
        made = {}
        for name in ("first", "second"):
            push_folder(folder / name, "me/scores")
            made[name] = hub.files("model", "me/scores")
        return made

    whole = states()
    hub.lfs.clear()
    push_folder(folder / "first", "me/scores")
    start = len(hub.requests)
    hub.lfs.clear()
    push_folder(folder / "second", "me/scores")
    requests = len(hub.requests) - start
    counts: dict[str, Counter[str]] = {}
    for after in (False, True):
        for for_good in (False, True):
            count = counts[f"{'answer' if after else 'request'} lost{', and all after it' if for_good else ''}"] = (
                Counter()
            )
            for k in range(requests):
                push_folder(folder / "first", "me/scores")
                hub.lfs.clear()
                hub.drop(k, after=after, for_good=for_good)
                try:
                    push_folder(folder / "second", "me/scores")
                    count["went through"] += 1
                except HubError as error:
                    count["said what to do"] += "again" in str(error)
                    count["refused"] += 1
                hub.restart()
                held = hub.files("model", "me/scores")
                count["old copy"] += held == whole["first"]
                count["new copy"] += held == whole["second"]
                loaded = load_head_scores("me/scores")[0]
                count["loads"] += any(torch.equal(loaded, value) for value in values)
                push_folder(folder / "second", "me/scores")
                count["complete in the end"] += hub.files("model", "me/scores") == whole["second"]
    return {"requests": requests, "counts": counts, "unknown": hub.unknown}


def _offline(folder: Path) -> dict[str, str]:
    """What a load and a push say with `HF_HUB_OFFLINE`; a load from the Hub's cache works."""
    from huggingface_hub import constants

    from hf_dataopt.cli import main as cli
    from hf_dataopt.kvzip.head_scores import load_head_scores
    from hf_dataopt.publishing.artifacts import push_folder

    constants.HF_HUB_OFFLINE = True  # what the client reads at its import from HF_HUB_OFFLINE=1
    told, refused = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told):
        cli(["info", "me/scores", "--json"])
    with contextlib.redirect_stderr(refused):
        cli(["info", "me/elsewhere"])
    found = {
        "offline, cached": _said(lambda: load_head_scores("me/scores")),
        "offline, not cached": _said(lambda: load_head_scores("me/elsewhere")),
        "offline, push": _said(lambda: push_folder(folder / "first", "me/scores")),
        "offline, info, cached": told.getvalue(),
        "offline, info, not cached": refused.getvalue(),
    }
    constants.HF_HUB_OFFLINE = False
    return found


def _dead(folder: Path) -> dict[str, str]:
    """The same where the server is gone."""
    from hf_dataopt.kvzip.head_scores import load_head_scores
    from hf_dataopt.publishing.artifacts import push_folder

    return {
        "dead, load": _said(lambda: load_head_scores("me/scores")),
        "dead, push": _said(lambda: push_folder(folder / "first", "me/scores")),
    }


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - what is raised is what is tested
        return f"{type(error).__name__}: {error}"
    return "fine"


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
