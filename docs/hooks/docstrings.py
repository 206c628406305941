"""griffe: the house's docstrings as its Google parser reads them.

`Example:` is its `Examples:`; `Source:`, `Differs:` and `Cost:` are paragraphs of their own; back-ticked types lose the ticks.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_LABEL = re.compile(r"^(\s*)(Source|Differs|Cost): (?=\S)", re.MULTILINE)
_TYPED = re.compile(r"^( {4}[\w*, ]+ \()(.*?)(\):)", re.MULTILINE)


def readable(text: str) -> str:
    """A docstring with the marks that the parser and Markdown want."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = _TYPED.sub(lambda found: found[1] + found[2].replace("`", "") + found[3], text)
    return _LABEL.sub(r"\n\1**\2:** ", text)


class HouseDocstrings(Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
