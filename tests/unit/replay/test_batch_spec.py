import pytest

from replay.batch_spec import BatchSpec
from system.errors import ConfigError


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch": 0}, "batch"),
        ({"length": 0}, "length"),
        ({"context": -1}, "context"),
        ({"stride": 0}, "stride"),
        ({"pair": -1}, "pair"),
        ({"pair": 3}, "pair"),
        ({"pair": 3, "length": 2, "stride": 2}, "pair"),
        ({"pair": 3, "length": 2, "context": 1}, "pair"),
        ({"goal": True}, "goal"),
    ],
)
def test_a_batch_that_is_none_is_refused_by_name(wrong: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        BatchSpec(**{"batch": 4, "length": 8} | wrong)  # type: ignore[arg-type]


def test_the_span_reaches_from_the_first_to_the_last_row() -> None:
    assert BatchSpec(batch=4, length=8, context=1).span == 9
    assert BatchSpec(batch=4, length=8, context=1, stride=3).span == 25
    assert BatchSpec(batch=4, length=2, pair=7).span == 8
    assert BatchSpec(batch=4, length=8, context=1, stride=3).time == 9
    assert BatchSpec(batch=4, length=8, context=1).rows == 32
