"""Name tables: groups of tensors that may be missing."""

import pytest

from twinflow_jax.models.names import KNOWS_R, NameTable, Rule

TABLE = NameTable(
    (
        Rule("blocks.{}.weight", "layers/kernel", layers=2),
        Rule("blocks.{}.second", "layers/second", layers=2, normal=0.0, group=KNOWS_R),
        Rule("second.bias", "second/bias", normal=0.0, group=KNOWS_R),
        Rule("third.weight", "third/kernel", normal=0.02, group="sign"),
    ),
)
SECOND = ("blocks.0.second", "blocks.1.second", "second.bias")


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ((), (*SECOND, "third.weight")), (("blocks.0.weight",), (*SECOND, "third.weight")),
        (("third.weight",), SECOND), (SECOND, ("third.weight",)),
        (SECOND[:1], ("third.weight",)),  # the rest of that group is missing
        ((*SECOND, "third.weight"), ()),
    ],
)
def test_groups_are_added_whole_and_apart(given, added):
    assert TABLE.added(given) == added


def test_what_knows_r():
    assert TABLE.group(KNOWS_R) == set(SECOND)
