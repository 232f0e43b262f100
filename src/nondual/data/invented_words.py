"""Words that mean nothing, such as "blick" and "wug": 64 of them, to make up tasks that no text has taught.

Source: made up by hand for this project. Licence: CC BY 4.0. They follow English spelling, and none is a word of
everyday English; that none of them ever stood in a text, as a name or a misspelling, is more than anyone can say.
"""

INVENTED_WORDS: tuple[str, ...] = tuple(
    """
    blick wug dax fep toma gazzer plim zorb vark snade trell quop mib jutch frope glane slorn prunt keff drimble
    yosh narp tulver wemble chod brant spirk lomp vesk haddle crint fless zimp groff stobe mulk rebb thrane piv
    yulk dorp swick nelp cray vub oth plask grelm tiddock furn sprell wodge kaz murp lenth bofe drast vimmer
    shunk glip trob neeve skolt hibb
    """.split()
)
"""64 made-up words, none twice."""
