"""Run every snippet and figure alone, as `python snippet.py`, and compare what it prints with what its page shows.

python hooks/fences.py               every page
python hooks/fences.py docs/x.md     some pages
python hooks/fences.py --snippets    without the figures, where the build has just run those
"""

import sys

from snippets.alone import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
