"""`make mutants`: how many one-point changes of the numerics, the files and the routing the tests notice (not part of CI).

`changes` draws a seeded sample of changes (comparison, operator, 0/1/2, and/or: cosmic-ray's operators), `reach` knows which
test reaches which line in how many seconds, `trial` makes one change in a copy of the tree and runs those tests, `__main__`
keeps the outcomes and reports. (cosmic-ray's own runner edits the working tree and starts a whole `pytest` for each change;
mutmut rewrites every function, which spawned processes do not see.)
"""

from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
