"""Whole models as graphs: right, and the same to the last bit however the work is cut."""

import gc
import os
import threading
import weakref

import pytest
import torch
from cpu_models import BLOCKS, PAGE, VOCAB, Prompts, Shape, SmallModel, random_quantized

from ruvon.kernels.cpu import CpuKernels, allocate_cache
from ruvon.kernels.cpu.formats import Form
from ruvon.kernels.cpu.graph import Capture, give_memory, new_instructions, prefetch_links
from ruvon.kernels.cpu.layout import pack
from ruvon.kernels.cpu.operations import add, linear, rms_norm
from ruvon.kernels.cpu.params import Param
from ruvon.kernels.ops import Dense, StepLimits

LIMITS = StepLimits(tokens=300, sequences=8, logit_rows=300, blocks_per_sequence=BLOCKS)
SHAPES = {
    "llama": Shape(),
    "dense llama": Shape(quantized=False),
    "gpt2": Shape(gpt=True, groups=4),
    "dense gpt2": Shape(gpt=True, groups=4, quantized=False),
    "bfloat16 llama": Shape(hidden=50, dim=8, quantized=False, dtype=torch.bfloat16),
    "bfloat16 gpt2": Shape(gpt=True, groups=4, quantized=False, dtype=torch.bfloat16),
    "qwen3, windowed": Shape(qk_norm=True, window=9, dim=32),
    "sinks, odd sizes": Shape(sinks=True, hidden=50, wide=40, dim=8, quantized=False),
    "mixture": Shape(experts=5, wide=64, gpt=True, groups=4),
    "whole groups": Shape(hidden=128, wide=192, dim=64, heads=3, groups=1),
}


def traced():
    """An empty capture, and a tensor that stands for 4 tokens of width 64."""
    made = Capture({Param.TOKENS: 4, Param.LOGIT_ROWS: 4})
    return made, add(made, torch.ones(4, 64), torch.ones(4, 64))


def test_memory_is_given_on_after_the_last_use():
    trace, first = traced()
    second = add(trace, first, first)
    third = add(trace, second, second)
    last = add(trace, third, second)
    values = [trace.value_of(x).read().value for x in (first, second, third, last)]
    give_memory(trace, {values[3]})
    addresses = [value.memory[Form.ROWS].data_ptr() for value in values]
    assert addresses[2] == addresses[0]  # first was read for the last time before
    assert len(set(addresses[1:])) == 3


def test_results_keep_their_memory():
    trace, first = traced()
    second = add(trace, first, first)
    third = add(trace, second, second)
    values = [trace.value_of(x).read().value for x in (first, second, third)]
    give_memory(trace, {values[0]})
    assert len({value.memory[Form.ROWS].data_ptr() for value in values}) == 3


def test_values_are_made_in_the_forms_that_somebody_wants():
    trace, x = traced()
    normed, _ = rms_norm(trace, x, None, torch.ones(64), 1e-5)
    weight = pack(random_quantized(32, 64, 4), None, bf16=False)
    out = linear(trace, normed, weight, None, "none")
    give_memory(trace, {trace.value_of(out).read().value})
    assert trace.value_of(normed).memory.keys() == {Form.INT8}
    assert trace.value_of(out).memory.keys() == {Form.ROWS}
    assert [line.kernel[0] for line in trace.instructions] == ["copy", "norm", "linear"]


def test_each_instruction_knows_the_product_that_follows():
    trace, x = traced()
    first, second = (pack(Dense(torch.ones(64, 64)), None, bf16=False) for _ in range(2))
    once = linear(trace, x, first, None, "none")
    linear(trace, add(trace, once, x), second, None, "none")
    names = [line.kernel[0] for line in trace.instructions]
    tiles = {first.tensors[0].data_ptr(): "first", second.tensors[0].data_ptr(): "second"}
    memory = new_instructions(len(names))
    links = [tiles[link[0].data_ptr()] for link in prefetch_links(trace.instructions, memory)]
    assert names == ["copy", "linear", "copy", "linear"]
    assert links == ["first", "second", "second", "first"]


def test_each_instruction_knows_the_attention_that_follows(cpu):
    instructions = capture(cpu, SHAPES["llama"]).program.instructions
    memory = new_instructions(len(instructions))
    found = [n for n, line in enumerate(instructions) if line.kernel[0] == "attention"]
    assert len(found) > 1  # after the last one comes the first, of the next step
    for n, (*_, told) in enumerate(prefetch_links(instructions, memory)):
        following = next((m for m in found if m > n), found[0])
        assert memory[following].data_ptr() < told.data_ptr() < memory[following][-1].data_ptr()


