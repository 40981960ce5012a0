"""Block tables of several cache groups: what is held, what is found again, and how much fits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from fakes import FakeRunner
from test_blocks import keys_of
from test_kv_cache import SPEC

from ruvon.config import EngineConfig
from ruvon.engine.blocks import NULL, BlockPool
from ruvon.engine.engine import Engine
from ruvon.engine.grouped_pool import GroupedPool, longest_that_fits, most_blocks
from ruvon.engine.kv_cache import KVFormat, allocate_cache, plan_memory
from ruvon.engine.types import Job, SamplingParams

SIZE = 4


def make(num_blocks=40, windows=(0, 6), longest_chunk=100):
    return GroupedPool(BlockPool(num_blocks, SIZE), windows, longest_chunk)


def computed(grouped, tokens, salt=""):
    """Tables with these tokens computed in one chunk, and published."""
    tables, num_found = grouped.match(keys_of(tokens, SIZE, salt))
    assert grouped.grow(tables, num_found * SIZE, len(tokens)) is not None
    for i, key in enumerate(keys_of(tokens, SIZE, salt)[num_found:], num_found):
        grouped.publish(tables, i, key)
    grouped.leave(tables, len(tokens))
    return tables


def found(grouped, tokens):
    """How many blocks of a prefix are found; they are let go of at once."""
    tables, num_found = grouped.match(keys_of(tokens, SIZE))
    grouped.release(tables)
    return num_found


def test_a_window_keeps_what_the_next_token_sees():
    grouped = make()
    whole, sliding = computed(grouped, range(20))
    # The token at 20 sees 15 to 19, in blocks 3 and 4.
    assert len(whole) == len(sliding) == 5
    assert sliding[:3] == [NULL] * 3
    assert NULL not in [*whole, *sliding[3:]]
    assert grouped.pool.num_free == 40 - 5 - 2
    grouped.pool.check([whole, sliding])


def test_it_gives_back_nothing_that_is_still_seen():
    grouped = make()
    tables = computed(grouped, range(8))
    leaves_at = 0
    for end in range(8, 40):
        assert grouped.grow(tables, end, end + 1) is not None
        first_seen = max(end - 6 + 1, 0) // SIZE
        assert NULL not in tables[1][first_seen:]
        assert tables[1][:first_seen] == [NULL] * first_seen
        if end + 1 >= leaves_at:
            leaves_at = grouped.leave(tables, end + 1)
        assert NULL not in tables[0]
        grouped.pool.check(tables)
    assert sum(block != NULL for block in tables[1]) <= 3


def test_a_chunk_gets_blocks_for_itself_only():
    grouped = make(longest_chunk=8)
    tables = ([], [])
    added = grouped.grow(tables, 0, 40)
    assert [len(blocks) for blocks in added] == [10, 2]
    grouped.leave(tables, 8)
    assert [len(blocks) for blocks in grouped.grow(tables, 8, 40)] == [0, 2]


def test_growth_that_does_not_fit_changes_nothing():
    grouped = make(num_blocks=5)
    tables = ([], [])
    assert grouped.grow(tables, 0, 12) is None
    assert tables == ([], [])
    assert grouped.grow(tables, 0, 8) is not None
    grouped.pool.check(tables)


def test_a_prefix_is_found_where_its_last_window_is():
    grouped = make()
    tables = computed(grouped, range(20))
    again, num_found = grouped.match(keys_of(range(20), SIZE))
    assert num_found == 5
    assert again[0] == tables[0]
    assert again[1] == tables[1]
    grouped.pool.check([*tables, *again])


def test_what_has_left_the_window_is_found_until_it_is_evicted():
    grouped = make(num_blocks=20)
    tables = computed(grouped, range(20))
    prefix = [*range(12), 99, 99, 99, 99, 99]  # another, from the fourth block on
    assert found(grouped, prefix) == 3
    others = []
    assert grouped.pool.grow(others, grouped.pool.num_free * SIZE)  # evicts all that is idle
    assert found(grouped, prefix) == 0
    assert found(grouped, range(20)) == 5
    grouped.pool.check([*tables, others])


def test_a_hole_in_the_window_makes_a_shorter_prefix():
    grouped = make(windows=(0, 6, 11))
    tables = computed(grouped, range(40))
    keys = keys_of(range(40), SIZE)
    grouped.release(tables)
    for hole in (9, 8):
        del grouped.pool._published[keys[hole] + b"\2"]  # of the third group
    # Eight blocks: the token at 32 sees 22 to 31 of it, in blocks 5 to 7.
    assert found(grouped, range(40)) == 8
    del grouped.pool._published[keys[6] + b"\1"]
    # The second group sees 27 to 31 after eight blocks, 23 to 27 after seven, 19 to 23 after six.
    assert found(grouped, range(40)) == 6
    del grouped.pool._published[keys[3]]
    assert found(grouped, range(40)) == 3


def test_a_model_that_slides_everywhere_finds_the_longest_prefix_that_is_left():
    grouped = make(num_blocks=40, windows=(6,))
    grouped.release(computed(grouped, range(40)))
    assert found(grouped, range(40)) == 10
    keys = keys_of(range(40), SIZE)
    del grouped.pool._published[keys[8]]
    assert found(grouped, range(40)) == 8
    del grouped.pool._published[keys[0]]
    assert found(grouped, range(40)) == 8


def test_groups_do_not_find_each_others_blocks():
    grouped = make()
    tables = computed(grouped, range(4))
    ((whole,), (sliding,)) = tables
    assert whole != sliding
    again, _ = grouped.match(keys_of(range(4), SIZE))
    assert again == ([whole], [sliding])


@pytest.mark.parametrize("windows", [(0,), (6,), (0, 6), (0, 0, 3, 9)])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_nobody_ever_holds_more_than_was_said(windows, chunk):
    rng = random.Random(chunk)
    for _ in range(20):
        length, grouped = rng.randrange(1, 90), make(400, windows, chunk)
        tables, most, end = tuple([] for _ in windows), 0, 0
        while end < length:
            assert grouped.grow(tables, end, length) is not None
            most = max(most, 400 - grouped.pool.num_free)
            end += rng.randint(1, min(chunk, length - end))
            grouped.leave(tables, end)
        assert most <= most_blocks(length, SIZE, windows, chunk)
        grouped.release(tables)
        assert grouped.pool.num_free == 400


def test_the_longest_that_fits_is_as_said():
    windows, chunk = (0, 6, 6), 5
    for num_blocks in range(1, 40):
        longest = longest_that_fits(num_blocks, 90, SIZE, windows, chunk)
        assert longest == 0 or most_blocks(longest, SIZE, windows, chunk) <= num_blocks
        assert longest == 90 or most_blocks(longest + 1, SIZE, windows, chunk) > num_blocks


# ------------------------------------------------------------------------------ how much fits

GPT_OSS = replace(SPEC, num_layers=24, windows=(128, 0) * 12, max_positions=1 << 20)
WHOLE = replace(GPT_OSS, windows=(0,) * 24)


def planned(spec, **settings):
    settings = {"kv_cache_memory": "256MiB", "max_num_batched_tokens": 512} | settings
    config = EngineConfig(**settings)
    return plan_memory(spec, config, KVFormat(torch.float16), weight_bytes=0, free_bytes=0)


def test_half_of_the_layers_sliding_is_twice_the_sequences():
    sliding, whole = planned(GPT_OSS), planned(WHOLE)
    assert sliding.cache_bytes == pytest.approx(whole.cache_bytes, rel=0.01)
    long = [replace(plan, max_model_len=16_384) for plan in (sliding, whole)]
    assert long[0].max_concurrency > 1.95 * long[1].max_concurrency
    assert long[0].num_tokens > 1.95 * long[1].num_tokens
    assert sliding.max_model_len > 1.9 * whole.max_model_len  # a chunk needs some room


def test_layers_of_different_groups_share_memory():
    plan = planned(GPT_OSS, kv_cache_memory="4MiB")
    cache = allocate_cache(GPT_OSS, plan, torch.device("cpu"))
    assert len(cache) == 24
    assert len({keys.data_ptr() for keys, _ in cache}) == 12
    assert cache[0][0].data_ptr() == cache[1][0].data_ptr() != cache[2][0].data_ptr()
    size = 2 * 12 * cache[0][0].nbytes
    assert size == plan.cache_bytes <= 4 << 20


def most_at_once(windows, num_blocks):
    """How many of many long requests a cache answers side by side."""
    config = EngineConfig(
        block_size=SIZE, max_num_seqs=64, max_num_batched_tokens=64, enable_prefix_caching=False
    )
    engine = Engine(
        FakeRunner(SIZE, windows=windows), config,
        max_model_len=320, num_blocks=num_blocks, windows=windows, vocab_size=300,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=40)
    for k in range(30):
        engine.add(Job((97 + k,) * 260, sampling), 0.0)
    most = 0
    while engine.has_work:
        engine.collect(engine.launch(0.0))
        decoding = [s for s in engine._scheduler.running.values() if s.num_output]
        most = max(most, len(decoding))
    return most


def test_a_cache_serves_twice_as_many_long_requests():
    """Blocks of half as many layers are twice as many."""
    whole, sliding = most_at_once((0,), 400), most_at_once((0, 8), 800)
    assert whole >= 4
    assert sliding >= 1.8 * whole
