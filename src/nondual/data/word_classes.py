"""Nouns of two classes each, in three pairs of classes: animals and tools, foods and garments, places and jobs.

Source: written by hand for this project. Licence: CC BY 4.0.

A classification that a language model can know. With names of the classes that say nothing ("foo", "bar") it cannot
know which class has which name, and must take that from examples.
"""

WORD_CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "animals and tools": {
        "animal": tuple(
            """dog cat horse cow sheep pig lion tiger bear wolf rabbit mouse elephant monkey snake eagle duck chicken
            goat deer fox frog camel zebra""".split()
        ),
        "tool": tuple(
            """hammer saw drill knife axe shovel spoon fork needle brush ladder rake scissors pliers wrench chisel
            screwdriver broom bucket pen rope pump razor clamp""".split()
        ),
    },
    "foods and garments": {
        "food": tuple(
            """bread cheese rice soup pasta butter pizza salad cake honey egg sausage potato carrot onion bean pie
            yogurt jam ham steak noodle cookie chocolate""".split()
        ),
        "garment": tuple(
            """shirt coat hat sock shoe dress skirt jacket glove scarf sweater belt boot tie trousers jeans apron vest
            cap robe uniform blouse cloak sandal""".split()
        ),
    },
    "places and jobs": {
        "place": tuple(
            """school church hospital library museum park station market harbour airport castle temple theatre
            restaurant hotel prison factory office bridge garden stadium bakery village island""".split()
        ),
        "job": tuple(
            """teacher doctor farmer lawyer nurse soldier baker painter sailor judge pilot engineer carpenter cook
            butcher singer writer tailor plumber dentist miner waiter driver barber""".split()
        ),
    },
}
"""For each pair of classes the words of the one and of the other, 24 each."""
