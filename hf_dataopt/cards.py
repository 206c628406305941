"""Dataset and model cards: one template per kind of artifact, filled with what was measured and nothing else."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("hf-dataopt", "torch", "transformers", "datasets")


def template(name: str) -> str:
    """Text of `model_cards/NAME.md.jinja`, from the installed package or from the source tree of an editable install.

    Raises:
        ValueError: no such template.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "model_cards", here.parent / "model_cards"):
        path = folder / f"{name}.md.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ValueError(f"there is no card template {name!r}")


def render(card: str, metadata: dict[str, Any], /, **values: Any) -> str:
    """A card.

    Args:
        card: name of the template.
        metadata: the YAML block that the Hub reads; entries that are None are left out (a licence is never guessed).
        **values: what the template asks for; a missing one is an error.

    Returns:
        Markdown with a YAML block.

    Raises:
        ValueError: no such template.
        jinja2.UndefinedError: a value is missing.
    """
    import jinja2
    import yaml

    block = yaml.safe_dump({k: v for k, v in metadata.items() if v is not None}, sort_keys=False).strip()
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template(card)).render(metadata=block, versions=versions(), **values)


def versions() -> str:
    """Versions of the packages that a result depends on."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
