"""Pairs of words that stand in one relation, for five relations, as "dog" and "chien" do in translation.

Source: written by hand for this project. Licence: CC BY 4.0.

    French     an English noun or adjective and its French translation, without an article
    opposite   an adjective, adverb or noun and its opposite
    capital    a country and its capital
    plural     a noun and its plural; a third of them are irregular
    past       a verb and its simple past; half of them are irregular

Within a relation no question comes twice, and no answer does either, so that one answer tells which pair was meant.
"""


def _pairs(written: str) -> tuple[tuple[str, str], ...]:
    """A pair for each word of the text; an underscore stands for a space."""
    return tuple((a.replace("_", " "), b.replace("_", " ")) for a, b in (word.split("-") for word in written.split()))


WORD_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "French": _pairs(
        """
        dog-chien cat-chat horse-cheval cow-vache bird-oiseau fish-poisson house-maison door-porte window-fenêtre
        chair-chaise book-livre water-eau bread-pain milk-lait cheese-fromage wine-vin sugar-sucre
        salt-sel apple-pomme tree-arbre flower-fleur sun-soleil moon-lune star-étoile sky-ciel sea-mer
        river-rivière mountain-montagne fire-feu snow-neige rain-pluie wind-vent day-jour night-nuit week-semaine
        month-mois year-année mother-mère father-père brother-frère sister-sœur friend-ami king-roi queen-reine
        head-tête hand-main foot-pied eye-œil heart-cœur white-blanc black-noir red-rouge green-vert blue-bleu
        big-grand small-petit new-nouveau old-vieux good-bon bad-mauvais
        """
    ),
    "opposite": _pairs(
        """
        hot-cold big-small up-down left-right good-bad fast-slow open-closed happy-sad day-night light-dark
        high-low hard-soft rich-poor young-old wet-dry strong-weak full-empty early-late long-short true-false
        thick-thin clean-dirty easy-difficult heavy-lightweight near-far inside-outside always-never win-lose
        love-hate black-white north-south east-west begin-end first-last push-pull buy-sell question-answer
        life-death war-peace friend-enemy success-failure future-past wide-narrow sharp-blunt sweet-bitter
        brave-cowardly loud-quiet male-female public-private major-minor positive-negative maximum-minimum
        """
    ),
    "capital": _pairs(
        """
        France-Paris Germany-Berlin Italy-Rome Spain-Madrid Portugal-Lisbon Greece-Athens Austria-Vienna
        Hungary-Budapest Poland-Warsaw Russia-Moscow Ukraine-Kyiv Sweden-Stockholm Norway-Oslo Finland-Helsinki
        Denmark-Copenhagen Ireland-Dublin Belgium-Brussels Netherlands-Amsterdam Switzerland-Bern Turkey-Ankara
        Egypt-Cairo Morocco-Rabat Kenya-Nairobi Ethiopia-Addis_Ababa Ghana-Accra Nigeria-Abuja India-New_Delhi
        Nepal-Kathmandu China-Beijing Japan-Tokyo Thailand-Bangkok Vietnam-Hanoi Indonesia-Jakarta Iran-Tehran
        Iraq-Baghdad Syria-Damascus Lebanon-Beirut Jordan-Amman Canada-Ottawa Mexico-Mexico_City Cuba-Havana
        Peru-Lima Chile-Santiago Argentina-Buenos_Aires Colombia-Bogotá Australia-Canberra Romania-Bucharest
        Bulgaria-Sofia Serbia-Belgrade Croatia-Zagreb
        """
    ),
    "plural": _pairs(
        """
        cat-cats house-houses tree-trees book-books river-rivers city-cities baby-babies box-boxes church-churches
        dog-dogs car-cars apple-apples window-windows story-stories party-parties class-classes dish-dishes
        horse-horses hand-hands bird-birds country-countries family-families watch-watches bus-buses friend-friends
        letter-letters road-roads doctor-doctors idea-ideas island-islands
        man-men woman-women child-children foot-feet tooth-teeth mouse-mice goose-geese person-people wolf-wolves
        leaf-leaves knife-knives life-lives wife-wives half-halves shelf-shelves loaf-loaves thief-thieves
        """
    ),
    "past": _pairs(
        """
        walk-walked play-played open-opened close-closed call-called help-helped look-looked ask-asked work-worked
        live-lived move-moved want-wanted need-needed start-started stop-stopped try-tried carry-carried
        study-studied watch-watched love-loved turn-turned follow-followed visit-visited change-changed
        go-went come-came see-saw take-took give-gave make-made know-knew think-thought find-found tell-told
        say-said get-got write-wrote run-ran eat-ate drink-drank sing-sang swim-swam begin-began break-broke
        speak-spoke drive-drove fly-flew buy-bought bring-brought teach-taught catch-caught sleep-slept keep-kept
        """
    ),
}
"""For each relation its pairs (question, answer)."""
