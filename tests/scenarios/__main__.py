"""Tell stories on the terminal, or write their golden traces anew.

python -m tests.scenarios                 list them
python -m tests.scenarios NAME...         tell these
python -m tests.scenarios --write [NAME...]   write the golden traces (of these, else of all)
python -m tests.scenarios --check         compare all with their golden traces; exit 1 when one differs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.scenarios.stories import STORIES

GOLDEN = Path(__file__).parent / "golden"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.scenarios", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="write the golden traces anew: read what changed")
    mode.add_argument("--check", action="store_true", help="compare with the golden traces")
    options = parser.parse_args()
    if unknown := set(options.names) - STORIES.keys():
        parser.error(f"no such story: {', '.join(sorted(unknown))}")
    chosen = [STORIES[name] for name in options.names or STORIES]
    if options.write:
        GOLDEN.mkdir(exist_ok=True)
        for story in chosen:
            (GOLDEN / f"{story.name}.txt").write_text(story.told())
    elif options.check:
        different = [s.name for s in chosen if s.told() != (GOLDEN / f"{s.name}.txt").read_text()]
        print(*(f"{name} has another trace" for name in different), sep="\n", end="\n" * bool(different))
        return 1 if different else 0
    elif options.names:
        for story in chosen:
            story.told(print)
    else:
        print(*(f"{story.name:36} {story.text.splitlines()[0]}" for story in chosen), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
