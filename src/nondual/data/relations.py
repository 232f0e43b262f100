"""Short English sentences whose related words are marked by hand, and pairs of words that are alike in meaning.

Source: written and annotated by hand for this project. Licence: CC BY 4.0.

Below each sentence stand its pairs, word-word, after the letter of their relation:

    s  subject      noun or personal pronoun -> its main verb (not an auxiliary)
    o  object       noun or personal pronoun -> the verb that it is the direct object of
    d  determiner   the, a, this, every, which, more, ... -> its noun
    a  adjective    -> the noun that it describes, in one phrase ("the old house", not "the house is old")
    p  pronoun      he, it, his, themselves, ... -> the noun that it stands for
    r  preposition  -> the noun that it governs

A word that stands more than once is meant the first time, or where its number says: the#2 is the second "the".
Subjects and objects that are relative pronouns (who, which, that) are not annotated.
"""

import re
from typing import NamedTuple

NAMES = {"s": "subject", "o": "object", "d": "determiner", "a": "adjective", "p": "pronoun", "r": "preposition"}


class Sentence(NamedTuple):
    """A sentence and its annotated pairs.

    Attributes:
        text: as it was written.
        words: its words in order, without punctuation; a word keeps its apostrophe and hyphen.
        pairs: (relation, i, j): word i stands in this relation to word j; see the list at the top of the file.
    """

    text: str
    words: tuple[str, ...]
    pairs: tuple[tuple[str, int, int], ...]


