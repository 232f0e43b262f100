"""What the build does to a page besides converting its Markdown, each a function from text to text.

page.py        all of it, in order: before the conversion and after it
blocks.py      boxes, folds, and the heading of a block of code
downloads.py   a page as a program and a notebook, and a figure as a file
engines.py     the tables of engines in the reference, from the library itself
faces.py       the faces of a page's first screen, asked for before it is laid out
feed.py        the changelog as an Atom feed, and robots.txt
figures.py     figures in fewer characters, and the data of large ones in files
fonts.py       the fonts of a built site, cut to the characters in use
glossary.py    the terms: tooltips on every page, and the glossary's own page
links.py       the address of a page as seen from another, and of a file in the repository
llms.py        a page's description, and llms.txt
mathematics.py formulas, typeset by KaTeX while the site is built
notebooks.py   a notebook's cells in the site's own blocks
security.py    the policy by which a browser loads nothing from elsewhere
search.py      what the search finds, and what comes first
social.py      the picture that is shown beside a link to a page
styles.py      the style sheets of a built site, joined and cut to what its pages can use
"""
