"""The paged cache and attention of the CPU kernels against plain torch."""

from dataclasses import replace

import pytest
import torch
from cpu_models import ints

from ruvon.errors import ConfigError
from ruvon.kernels.cpu import allocate_cache
from ruvon.kernels.ops import AttentionSpec, ForwardBatch, PagedIndex, Rope

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = {
    # heads, groups, dim, page, window, sinks, rotated pairs, cache
    "smollm": (9, 3, 64, 16, 0, False, 32, F32),
    "half precision": (9, 3, 64, 16, 0, False, 32, F16),
    "brain floats": (4, 4, 80, 32, 0, False, 40, BF16),
    "window and sinks": (4, 2, 32, 16, 7, True, 16, F32),
    "window over spans": (8, 2, 128, 16, 150, True, 64, F32),
    "odd dims, part rotated": (8, 1, 24, 48, 50, False, 5, F32),
    "no rotation": (2, 2, 8, 16, 0, False, 0, F32),
    "many heads share": (40, 1, 32, 16, 0, False, 16, F32),
}
CONTEXTS, NEW = [300, 17, 1, 129, 128], [40, 17, 1, 1, 3]


def make_batch(ids, positions, slots, tables, starts, contexts):
    paged = (PagedIndex(ints(slots), ints(tables)),)
    arrays = map(ints, (starts, contexts, [0]))
    return ForwardBatch(ints(ids), ints(positions), paged, *arrays, 0, max(contexts))


class World:
    """Two caches of the same content, the CPU's and the reference's, and sequences in them."""

    def __init__(self, case, cpu, reference):
        torch.manual_seed(0)
        heads, groups, dim, page, window, sinks, pairs, self.dtype = case
        self.cpu, self.reference, self.page = cpu.ops, reference, page
        self.spec = AttentionSpec(heads, groups, dim, dim**-0.5, window)
        self.rope = Rope(torch.randn(512, pairs), torch.randn(512, pairs)) if pairs else None
        self.norms = torch.randn(dim), torch.randn(dim)
        self.sinks = torch.randn(heads) if sinks else None
        counts = [-(-context // page) for context in CONTEXTS]
        numbers = [n for n in torch.randperm(sum(counts) + 3).tolist() if n]  # 0 is nobody's
        self.tables = [[numbers.pop() for _ in range(count)] for count in counts]
        self.caches = allocate_cache(1, sum(counts) + 3, groups, page, dim, self.dtype)[0]
        for cache in self.caches:
            cache.fill_(torch.nan)  # what was never written must not be looked at
        shape = (sum(counts) + 3, groups, page, dim)
        self.plain = torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)

    def batch(self, chunks):
        """Chunks (sequence, start, end)."""
        places = [(s, at) for s, start, end in chunks for at in range(start, end)]
        slots = [self.tables[s][at // self.page] * self.page + at % self.page for s, at in places]
        starts = [0]
        for _, start, end in chunks:
            starts.append(starts[-1] + end - start)
        widest = max(len(table) for table in self.tables)
        tables = [self.tables[s] + [0] * (widest - len(self.tables[s])) for s, *_ in chunks]
        contexts = [end for *_, end in chunks]
        positions = [at for _, at in places]
        return make_batch([0] * len(places), positions, slots, tables, starts, contexts)

    def write(self, batch):
        """Random keys and values into both caches; the queries of both."""
        heads = self.spec.num_heads + 2 * self.spec.num_kv_heads
        qkv = torch.randn(batch.positions.numel(), heads * self.spec.head_dim)
        rest = self.spec, self.rope, *self.norms, 1e-6
        got = self.cpu.write_kv(qkv, batch, *self.caches, *rest)
        expected = self.reference.write_kv(qkv, batch, *self.plain, *rest)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        return got, expected

    def fill(self):
        """All of every sequence but its last new tokens, then those: their batch and queries."""
        spans = list(zip(range(len(CONTEXTS)), CONTEXTS, NEW, strict=True))
        self.write(self.batch([(s, 0, end - new) for s, end, new in spans if end > new]))
        batch = self.batch([(s, end - new, end) for s, end, new in spans])
        return batch, *self.write(batch)

    def attend(self, q, batch):
        return self.cpu.attention(q, *self.caches, batch, self.spec, self.sinks)


@pytest.fixture(params=CASES)
def world(request, cpu, reference):
    return World(CASES[request.param], cpu, reference)


def test_attention(world):
    batch, got_q, q = world.fill()
    got = world.attend(got_q, batch)
    expected = world.reference.attention(q, *world.plain, batch, world.spec, world.sinks)
    tolerance = 1e-5 if world.dtype == F32 else 2e-3 if world.dtype == F16 else 2e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_what_has_left_the_window_changes_nothing(world):
    """Its blocks are somebody else's by now, or block 0 stands for them, whatever is in there."""
    batch, got_q, _ = world.fill()
    expected = world.attend(got_q, batch)
    index, window = batch.paged[0], world.spec.window
    gone = [(end - new - window + 1) // world.page for end, new in zip(CONTEXTS, NEW, strict=True)]
    if not window:
        pytest.skip("everything is seen")
    tables = index.block_tables.clone()
    for table, num_gone in zip(tables, gone, strict=True):
        table[: max(num_gone, 0)] = 0
    assert (tables != index.block_tables).any()
    needed = {
        block
        for number, table in enumerate(world.tables)
        for block in table[max(gone[number], 0) :]
    }
    for cache in world.caches:
        for block in {*range(len(cache))} - needed:
            cache[block] = torch.nan
    for its in (tables, index.block_tables):
        blind = replace(batch, paged=(replace(index, block_tables=its),))
        assert torch.equal(world.attend(got_q, blind), expected)


def test_a_token_attends_alone_as_in_company(world):
    batch, q, _ = world.fill()
    together = world.attend(q, batch)
    starts = batch.query_starts.tolist()
    for s, start in enumerate(starts[:-1]):
        for t in range(start, starts[s + 1]):
            end = int(batch.positions[t]) + 1
            alone = world.attend(q[t : t + 1].clone(), world.batch([(s, end - 1, end)]))
            assert torch.equal(alone[0], together[t])


def test_what_it_cannot_do_is_refused(cpu):
    def attend(heads, groups, dim, page):
        cache = allocate_cache(1, 2, groups, page, dim, F32)[0]
        batch = make_batch([0], [0], [0], [[0]], [0, 1], [1])
        spec = AttentionSpec(heads, groups, dim, 1.0)
        cpu.ops.attention(torch.zeros(1, heads, dim), *cache, batch, spec, None)

    with pytest.raises(ConfigError, match="--block-size 8"):
        attend(2, 1, 16, 8)
    with pytest.raises(ConfigError, match="heads of 288 dims"):
        attend(2, 1, 288, 16)
    with pytest.raises(ConfigError, match="share"):
        attend(65, 1, 16, 16)