def fresh_cache(shape, dtype=torch.float16):
    cache = allocate_cache(shape.layers, BLOCKS, shape.groups, PAGE, shape.dim, dtype)
    for layer in cache:
        for tensor in layer:
            tensor.fill_(torch.nan)
    return cache


def capture(kernels, shape, dtype=torch.float16, limits=LIMITS):
    return kernels.capture(
        SmallModel(kernels.ops, shape).forward, fresh_cache(shape, dtype), limits
    )


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def test_logits_equal_the_reference(cpu, reference, shape):
    prompts = Prompts([70, 5, 33])
    batch = prompts.batch((0, 0, 70), (1, 0, 5), (2, 0, 33))
    got = capture(cpu, shape, torch.float32).replay(batch)
    plain = [
        tuple(torch.zeros(BLOCKS, shape.groups, PAGE, shape.dim) for _ in range(2))
        for _ in range(shape.layers)
    ]
    expected = SmallModel(reference, shape).forward(batch, plain)
    if shape.quantized:  # activations are rounded to 8 bits here
        assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.995
    elif shape.dtype == torch.bfloat16:  # and to 8 bits and an exponent here
        assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.9999
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_capturing_equals_computing_at_once(cpu, shape):
    """Fusing and reusing buffers changes nothing."""
    prompts = Prompts([40, 20])
    batch = prompts.batch((0, 0, 40), (1, 0, 20))
    at_once = SmallModel(cpu.ops, shape).forward(batch, fresh_cache(shape))
    graph = capture(cpu, shape)
    for _ in range(2):  # buffers start dirty the second time
        assert torch.equal(graph.replay(batch), at_once)


def test_any_cut_gives_the_same_bits(cpu, shape):
    prompts = Prompts([150, 40, 90])
    whole = capture(cpu, shape).replay(prompts.batch((0, 0, 150))).clone()
    graph = capture(cpu, shape)
    pieces = []
    for start, end in ((0, 1), (1, 17), (17, 18), (18, 100), (100, 149), (149, 150)):
        others = ((1, 0, 40), (2, 0, 90)) if start == 18 else ()
        logits = graph.replay(prompts.batch((0, start, end), *others))
        pieces.append(logits[: end - start].clone())
    assert torch.equal(torch.cat(pieces), whole)


