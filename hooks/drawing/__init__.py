"""A page's figures: their code is run in processes side by side, and what it printed is kept until something changes.

    process.py    one fence, in a process of its own, with a record of the files it depended on
    store.py      what was printed, kept under a hash of all that decided it
    pages.py      every figure of every page: taken from the store, or drawn
    notebooks.py  where the notebooks' outputs are kept

Nothing here knows the program that builds the site: `python hooks/draw.py` does the same before any build.
"""
