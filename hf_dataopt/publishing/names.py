"""Names on the Hub, as opposed to paths of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_REPO = re.compile(r"(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?", re.ASCII)


def looks_like_repo(name: str) -> bool:
    """Whether a name can be one on the Hub (and is no path)."""
    return bool(_REPO.fullmatch(name)) and ".." not in name and "--" not in name and not Path(name).exists()


def on_hub(name: Any) -> str | None:
    """What a model was loaded by if that is a name on the Hub; None for a folder: paths of this machine go into no file."""
    return name if isinstance(name, str) and looks_like_repo(name) else None


def hub_name(model: Any) -> str | None:
    """The Hub name a model was loaded by; None for a folder."""
    return on_hub(getattr(model.config, "name_or_path", None))