def test_token_by_token_in_any_company(cpu, shape):
    prompts = Prompts([20, 20, 20, 20])
    together, alone = capture(cpu, shape), capture(cpu, shape)
    for at in range(20):
        rows = together.replay(prompts.batch(*((s, at, at + 1) for s in (3, 0, 2, 1)))).clone()
        assert torch.equal(alone.replay(prompts.batch((0, at, at + 1)))[0], rows[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(cpu, shape, threads):
    batch = Prompts([150, 40]).batch((0, 0, 150), (1, 0, 40))
    expected = capture(cpu, shape).replay(batch).clone()
    kernels = CpuKernels(threads)
    try:
        assert torch.equal(capture(kernels, shape).replay(batch), expected)
    finally:
        kernels.close()


@pytest.mark.parametrize("name", [n for n in SHAPES if not n.startswith("bfloat16")])
def test_every_instruction_set_gives_the_same_bits(cpu, lesser, name):
    shape = SHAPES[name]
    batch = Prompts([30, 4]).batch((0, 0, 30), (1, 0, 4))
    expected = capture(cpu, shape).replay(batch).clone()
    assert torch.equal(capture(lesser, shape).replay(batch), expected)


def test_only_the_rows_asked_for(cpu):
    shape, prompts = Shape(), Prompts([30, 4])
    every = capture(cpu, shape).replay(prompts.batch((0, 0, 30), (1, 0, 4))).clone()
    graph = capture(cpu, shape)
    last = graph.replay(prompts.batch((0, 0, 30), (1, 0, 4), every_row=False))
    assert torch.equal(last, every[[29, 33]])
    assert last.shape == (2, VOCAB)
    assert graph.argmax.tolist() == every[[29, 33]].argmax(-1).tolist()


def test_argmax_takes_the_first_of_equals(cpu):
    def flat(batch, cache):
        x = cpu.ops.embed(batch.token_ids, table)
        return cpu.ops.gather_rows(x, batch.logit_rows)

    rows = torch.randn(VOCAB, 333)
    rows[:, [7, 200, 332]] = 9.0
    rows[1, 7] = rows[2, 7] = rows[2, 200] = 0.0
    rows[3, 50] = torch.nan  # found before anything larger, as numpy does
    rows[4, [100, 300]] = torch.inf
    table = cpu.ops.pack(Dense(rows))
    graph = cpu.capture(flat, [], LIMITS)
    prompts = Prompts([5])
    prompts.tokens[0] = [0, 1, 2, 3, 4]
    graph.replay(prompts.batch((0, 0, 5)))
    assert graph.argmax.tolist() == [7, 200, 332, 50, 100]


def test_no_logit_rows(cpu):
    """A chunk of a prompt that is not the last one."""
    shape, prompts = Shape(), Prompts([30])
    graph = capture(cpu, shape)
    batch = prompts.batch((0, 0, 29))
    batch.logit_rows.resize_(0)
    assert graph.replay(batch).shape == (0, VOCAB)
    logits = graph.replay(prompts.batch((0, 29, 30)))
    assert torch.equal(logits[0], capture(cpu, shape).replay(prompts.batch((0, 0, 30)))[29])


def test_a_bad_number_stays_in_its_row(cpu):
    """One sequence's NaN or infinity reaches no other, even through blocks it leaves behind."""
    shape, prompts = Shape(), Prompts([40, 20])
    expected = capture(cpu, shape).replay(prompts.batch((0, 0, 40))).clone()
    model, cache = SmallModel(cpu.ops, shape), fresh_cache(shape)
    graph = cpu.capture(model.forward, cache, LIMITS)
    for keys, values in cache:
        keys[prompts.blocks[1]] = torch.inf
        values[prompts.blocks[1]] = torch.inf
    rows = graph.replay(prompts.batch((1, 19, 20), (0, 0, 40)))
    assert torch.equal(rows[1:], expected)


def test_one_pool_serves_graphs_and_threads(cpu):
    """Steps from several threads wait for each other."""
    shape, prompts = Shape(), Prompts([30, 30])
    batches = [prompts.batch((s, 0, 30)) for s in range(2)]
    expected = [capture(cpu, shape).replay(batch).clone() for batch in batches]
    graphs, right = [capture(cpu, shape) for _ in batches], [0, 0]

    def work(s):
        for _ in range(50):
            right[s] += torch.equal(graphs[s].replay(batches[s]), expected[s])

    threads = [threading.Thread(target=work, args=(s,)) for s in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [50, 50]


def test_closing_ends_the_threads():
    before = threading.active_count()
    kernels = CpuKernels(3)
    assert threading.active_count() == before + 2
    kernels.close()
    assert threading.active_count() == before


def test_a_thread_that_settles_stays_on_its_core():
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    cores, seen = sorted(os.sched_getaffinity(0))[:2], []
    kernels = CpuKernels(2, cores=cores)

    def work():
        kernels.settle()
        seen.append(os.sched_getaffinity(0))
        kernels.ops.add(torch.zeros(1, 32), torch.zeros(1, 32))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    kernels.close()
    assert seen == [{min(os.sched_getaffinity(0))}] * 2


def test_closing_leaves_a_program_that_is_stuck_alone():
    kernels = CpuKernels(2)
    with kernels._pool._busy:
        kernels.close()
    assert kernels._pool.threads == 2
    kernels.close()
    assert kernels._pool.threads == 0


def test_code_stays_while_a_thread_may_be_in_it():
    kernels = CpuKernels(2)
    pool, code = kernels._pool, weakref.ref(kernels._compiled)
    del kernels
    gc.collect()
    assert code() is not None
    pool.close()
    del pool
    gc.collect()
    assert code() is None


def test_a_crowd_of_threads_on_few_cores(cpu):
    """Threads that are held up are not waited for, and do no harm when they come late."""
    shape, prompts = Shape(), Prompts([30, 30, 30])
    batches = [prompts.batch((s, 0, 29 - s)) for s in range(3)]
    expected = [capture(cpu, shape).replay(batch).clone() for batch in batches]
    kernels = CpuKernels(9)
    try:
        for _ in range(20):  # programs come and go while some thread may still be in an old one
            graph = capture(kernels, shape)
            for batch, logits in zip(batches, expected, strict=True):
                assert torch.equal(graph.replay(batch), logits)
    finally:
        kernels.close()
