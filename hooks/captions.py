"""Name each number in a figure's words that its code neither computes nor asserts.

python hooks/captions.py               every page and notebook
python hooks/captions.py docs/x.md     some of them
"""

import sys

from snippets.captions import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
