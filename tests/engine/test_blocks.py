"""The block pool: references, the prefix cache, eviction. Integers only."""

from __future__ import annotations

import random

import pytest

from ruvon.engine.blocks import BlockPool, PrefixCache, block_key, root_key


def keys_of(tokens, size, salt=""):
    keys, parent = [], root_key(salt)
    for start in range(0, len(tokens) - size + 1, size):
        parent = block_key(parent, tokens[start : start + size])
        keys.append(parent)
    return keys


def filled(pool, tokens, salt=""):
    """A table with these tokens computed and published."""
    blocks = []
    assert pool.grow(blocks, len(tokens))
    for block, key in zip(blocks, keys_of(tokens, pool.block_size, salt), strict=False):
        pool.publish(block, key)
    return blocks


def test_grow_takes_only_what_is_missing():
    pool = BlockPool(4, 16)
    blocks = []
    assert pool.grow(blocks, 17)
    assert len(blocks) == 2
    assert pool.grow(blocks, 32)
    assert len(blocks) == 2
    assert pool.num_free == 2
    pool.check([blocks])


def test_grow_that_does_not_fit_changes_nothing():
    pool = BlockPool(2, 16)
    blocks = []
    assert not pool.grow(blocks, 33)
    assert blocks == []
    assert pool.num_free == 2


def test_match_finds_the_longest_published_prefix():
    pool = BlockPool(8, 4)
    first = filled(pool, range(12))
    found = pool.match(keys_of([*range(8), 99, 99, 99, 99], 4))
    assert found == first[:2]
    pool.check([first, found])


def test_a_prefix_is_found_after_its_release_and_survives_a_sharer():
    pool = BlockPool(8, 4)
    tokens = list(range(8))
    first = filled(pool, tokens)
    pool.release(first)
    assert pool.num_free == 8
    one, two = pool.match(keys_of(tokens, 4)), pool.match(keys_of(tokens, 4))
    assert one == two == first
    assert pool.num_free == 6
    pool.release(one)
    assert pool.num_free == 6
    pool.check([two])


def test_equal_tokens_under_another_salt_or_after_another_prefix_are_strangers():
    pool = BlockPool(8, 4)
    filled(pool, [1, 2, 3, 4, 5, 6, 7, 8], salt="tenant")
    assert pool.match(keys_of([1, 2, 3, 4], 4)) == []
    assert pool.match(keys_of([5, 6, 7, 8], 4, salt="tenant")) == []
    assert len(pool.match(keys_of([1, 2, 3, 4], 4, salt="tenant"))) == 1


def test_eviction_takes_the_least_recently_used_and_of_it_the_tail():
    pool = BlockPool(4, 2)
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    old_blocks, new_blocks = filled(pool, old), filled(pool, new)
    pool.release(old_blocks)
    pool.release(new_blocks)
    taken = []
    pool.grow(taken, 2)
    assert taken == [old_blocks[1]]
    assert pool.match(keys_of(old, 2)) == old_blocks[:1]
    assert pool.match(keys_of(new, 2)) == new_blocks


def test_blank_blocks_go_before_cached_ones():
    pool = BlockPool(3, 2)
    cached = filled(pool, [1, 2])
    pool.release(cached)
    taken = []
    pool.grow(taken, 4)
    assert cached[0] not in taken
    assert pool.match(keys_of([1, 2], 2)) == cached


def test_an_evicted_block_is_found_no_more():
    pool = BlockPool(1, 2)
    pool.release(filled(pool, [1, 2]))
    taken = []
    pool.grow(taken, 1)
    assert pool.match(keys_of([1, 2], 2)) == []
    pool.check([taken])


def test_the_second_block_with_the_same_tokens_stays_private():
    pool = BlockPool(4, 2)
    first, second = filled(pool, [1, 2]), filled(pool, [1, 2])
    assert pool.match(keys_of([1, 2], 2)) == first
    pool.release(first)
    pool.release(first)
    pool.release(second)
    pool.check([])


def test_what_is_told_of_the_prefix_cache_is_in_tokens():
    pool = BlockPool(4, 8)
    pool.release(filled(pool, range(32)))
    assert pool.prefix_cache == PrefixCache(32, 0, 0)
    pool.grow([], 17)
    assert pool.prefix_cache == PrefixCache(32, 24, 0)
    pool.forget()
    assert pool.prefix_cache == PrefixCache(32, 24, 1)


def test_a_pool_goes_on_from_where_another_was():
    pool, other = BlockPool(5, 2), BlockPool(5, 2)
    first = filled(pool, [1, 2, 3, 4])
    second = pool.match(keys_of([1, 2], 2))  # its block is held twice
    pool.release(filled(pool, [7, 8]))
    tables = [first, second]
    other.restore(pool.state(), tables)
    other.check(tables)
    assert other.state() == pool.state()
    for table in tables:
        other.release(table)
    other.check([])
    assert other.num_free == 5
    assert other.match(keys_of([1, 2, 3, 4], 2)) == first


def test_forget_keeps_what_is_held():
    pool = BlockPool(4, 2)
    held, idle = filled(pool, [1, 2]), filled(pool, [3, 4])
    pool.release(idle)
    pool.forget()
    assert pool.match(keys_of([1, 2], 2)) == []
    assert pool.match(keys_of([3, 4], 2)) == []
    pool.check([held])
    pool.release(held)
    assert pool.num_free == 4


def test_keys_tell_order_salt_and_parent_apart():
    root = root_key("")
    keys = {
        block_key(root, [1, 2]),
        block_key(root, [2, 1]),
        block_key(root_key("x"), [1, 2]),
        block_key(block_key(root, [1, 2]), [1, 2]),
    }
    assert len(keys) == 4
    assert block_key(root, (1, 2)) in keys


def test_check_notices_a_block_that_was_lost():
    pool = BlockPool(2, 2)
    blocks = []
    pool.grow(blocks, 2)
    with pytest.raises(RuntimeError, match="lost"):
        pool.check([])


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_the_books_straight(seed):
    rng = random.Random(seed)
    pool = BlockPool(12, 2)
    tables: list[list[int]] = []
    for _ in range(2000):
        if tables and rng.random() < 0.4:
            pool.release(tables.pop(rng.randrange(len(tables))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
            keys = keys_of(tokens, 2)
            blocks = pool.match(keys)
            if pool.grow(blocks, len(tokens)):
                for block, key in list(zip(blocks, keys, strict=False)):
                    pool.publish(block, key)
                tables.append(blocks)
            else:
                pool.release(blocks)
        pool.check(tables)
    for blocks in tables:
        pool.release(blocks)
    assert pool.num_free == 12
