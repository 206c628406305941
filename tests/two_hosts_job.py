"""What `tests/two_hosts.py` has launched on every host."""

import sys
from pathlib import Path

from tests.two_hosts import work

work(Path(sys.argv[1]))
