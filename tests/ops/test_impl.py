"""How an engine is chosen, with engines made for the purpose."""

import pytest

from nondual.ops.impl import Engine, Limit, Preference, choose, refusal


def at_most(most: int) -> Limit:
    return Limit(f"up to {most}", lambda x: f"x must be at most {most}, got {x}" if x > most else None)


def positive(x: float) -> str | None:
    return None if x > 0 else "x must be positive"


ENGINES = {
    "fast": Engine(lambda x: ("fast", x), "quick", (at_most(10), Limit("positive", positive, RuntimeError))),
    "rare": Engine(lambda x: ("rare", x), "odd numbers", auto=Preference("odd", lambda x: x % 2 == 1)),
    "slow": Engine(lambda x: ("slow", x), "all"),
}


@pytest.mark.parametrize(
    "x, taken", [(3, "fast"), (10, "fast"), (11, "rare"), (12, "slow"), (-1, "rare"), (-2, "slow")]
)
def test_auto_takes_the_first_that_refuses_nothing_and_is_meant_for_these_inputs(x, taken):
    assert choose("auto", ENGINES, x).run(x) == (taken, x)


def test_an_engine_asked_for_by_name_runs_or_raises_the_sentence_of_its_limit():
    assert choose("rare", ENGINES, 4).run(4) == ("rare", 4), "what auto prefers does not bind a name"
    with pytest.raises(ValueError, match="x must be at most 10, got 11"):
        choose("fast", ENGINES, 11)
    with pytest.raises(RuntimeError, match="x must be positive"):
        choose("fast", ENGINES, -1)
    assert refusal(ENGINES["fast"], 5) is None


def test_a_name_that_is_no_engine():
    with pytest.raises(ValueError, match=r"impl must be one of \['auto', 'slow', 'rare', 'fast'\], got 'swift'"):
        choose("swift", ENGINES, 1)


def test_where_no_engine_can_auto_takes_what_stands_apart():
    limited = {"fast": ENGINES["fast"]}
    apart = Engine(lambda x: ("apart", x), "the last resort")
    assert choose("auto", limited, 11, otherwise=apart) is apart
    assert choose("auto", limited, 5, otherwise=apart) is limited["fast"]
    with pytest.raises(ValueError, match="at most 10"):
        choose("fast", limited, 11, otherwise=apart)
