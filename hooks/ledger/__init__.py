"""The ledger: what each claim came to, and the tie between its verdict, its page and its test.

docs/ledger/A.yml to E.yml are the list, one file an essay.

    claims.py     reads them, and publishes them as claims.json
    stated.py     what the pages state, and its anchors
    evidence.py   what the tests are
    agreement.py  where these three disagree: the build stops at the first two, tests/test_ledger.py asks all three
    table.py      the table of docs/ledger.md, and the verdicts that the home page lists
    essay_map.py  the table of docs/map.md: the files that the essay names, and what stands here in their place

An entry that nobody has reached yet:

    - id: A1.4                 stable: chapters, tests and pages name the claim by it; the letter names the essay
      gist: …                  what the essay says, in our words, with its qualifiers
      how: …                   one way to put it to the test; a better one is welcome
      guess: corrected         our guess before any run: holds, conditional, corrected or reading; it is not evidence
      verdict: null

The same entry, answered. `verdict` is what the run showed, and these lines are added:

      verdict: does not hold   holds | holds if | does not hold | contested | reading | slip
      finding: …               one line: what was found ("holds if": the conditions; "does not hold": what is right)
      confounder: …            where something was trained or timed: the other explanation that it did not rule out
      chapter: essay/self_attention.md
      test: tests/test_self_attention.py::test_equal_projections_score_no_direction      (or a list of them)
      figure: ring             optional: the name of a figure in that chapter
      measured: selective_scan_cpu.json    where it rests on a stored measurement: its file in docs/measured (or a list)
      source: …                a reading has this in place of a test: the locus, and the scholar whose edition was read

On a page, a verdict is a sentence in a `!!! verdict` box: **A1.4 does not hold.**, **A1.3 holds if** …, **A1.6 is a
reading.**; a claim is its id in a `!!! claim` box: **A1.4**. Both get an anchor here. On a test it is a mark:
@pytest.mark.claim("A1.4", "does not hold").
"""
