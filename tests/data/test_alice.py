"""The story's opening is whole, and each paragraph is one line."""

from nondual.data import ALICE


def test_six_paragraphs_from_the_sister_to_the_jar():
    assert ALICE.startswith("Alice was beginning to get very tired of sitting by her sister on the bank")
    assert ALICE.endswith("so managed to put it into one of the cupboards as she fell past it.\n")
    assert ALICE.count("\n\n") == 5 and 440 <= len(ALICE.split()) <= 470


def test_quotation_marks_are_paired_and_no_line_is_broken():
    assert ALICE.count("“") == ALICE.count("”") > 0
    assert set(ALICE) - {chr(i) for i in range(32, 127)} == set("“”\n")
    assert "  " not in ALICE and all(len(line) > 60 for line in ALICE.split("\n\n"))
