"""Small real texts: sentences with one word in two senses, written for this project (CC BY 4.0), and an old story."""

BANK: dict[str, tuple[str, ...]] = {
    "river": (
        "We pulled the canoe up onto the grassy bank.",
        "The river burst its bank after three days of rain.",
        "An otter slid down the muddy bank into the water.",
        "Willows lean over the bank where the stream bends.",
        "He sat on the bank all morning and caught nothing.",
        "The ferry drifted until it touched the far bank.",
        "Reeds grow thick along this bank of the lake.",
        "She slipped on the bank and got both boots wet.",
        "The flood carried away part of the eastern bank.",
        "Children skipped stones from the bank at dusk.",
        "A heron stood motionless near the bank.",
        "Erosion has eaten two metres of the bank since spring.",
        "The path follows the left bank as far as the weir.",
        "Cattle come down to the bank to drink in the evening.",
        "They camped on a sandy bank above the rapids.",
        "The boat was moored to a post on the bank.",
        "Kingfishers nest in holes dug into the steep bank.",
        "We swam across and rested on the opposite bank.",
        "Wild mint covers the bank below the old mill.",
        "The current is slower close to the bank.",
        "Fishermen lined the bank on the first day of the season.",
        "From the bank you could see trout under the bridge.",
        "The bank was slippery with wet leaves.",
        "Her dog ran along the bank, barking at the ducks.",
    ),
    "money": (
        "The bank approved our mortgage on Tuesday.",
        "She deposited the cheque at the bank before lunch.",
        "My bank charges a fee for foreign transfers.",
        "The robbers left the bank with two bags of cash.",
        "He opened a savings account at a small bank.",
        "The central bank raised interest rates again.",
        "I waited an hour to speak to someone at the bank.",
        "The bank refused to extend the loan.",
        "Her first job was as a teller in a bank.",
        "The bank froze his account without warning.",
        "They keep the deeds in a safe at the bank.",
        "The bank failed and its depositors lost everything.",
        "You can withdraw money at any branch of the bank.",
        "An investment bank advised them on the merger.",
        "The bank sent me a new credit card.",
        "Regulators fined the bank for hiding its losses.",
        "He owes the bank more than the house is worth.",
        "The bank closes at four on Fridays.",
        "She asked the bank for a statement of her balance.",
        "A bank clerk counted the notes twice.",
        "The bank offers students an overdraft without interest.",
        "Shares in the bank fell by a tenth.",
        "The company borrowed from a bank to pay its suppliers.",
        "Online, the bank asks for a password and a code.",
    ),
}
"""The word 'bank', once in each sentence, in two senses: 24 sentences of each."""

ALICE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or \
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and \
what is the use of a book,” thought Alice “without pictures or conversations?”

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and \
stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the \
daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the \
Rabbit say to itself, “Oh dear! Oh dear! I shall be late!” (when she thought it over afterwards, it occurred to \
her that she ought to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit \
actually took a watch out of its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her \
feet, for it flashed across her mind that she had never before seen a rabbit with either a waistcoat-pocket, or \
a watch to take out of it, and burning with curiosity, she ran across the field after it, and fortunately was \
just in time to see it pop down a large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again.

The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that \
Alice had not a moment to think about stopping herself before she found herself falling down a very deep well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down to look \
about her and to wonder what was going to happen next. First, she tried to look down and make out what she was \
coming to, but it was too dark to see anything; then she looked at the sides of the well, and noticed that they \
were filled with cupboards and book-shelves; here and there she saw maps and pictures hung upon pegs. She took \
down a jar from one of the shelves as she passed; it was labelled “ORANGE MARMALADE”, but to her great \
disappointment it was empty: she did not like to drop the jar for fear of killing somebody underneath, so \
managed to put it into one of the cupboards as she fell past it.
"""
"""The opening of Alice's Adventures in Wonderland (Lewis Carroll, 1865; in the public domain): some 450 words."""
