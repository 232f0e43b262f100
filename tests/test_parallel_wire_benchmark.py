"""The bytes that leave an interface, beside those that a rank counts: the benchmark's guard, and what it found."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import parallel_wire
from nondual.parallel.demo import ways

MEASURED = Path(__file__).parent.parent / "docs/measured/parallel_wire.json"


def test_without_the_command_ip_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(parallel_wire.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="run it on Linux, as root, with the command ip"):
        parallel_wire.main([])


def test_the_wire_carries_what_is_counted_and_a_little_more():
    found = json.loads(MEASURED.read_text())["figures"]["ways"]
    assert set(found) == {way.name for way in ways(2)}
    for way in ways(2):
        for rank, of_rank in enumerate(found[way.name]):
            assert of_rank["counted"] == sum(way.sent(rank))
            assert 0 < of_rank["wire"] / of_rank["counted"] - 1 < (0.03 if "state" in way.name else 0.005)
