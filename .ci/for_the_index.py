"""Before a release is built: README links that lead somewhere from the package index, and the project's addresses.

In the repository links are relative, so that they hold in every fork and checkout; where it lives is known when it is released:
`python .ci/for_the_index.py https://HOST/OWNER/NAME TAG` changes README.md and pyproject.toml of the checkout it runs in.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!\w+:|#|/)([^)\s]+)(?=\))")


def absolute(readme: str, home: str, tag: str) -> str:
    """A page's text with links into the repository at a tag; pictures by the address of the file itself."""
    return _LINK.sub(lambda link: f"{link[1]}{link[2]}{home}/{'raw' if link[1] else 'blob'}/{tag}/{link[3]}", readme)


def with_addresses(project: str, home: str, tag: str) -> str:
    """pyproject.toml with `[project.urls]`."""
    urls = {
        "Homepage": home,
        "Documentation": f"{home}/blob/{tag}/docs/index.md",
        "Changelog": f"{home}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{home}/issues",
    }
    table = "\n".join(f'{name} = "{url}"' for name, url in urls.items())
    return project.replace("\n[project.scripts]\n", f"\n[project.urls]\n{table}\n\n[project.scripts]\n", 1)


if __name__ == "__main__":
    for name, change in (("README.md", absolute), ("pyproject.toml", with_addresses)):
        path = Path(name)
        path.write_text(change(path.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
