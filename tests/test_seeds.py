"""All 64 bits of a seed count, and smaller seeds draw what they always drew."""

import itertools

import jax
import numpy as np
import pytest

from twinflow_jax import data, seeds
from twinflow_jax.errors import UserError

SOME = (0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**50, 2**50 + 42, 2**63 - 1, 2**63, 2**64 - 1)


def test_keys_are_those_of_jax_with_64_bits():
    mine = [jax.random.key_data(seeds.key(seed)) for seed in SOME]
    with jax.enable_x64(True):
        theirs = [jax.random.key_data(jax.random.key(np.uint64(seed))) for seed in SOME]
    np.testing.assert_array_equal(mine, theirs)
    for seed in SOME[:5]:
        np.testing.assert_array_equal(jax.random.key_data(jax.random.key(seed)), [0, seed])


def test_a_key_is_the_same_where_it_is_traced():
    draw = lambda seed: jax.random.bits(jax.random.fold_in(seeds.key(seed), 7))
    for seed in SOME:
        assert jax.jit(draw, static_argnums=0)(seed) == draw(seed)


def test_data_has_an_order_of_its_own_for_each_seed():
    def read(rows, seeds):
        return {"x": rows, "drawn": [np.random.default_rng(seed).integers(2**32) for seed in seeds]}

    found = {}
    for seed in SOME:
        [(_, batch)] = itertools.islice(data.batches([[data.Stream(50, read)]], 10, seed, 7), 1)
        found[seed] = tuple(batch["x"]), tuple(batch["drawn"])
    assert len({rows for rows, _ in found.values()}) == len(SOME)
    assert len({drawn for _, drawn in found.values()}) == len(SOME)
    for seed in SOME[:3]:
        order = np.random.default_rng((seed, 1, 0)).permutation(50)[20:30]
        rows = [np.array([seed, 1, 0, row]) for row in order]
        drawn = [np.random.default_rng(row).integers(2**32) for row in rows]
        assert found[seed] == (tuple(order), tuple(drawn))


@pytest.mark.parametrize("text", ["-1", str(2**64), "1.5", "", "cat", "1e3"])
def test_what_is_no_seed_is_refused(text):
    with pytest.raises(UserError, match="the seed is .*; give a whole number from 0 to 1844674407"):
        seeds.parse(text)


def test_seeds_are_read_whole():
    assert [seeds.parse(str(seed)) for seed in SOME] == list(SOME)