_WRITTEN = """
The old farmer sold two brown cows to his neighbour.
s farmer-sold | o cows-sold | d the-farmer | a old-farmer brown-cows | p his-farmer | r to-neighbour
A small dog followed the tall young woman because she carried warm bread.
s dog-followed she-carried | o woman-followed bread-carried | d a-dog the-woman
a small-dog tall-woman young-woman warm-bread
p she-woman
The children who lived near the river built a strong wooden raft, and they called it Victory.
s children-built they-called | o raft-built it-called | d the-children the#2-river a-raft | a strong-raft wooden-raft
p they-children it-raft | r near-river
Which letter did the clever judge read before she left the court?
s judge-read she-left | o letter-read court-left | d which-letter the-judge the#2-court | a clever-judge | p she-judge
The king, weary after a long war, gave his crown to a young shepherd.
s king-gave | o crown-gave | d the-king a-war a#2-shepherd | a weary-king long-war young-shepherd | p his-king
r after-war to-shepherd
My sister broke the blue cup that she had bought in Spain.
s sister-broke she-bought | o cup-broke | d the-cup | a blue-cup | p she-sister | r in-spain
In the dark cellar the boys found a rusty box and opened it.
s boys-found | o box-found it-opened | d the-cellar the#2-boys a-box | a dark-cellar rusty-box | p it-box
r in-cellar
The teacher praised every pupil who had finished the difficult task.
s teacher-praised | o pupil-praised task-finished | d the-teacher every-pupil the#2-task | a difficult-task
The sailor stayed on the ship until his fever passed.
s sailor-stayed fever-passed | d the-sailor the#2-ship | p his-sailor | r on-ship
Two hungry grey wolves watched the flock from a nearby hill, but they never attacked it.
s wolves-watched they-attacked | o flock-watched it-attacked | d the-flock a-hill
a hungry-wolves grey-wolves nearby-hill
p they-wolves it-flock | r from-hill
The nurse who helped the injured pilot later wrote a long and honest book about him.
s nurse-wrote | o pilot-helped book-wrote | d the-nurse the#2-pilot a-book | a injured-pilot long-book honest-book
p him-pilot
r about-him
Anna quickly hid the heavy golden ring under a loose stone.
s anna-hid | o ring-hid | d the-ring a-stone | a heavy-ring golden-ring loose-stone | r under-stone
The painter cleaned his best brushes with an old woollen cloth.
s painter-cleaned | o brushes-cleaned | d the-painter an-cloth | a best-brushes old-cloth woollen-cloth
p his-painter | r with-cloth
Every evening the baker gives some fresh rolls to the poor family across the street.
s baker-gives | o rolls-gives | d every-evening the-baker some-rolls the#2-family the#3-street
a fresh-rolls poor-family
r to-family across-street
This heavy parcel, which the postman carried up four floors, belongs to her uncle.
s parcel-belongs postman-carried | d this-parcel the-postman | a heavy-parcel | r up-floors to-uncle
The mayor of the small town opened the new bridge and cut its ribbon.
s mayor-opened | o bridge-opened ribbon-cut | d the-mayor the#2-town the#3-bridge | a small-town new-bridge
p its-bridge
r of-town
Clara had already eaten the ripe yellow pears when her brothers returned from the market.
s clara-eaten brothers-returned | o pears-eaten | d the-pears the#2-market | a ripe-pears yellow-pears
p her-clara | r from-market
The cat saw itself in a large round mirror and ran behind the sofa.
s cat-saw | o itself-saw | d the-cat a-mirror the#2-sofa | a large-mirror round-mirror | p itself-cat
r in-mirror behind-sofa
A stranger with a tall black hat asked the shy girl whether she knew the way.
s stranger-asked she-knew | o girl-asked way-knew | d a-stranger a#2-hat the-girl the#2-way
a tall-hat black-hat shy-girl
p she-girl | r with-hat
The engine stopped because it had no clean oil.
s engine-stopped it-had | o oil-had | d the-engine no-oil | a clean-oil | p it-engine
What answer did the angry crowd expect from the minister?
s crowd-expect | o answer-expect | d what-answer the-crowd the#2-minister | a angry-crowd | r from-minister
The brothers built themselves a narrow wooden house between two wide rivers.
s brothers-built | o house-built | d the-brothers a-house | a narrow-house wooden-house wide-rivers
p themselves-brothers
r between-rivers
Without a word, the proud old queen returned the silver sword to its owner.
s queen-returned | o sword-returned | d a-word the-queen the#2-sword | a proud-queen old-queen silver-sword
p its-sword
r without-word to-owner
The pupils, quiet and attentive, copied the strange signs into their books.
s pupils-copied | o signs-copied | d the-pupils the#2-signs | a quiet-pupils attentive-pupils strange-signs
p their-pupils
r into-books
Our cook always peels the small green apples before she slices them.
s cook-peels she-slices | o apples-peels them-slices | d the-apples | a small-apples green-apples
p she-cook them-apples
The soldier whom the villagers had hidden for a whole winter thanked them with tears.
s soldier-thanked villagers-hidden | o them-thanked | d the-soldier the#2-villagers a-winter | a whole-winter
p them-villagers | r for-winter with-tears
A bright yellow lamp hung over the round table, and its light filled the room.
s lamp-hung light-filled | o room-filled | d a-lamp the-table the#2-room | a bright-lamp yellow-lamp round-table
p its-lamp
r over-table
The doctor told the worried parents that their son needed a second operation.
s doctor-told son-needed | o operation-needed | d the-doctor the#2-parents a-operation
a worried-parents second-operation | p their-parents
Ben lent me the thick Russian novel, but I lost it on a crowded train.
s ben-lent i-lost | o novel-lent it-lost | d the-novel a-train | a thick-novel russian-novel crowded-train
p it-novel | r on-train
Those old trees by the church have survived many long and violent storms.
s trees-survived | o storms-survived | d those-trees the-church | a old-trees long-storms violent-storms | r by-church
The lawyer, together with two assistants, studied each page of the secret report.
s lawyer-studied | o page-studied | d the-lawyer each-page the#2-report | a secret-report
r with-assistants of-report
The gardener watered the young roses because they looked dry.
s gardener-watered they-looked | o roses-watered | d the-gardener the#2-roses | a young-roses | p they-roses
The thief climbed through an open window while the guard drank his tea.
s thief-climbed guard-drank | o tea-drank | d the-thief an-window the#2-guard | a open-window | p his-guard
r through-window
Maria keeps her late father's watch in a drawer near the bed.
s maria-keeps | o watch-keeps | d a-drawer the-bed | a late-father's | p her-maria | r in-drawer near-bed
The goats ate the laundry that the widow had hung between the two posts.
s goats-ate widow-hung | o laundry-ate | d the-goats the#2-laundry the#3-widow the#4-posts | r between-posts
An honest merchant never hides the faults of his goods.
s merchant-hides | o faults-hides | d an-merchant the-faults | a honest-merchant | p his-merchant | r of-goods
The dog that bit the postman in the narrow lane hid under our porch, and it stayed there.
s dog-hid it-stayed | o postman-bit | d the-dog the#2-postman the#3-lane | a narrow-lane | p it-dog
r in-lane under-porch
During the cold night the two lost hikers burned their last wooden poles.
s hikers-burned | o poles-burned | d the-night the#2-hikers | a cold-night lost-hikers last-poles wooden-poles
p their-hikers
r during-night
The actress forgot her lines, so the director whispered them from a dark and dusty corner.
s actress-forgot director-whispered | o lines-forgot them-whispered | d the-actress the#2-director a-corner
a dark-corner dusty-corner | p her-actress them-lines | r from-corner
How many coins did the greedy miller count yesterday?
s miller-count | o coins-count | d many-coins the-miller | a greedy-miller
The professor has carefully corrected all the wrong dates in her second lecture.
s professor-corrected | o dates-corrected | d the-professor the#2-dates | a wrong-dates second-lecture
p her-professor
r in-lecture
The birds left their nest after a huge green snake had found it.
s birds-left snake-found | o nest-left it-found | d the-birds a-snake | a huge-snake green-snake
p their-birds it-nest
Some people in this quiet little village still remember the great flood.
s people-remember | o flood-remember | d some-people this-village the-flood
a quiet-village little-village great-flood | r in-village
The boy pushed his sister's heavy bicycle up the steep and muddy hill.
s boy-pushed | o bicycle-pushed | d the-boy the#2-hill | a heavy-bicycle steep-hill muddy-hill | p his-boy | r up-hill
The tailor measured the duke twice, but the coat did not fit him.
s tailor-measured coat-fit | o duke-measured him-fit | d the-tailor the#2-duke the#3-coat | p him-duke
Before the trial began, the witness had lost all her courage.
s trial-began witness-lost | o courage-lost | d the-trial the#2-witness | p her-witness
The company sold the large empty factory to a foreign bank, which soon closed it.
s company-sold | o factory-sold it-closed | d the-company the#2-factory a-bank
a large-factory empty-factory foreign-bank
p it-factory | r to-bank
Sailors from distant ports bring the islanders news, and they reward the men with fruit.
s sailors-bring they-reward | o news-bring men-reward | d the-islanders the#2-men | a distant-ports | p they-islanders
r from-ports with-fruit
The monk poured more tea although the cup was already full.
s monk-poured cup-was | o tea-poured | d the-monk more-tea the#2-cup
Under the heavy wet snow the thin roof of the barn finally broke.
s roof-broke | d the-snow the#2-roof the#3-barn | a heavy-snow wet-snow thin-roof | r under-snow of-barn
A girl whose brother plays the violin wants to learn the same difficult instrument.
s girl-wants brother-plays | o violin-plays instrument-learn | d a-girl the-violin the#2-instrument
a same-instrument difficult-instrument
The tall old clock in the hall strikes every hour, but its hands never move.
s clock-strikes hands-move | d the-clock the#2-hall every-hour | a tall-clock old-clock | p its-clock | r in-hall
The captain ordered the cold and frightened crew to lower the boats, and they obeyed him.
s captain-ordered they-obeyed | o crew-ordered boats-lower him-obeyed | d the-captain the#2-crew the#3-boats
a cold-crew frightened-crew | p they-crew him-captain
For this rare stamp the collector paid an enormous but fair price.
s collector-paid | o price-paid | d this-stamp the-collector an-price | a rare-stamp enormous-price fair-price
r for-stamp
The bees that live behind the broken wall make a dark and bitter honey.
s bees-make | o honey-make | d the-bees the#2-wall a-honey | a broken-wall dark-honey bitter-honey | r behind-wall
Peter and his wife planted a cherry tree beside their first house.
s peter-planted | o tree-planted | d a-tree | a first-house | p his-peter | r beside-house
The reporter asked the minister a simple and polite question, and she refused to answer it.
s reporter-asked she-refused | o question-asked it-answer | d the-reporter the#2-minister a-question
a simple-question polite-question | p she-minister it-question
No guest noticed that the waiter had spilled cheap red wine on his sleeve.
s guest-noticed waiter-spilled | o wine-spilled | d no-guest the-waiter | a cheap-wine red-wine | p his-waiter
r on-sleeve
The little boat with the torn brown sail reached the harbour long before the storm.
s boat-reached | o harbour-reached | d the-boat the#2-sail the#3-harbour the#4-storm
a little-boat torn-sail brown-sail
r with-sail before-storm
My grandmother told us a short sad story about a fox and its shadow.
s grandmother-told | o story-told | d a-story a#2-fox | a short-story sad-story | p its-fox | r about-fox
The students who had missed the last bus walked along the long empty road and sang.
s students-walked | o bus-missed | d the-students the#2-bus the#3-road | a last-bus long-road empty-road
r along-road
That generous man bought shoes for every child in the orphanage.
s man-bought | o shoes-bought | d that-man every-child the-orphanage | a generous-man | r for-child in-orphanage
The poet burned most of his clumsy early letters because he hated them.
s poet-burned he-hated | o most-burned them-hated | d the-poet | a clumsy-letters early-letters
p his-poet he-poet them-letters
r of-letters
A sharp cold wind from the sea closed the door, and the child could not open it.
s wind-closed child-open | o door-closed it-open | d a-wind the-sea the#2-door the#3-child | a sharp-wind cold-wind
p it-door
r from-sea
Whose coat did the careless young guest take from the hall?
s guest-take | o coat-take | d the-guest the#2-hall | a careless-guest young-guest | r from-hall
The elephant lifted the fallen tree with its trunk and laid it beside the road.
s elephant-lifted | o tree-lifted it-laid | d the-elephant the#2-tree the#3-road | a fallen-tree
p its-elephant it-tree
r with-trunk beside-road
The twins never quarrel, yet each of them loves a different sport.
s twins-quarrel | o sport-loves | d the-twins a-sport | a different-sport | p them-twins | r of-them
After the concert the tired but happy singer thanked her loyal audience.
s singer-thanked | o audience-thanked | d the-concert the#2-singer | a tired-singer happy-singer loyal-audience
p her-singer
r after-concert
A carpenter from our street repaired the church's broken door for nothing.
s carpenter-repaired | o door-repaired | d a-carpenter the-church's | a broken-door | r from-street for-nothing
The mother woke her son gently, for he had slept badly.
s mother-woke he-slept | o son-woke | d the-mother | p her-mother he-son
The hunters followed the weak and wounded deer through a deep forest, but they lost its trail at the lake.
s hunters-followed they-lost | o deer-followed trail-lost | d the-hunters the#2-deer a-forest the#3-lake
a weak-deer wounded-deer deep-forest | p they-hunters its-deer | r through-forest at-lake
The young and clever widow, whom everybody in the valley admired, sold her land and left.
s widow-sold everybody-admired | o land-sold | d the-widow the#2-valley | a young-widow clever-widow | p her-widow
r in-valley
"""


