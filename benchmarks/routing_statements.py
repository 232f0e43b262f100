"""Simple statements of six topics, each true or false, affirmed or denied; and capitals beside better-known cities.

A false statement has the right-hand side of another statement of its topic, so that each word stands as often in true
statements as in false ones. Source: written by hand for this project. Licence: CC BY 4.0.
"""

from typing import NamedTuple

_TOPICS = {
    "countries": (
        "{} is a city in {}.",
        "{} is not a city in {}.",
        "Paris France|Rome Italy|Madrid Spain|Berlin Germany|Tokyo Japan|Beijing China|Moscow Russia|Cairo Egypt"
        "|London England|Athens Greece|Lisbon Portugal|Toronto Canada|Sydney Australia|Dublin Ireland|Warsaw Poland"
        "|Mumbai India|Vienna Austria|Oslo Norway|Stockholm Sweden|Helsinki Finland|Istanbul Turkey|Lima Peru"
        "|Havana Cuba|Budapest Hungary|Bangkok Thailand|Nairobi Kenya",
    ),
    "kinds": (
        "A {} is a kind of {}.",
        "A {} is not a kind of {}.",
        "sparrow bird|salmon fish|oak tree|rose flower|hammer tool|violin instrument|carrot vegetable|banana fruit"
        "|ant insect|cobra snake|sofa furniture|shirt clothing|diamond gem|sword weapon|truck vehicle|poodle dog"
        "|cottage house|novel book|waltz dance|dollar currency|iron metal|triangle shape|purple color|June month",
    ),
    "opposites": (
        "The opposite of {} is {}.",
        "The opposite of {} is not {}.",
        "hot cold|big small|up down|left right|good bad|happy sad|fast slow|light dark|rich poor|open closed|day night"
        "|young old|wet dry|strong weak|hard soft|loud quiet|early late|full empty|win lose|buy sell|war peace"
        "|north south|true false|push pull|high low|thick thin",
    ),
    "Spanish": (
        "In Spanish, the word for {} is {}.",
        "In Spanish, the word for {} is not {}.",
        "dog perro|cat gato|house casa|water agua|bread pan|milk leche|sun sol|moon luna|book libro|table mesa"
        "|red rojo|white blanco|black negro|green verde|friend amigo|night noche|day día|hand mano|head cabeza"
        "|school escuela|city ciudad|woman mujer|man hombre|love amor",
    ),
    "sums": (
        "{} is equal to {}.",
        "{} is not equal to {}.",
        "2+2 4|3+4 7|5+3 8|6+5 11|7+7 14|8+4 12|9+6 15|1+4 5|3+3 6|2+7 9|6+4 10|8+8 16|9+8 17|4+9 13|9+9 18|1+2 3"
        "|10+9 19|10+10 20|12+9 21|11+11 22|20+3 23|12+12 24|20+5 25|20+6 26",
    ),
    "places": (
        "A {} can be found in a {}.",
        "A {} can not be found in a {}.",
        "priest church|nurse hospital|teacher school|judge court|chef restaurant|actor theater|sailor ship|pilot plane"
        "|lion zoo|cow barn|book library|pillow bedroom|stove kitchen|whale sea|camel desert|monkey jungle"
        "|grave cemetery|prisoner jail|painting museum|tent camp|goalkeeper stadium|banker bank|bee hive|spider web",
    ),
}
_CAPITALS = (
    "Australia Canberra Sydney|Canada Ottawa Toronto|Brazil Brasília Rio de Janeiro|Turkey Ankara Istanbul"
    "|Switzerland Bern Zurich|Morocco Rabat Casablanca|Nigeria Abuja Lagos|Pakistan Islamabad Karachi"
    "|Vietnam Hanoi Ho Chi Minh City|Kazakhstan Astana Almaty|Tanzania Dodoma Dar es Salaam|Ecuador Quito Guayaquil"
    "|New_Zealand Wellington Auckland|India New_Delhi Mumbai|China Beijing Shanghai|Cameroon Yaoundé Douala"
    "|the_United_States Washington New York|the_United_Arab_Emirates Abu_Dhabi Dubai|Scotland Edinburgh Glasgow"
    "|Wales Cardiff Swansea"
)
SHIFT = 7
"""By how many places the right-hand sides are moved in the false statements."""


class Pair(NamedTuple):
    """Two statements with one left-hand side, of which the first is true."""

    topic: str
    denied: bool
    true: str
    false: str


def pairs() -> list[Pair]:
    """Every topic's pairs, affirmed and denied. "Paris is not a city in France" is the false one of its pair."""
    found = []
    for topic, (affirmed, denied, written) in _TOPICS.items():
        facts = [fact.split(" ") for fact in written.split("|")]
        for i, (left, right) in enumerate(facts):
            wrong = facts[(i + SHIFT) % len(facts)][1]
            found.append(Pair(topic, False, affirmed.format(left, right), affirmed.format(left, wrong)))
            found.append(Pair(topic, True, denied.format(left, wrong), denied.format(left, right)))
    return found


def capitals() -> list[Pair]:
    """Of each country its capital, and a city that is better known or larger."""
    found = []
    for written in _CAPITALS.split("|"):
        country, capital, *other = (word.replace("_", " ") for word in written.split(" "))
        sentence = "The capital of {} is {}."
        found.append(
            Pair("capitals", False, sentence.format(country, capital), sentence.format(country, " ".join(other)))
        )
    return found
