"""Collectives of recorded texts: which devices talk, and what runs meanwhile."""

import pytest

from tests.planning.programs import BIG, read
from twinflow_jax.planning.collectives import collectives, replica_groups


def test_overlap_of_recorded_programs():
    found = collectives(read("overlapped"))
    gathers = [one for one in found if one.kind == "all-gather" and one.overlapped]
    assert sum(one.total for one in gathers) == 6 * BIG
    assert all(len(one.covers) == 1 and one.in_loop for one in gathers)
    assert not any(one.overlapped for one in collectives(read("explicit")))
    large = [one for one in collectives(read("cores")) if one.kind != "all-reduce"]
    assert all(one.overlapped and one.covers for one in large)


def test_groups_follow_the_mesh():
    groups = {one.group: one.groups for one in collectives(read("explicit"))}
    assert groups[2] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups[4] == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert groups[8] == (tuple(range(8)),)
    assert {one.groups for one in collectives(read("automatic"))} == {(tuple(range(16)),)}


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups={}, to_apply=%add", ()),
    ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=4] {'a':(1)2}, dimensions={0}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=4] {'a':(2)2}, dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
    ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
])
def test_group_notations(text, groups):
    assert replica_groups(text) == groups