def _parse(written: str) -> tuple[Sentence, ...]:
    """The sentences and their pairs; a line of pairs starts with the letter of a relation and a space."""
    read: list[Sentence] = []
    for line in filter(None, written.splitlines()):
        if re.match(r"[sodapr] \S+-\S", line) is None:
            read.append(Sentence(line, tuple(re.findall(r"[\w'-]+", line)), ()))
            continue
        text, words, pairs = read[-1]
        for group in line.split(" | "):
            letter, *linked = group.split()
            for pair in linked:
                i, j = (_place(words, word, text) for word in pair.split("-"))
                pairs += ((NAMES[letter], i, j),)
        read[-1] = Sentence(text, words, pairs)
    return tuple(read)


def _place(words: tuple[str, ...], word: str, text: str) -> int:
    """Where a word stands: the first time, or as often as its number says."""
    spelling, _, number = word.partition("#")
    places = [i for i, w in enumerate(words) if w.lower() == spelling]
    if len(places) < int(number or 1):
        raise ValueError(f"{word} must be a word of the sentence {text!r}")
    return places[int(number or 1) - 1]


RELATIONS: tuple[Sentence, ...] = _parse(_WRITTEN)
"""72 sentences with their pairs, in which no fixed distance finds all pairs of a relation."""

ALIKE: tuple[tuple[str, str], ...] = tuple(
    (first, second)
    for first, second in (
        pair.split("-")
        for pair in """
        horse-pony sea-ocean car-truck king-queen doctor-nurse bread-cake cup-mug street-road house-cottage boat-ship
        shirt-coat rain-snow wolf-dog apple-pear gold-silver piano-violin pen-pencil lake-river teacher-pupil stone-rock
        child-baby forest-wood soldier-warrior thief-robber table-desk window-door knife-sword letter-note hand-arm
        sun-moon summer-winter market-shop wine-beer brother-sister church-temple mouse-rat song-tune picture-painting
        clock-watch garden-park captain-sailor farmer-shepherd hat-cap bed-sofa tea-coffee butter-cheese shoe-boot
        war-battle
        """.split()
    )
)
"""48 pairs of words alike in meaning, such as "horse" and "pony"."""
