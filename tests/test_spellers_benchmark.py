"""benchmarks/spellers*.py: sounds in one alphabet, what is counted, and the weights that the page loads."""

import importlib
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from nondual.pretrained import hama  # noqa: E402

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "docs" / "assets" / "models" / "spell.bin"
SHA256 = "258ca27779879535f5020cc47618688f769f0b5c3a0f6c27527e9a5ffc010938"
PLACE = "without the location term"


@pytest.fixture(scope="module")
def modules():
    """The benchmark and its helpers."""
    sys.path.insert(0, str(ROOT))
    try:
        names = ("spellers", "spellers_words", "spellers_looks", "spellers_gates")
        return {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def words(modules):
    return modules["spellers_words"]


@pytest.fixture(scope="module")
def measured():
    return json.loads((ROOT / "docs" / "measured" / "spellers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def speller():
    return hama()


# --- what the page loads ---------------------------------------------------------------------------------------------


def test_the_pages_weights_are_hamas_for_the_latin_letters(modules, speller, tmp_path):
    assert WEIGHTS.stat().st_size < 1_100_000
    assert modules["spellers"].contents(WEIGHTS) == SHA256
    again = tmp_path / "spell.bin"
    modules["spellers"].store(speller, again)
    assert modules["spellers"].contents(again) == SHA256
    stored = modules["spellers"].load(WEIGHTS)
    assert stored.phonemes == speller.phonemes and "'abcdefghijklmnopqrstuvwxyz" == "".join(stored.letters)[:27]
    assert sum(p.numel() for p in stored.model.parameters()) == 528_144
    for name, weight in stored.model.state_dict().items():
        theirs = speller.model.state_dict()[name]
        rows = [speller.letters[letter] for letter in stored.letters] if name == "embedding.weight" else slice(None)
        assert torch.equal(weight, theirs[rows]), name
    asked = ["knight", "attention", "café", "o'clock", "antidisestablishmentarianism"]
    for (ours, weights), (phonemes, of_hama) in zip(stored.spell_all(asked), speller.spell_all(asked), strict=True):
        assert ours == phonemes and torch.equal(weights, of_hama)


def test_the_measured_file_is_of_these_weights(measured):
    assert measured["bytes"] == WEIGHTS.stat().st_size


# --- what was measured -----------------------------------------------------------------------------------------------


def test_longer_words_cost_the_speller_with_one_vector_more(measured):
    """Both have fewer words right as words grow; of the sounds, only the one without attention has fewer right."""
    rows = list(measured["figures"]["by_length"].values())
    for reading in ("strict", "merged", "lenient"):
        short, long = rows[0][reading], rows[-1][reading]
        assert short["hama_less_g2p_en"][2] < 0 < long["hama_less_g2p_en"][1]
        assert all(long[name][2] < short[name][1] for name in ("hama", "g2p_en"))
    short, long = rows[0]["phoneme_errors"], rows[-1]["phoneme_errors"]
    assert long["hama"][2] < short["hama"][1] and long["g2p_en"][1] > 2.4 * short["g2p_en"][2]


def test_short_words_differ_by_those_that_hama_reads_as_another_language(measured):
    for row in list(measured["figures"]["by_length"].values())[:2]:
        others = row["merged_of_the_others"]
        assert abs(others["hama"][0] - others["g2p_en"][0]) < 0.005 and row["hama_reads_as_another_language"][1] > 0.04


def test_the_location_term_is_needed_and_the_pull_is_not(measured):
    found = measured["figures"]["left_out"]
    pull, place, other = (found[name] for name in ("without the pull", PLACE, "letters of another word"))
    assert pull["right_less_trained"][1] > -0.02 and pull["forced_same_letter"][1] > 0.99
    assert place["right"][2] < 0.03 and place["forced_same_letter"][2] < 0.45 and place["forced_onward"][2] < 0.75
    assert found["location term at its mean"]["right"][2] < 0.05  # not for want of numbers of the usual size
    assert other["forced_onward"][1] > 0.96 and other["forced_same_letter"][2] < 0.5  # onward, but to wrong letters
    assert all(found[name]["right"][2] < 0.1 for name in found if name not in ("as trained", "without the pull"))


def test_gates_of_trained_networks_vary_with_what_is_read(measured):
    for name in ("hama", "g2p_en"):
        gates = measured["figures"]["gates"][name]
        z = gates["trained"]["z"]
        assert z["within_units_of_all"] > 0.75 and z["place_of_within"] < 0.3
        assert z["standard_deviation_of_a_unit"] > 3 * gates["new"]["z"]["standard_deviation_of_a_unit"]
        assert (
            gates["trained"]["gain"]["factor_between_words"] > 100 > 10 > gates["new"]["gain"]["factor_between_words"]
        )


# --- what is counted -------------------------------------------------------------------------------------------------


def test_three_alphabets_become_one(words):
    assert words.arpabet(["n", "aɪ", "t"]) == words.arpabet(["N", "AY1", "T"]) == ("N", "AY", "T")
    assert words.arpabet(["b", "ɝ", "d"]) == words.arpabet(["b", "ə", "ɹ", "d"]) == words.arpabet(["B", "ER1", "D"])
    assert words.arpabet(["k", " ", "ʌ", " ", "t"]) == ("K", "AH", "T")
    assert words.arpabet(["x", "u"]) == ("x", "UW")  # no English sound: it stays, and the word is wrong
    caught, cot = [["K", vowel, "T"] for vowel in ("AO", "AA")]
    assert words.arpabet(caught) == words.arpabet(cot) and words.arpabet(caught, "strict") != words.arpabet(
        cot, "strict"
    )
    assert words.arpabet(["IH"]) != words.arpabet(["AH"]) and words.arpabet(["IH"], "lenient") == ("AH",)


def test_every_sound_of_the_dictionary_has_a_sign_in_ipa(words):
    dictionary = words.dictionary()
    sounds = {sound for listed in dictionary.values() for one in listed for sound in one}
    assert len(dictionary) == 117_493 and len(sounds) == 39 and sounds == set(words.IPA.values())
    assert len(dictionary["read"]) == 2  # as in "I read", now and then


def test_changes_are_counted_and_unchanged_sounds_found(words):
    assert words.matched(tuple("kitten"), tuple("sitting")) == (3, [False, True, True, True, False, True])
    assert words.matched((), tuple("ab")) == (2, [])
    assert words.matched(tuple("ab"), ()) == (2, [False, False])


def test_intervals(words):
    assert words.wilson(50, 100) == [0.5, 0.404, 0.596]
    assert words.wilson(0, 10) == [0.0, 0.0, 0.278]
    mean, low, high = words.spread(torch.arange(100.0))
    assert mean == 49.5 and 42 < low < 46 and 53 < high < 57


def test_a_sample_has_its_lengths_and_is_drawn_alike_again(words):
    listed = {word: [] for word in ("abcd", "efgh", "ijkl", "abcdef", "a" * 15, "a" * 17)}
    drawn = words.sample(listed, (4, 15), 2, seed=0)
    assert set(drawn) == {4, 15} and len(drawn[4]) == 2 and set(drawn[15]) == {"a" * 15, "a" * 17}
    assert words.sample(listed, (4, 15), 2, seed=0) == drawn


# --- where it looks --------------------------------------------------------------------------------------------------


def test_a_straight_look_lies_on_the_line(modules):
    straight = modules["spellers_looks"].looks(torch.eye(5))
    assert straight == {"off_line": 0.0, "onward": 1.0, "entropy": 0.0}
    back = modules["spellers_looks"].looks(torch.eye(4).flip(0))
    assert back["off_line"] == 2.0 and back["onward"] == 0.0
    assert modules["spellers_looks"].looks(torch.full((2, 4), 0.25))["entropy"] == pytest.approx(1.3863, abs=1e-4)


def test_given_its_own_phonemes_it_looks_where_it_looked(modules, speller):
    looks, asked = modules["spellers_looks"], ["knight", "throat", "recall"]
    spelled = speller.spell_all(asked)
    unchanged, pull = looks.variants(looks.mean_parts(speller, [asked]))["as trained"]
    given = looks.forced(speller, asked, [phonemes for phonemes, _ in spelled], unchanged, pull)
    for (_, weights), shown in zip(spelled, given, strict=True):
        torch.testing.assert_close(shown, weights, atol=1e-5, rtol=0)


def test_each_change_changes_its_part_alone(modules):
    looks = modules["spellers_looks"]
    parts = {name: torch.randn(2, 3, 4) for name in ("state", "letters", "place")}
    assert torch.equal(looks.without("place")(parts)["place"], torch.zeros(2, 3, 4))
    means = {name: part.mean((0, 1)) for name, part in parts.items()}
    changed = looks.at_mean(means, "state")(parts)
    assert torch.equal(changed["state"][1, 2], means["state"]) and changed["letters"] is parts["letters"]
    assert torch.equal(looks.of_another_word(parts)["letters"][0], parts["letters"][1])


# --- gates -----------------------------------------------------------------------------------------------------------


def test_gates_are_those_of_the_network_and_their_variance_divides(modules):
    from nondual.recurrent import GRU

    gates, (b, n, h) = modules["spellers_gates"], (7, 5, 3)
    torch.manual_seed(0)
    network, x, letters = GRU(4, h), torch.randn(b, n, 4), torch.randint(6, (b, n))
    _, z = gates.gates(network, x)
    states, _ = network(x)
    before = torch.cat([torch.zeros(b, 1, h), states[:, :-1]], 1)
    new = (states - z * before) / (1 - z)
    assert z.shape == (b, n, h) and (new.abs() <= 1).all()  # what z does not keep comes from a tanh
    parts = gates.shares(z, letters)
    assert sum(parts[f"{part}_of_within"] for part in ("place", "letter", "context")) == pytest.approx(1, abs=0.15)
    fixed = gates.gain(torch.full((b, n, h), 0.5))
    assert fixed == {"median_share_kept": 0.0625, "factor_between_words": 1.0}
