"""The demo shows what is so, under a real torchrun too, and fails where it is not."""

import contextlib
import io
import re

from nondual.parallel import demo
from nondual.parallel.cost import Sent

TORCHRUN = """
    import sys
    from torch.distributed.run import main

    main(sys.argv[1:])
"""


def everything(rank, size):
    """Every row of a shorter sequence, what it prints, and its status where a result may not differ at all."""
    demo.LENGTH = 101
    rows, printed = demo.measured("cpu"), io.StringIO()
    demo.NEAR = -1.0
    with contextlib.redirect_stdout(printed):
        status = demo.shown(rows, "cpu")
    return [[row._asdict() for row in rows], status, printed.getvalue()]


def test_every_number_of_ranks_is_right_and_what_is_not_fails(in_ranks):
    for size, ranks in in_ranks(everything, sizes=(1, 3, 4, 5), timeout=150).items():
        found = [
            demo.Row(**row | {"sent": Sent(*row["sent"]), "formula": Sent(*row["formula"])})
            for rows, *_ in ranks
            for row in rows
        ]
        assert len(found) == size * (2 if size == 5 else 3)  # 5 ranks do not divide 12 heads
        assert sum(row.rows for row in found if row.way == "ring attention") == 101
        assert demo.wrong(found) == []
        assert all(sum(row.sent) > 0 for row in found) or size == 1
        assert [status for _, status, _ in ranks] == [1] * size
        assert "not right:\nring attention: rank 0 differs from one device by" in ranks[0][2]
        assert ("all-to-all attention is left out: 5 ranks do not divide 12 heads" in ranks[0][2]) == (size == 5)
        assert all(text == "" for _, _, text in ranks[1:])


def test_what_is_not_right_is_said():
    row = demo.Row("ring attention", 1, 500, 64_000, Sent(10, 20), Sent(10, 20), 1e-15, 1e-15)
    assert demo.wrong([row]) == []
    assert demo.wrong([row._replace(formula=Sent(10, 21))]) == [
        "ring attention: rank 1 sent (10, 20) bytes, by the formula (10, 21)"
    ]
    for worse in ({"output": 1e-3}, {"gradient": 1e-3}, {"output": float("nan")}, {"gradient": float("nan")}):
        (said,) = demo.wrong([row._replace(**worse)])
        assert said.startswith("ring attention: rank 1 differs from one device by ")
    lines = demo.table([row._replace(rank=0), row]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.match(r"ring attention +0 +500 +64,000 +10 +20 +yes +1\.0e-15", lines[1])


def test_torchrun_starts_it(in_a_process_of_its_own):
    given = ("--standalone", "--nproc-per-node", "2", "-m", "nondual.parallel.demo")
    done = in_a_process_of_its_own(TORCHRUN, *given, timeout=150, env={"OMP_NUM_THREADS": "1"})
    assert "one sequence of 1000 positions over 2 ranks, by gloo on cpu, in float64" in done.stdout
    assert done.stdout.count(" yes ") == 6 and " no " not in done.stdout
    assert done.stdout.rstrip().endswith("everything is right, to 1e-09")


def test_without_torchrun_one_sentence_says_how_to_start_it(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert demo.main() == 2
    assert capsys.readouterr().err == "start it with: torchrun --nproc-per-node 2 -m nondual.parallel.demo\n"
