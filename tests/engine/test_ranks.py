"""Plans on their way to ranks, and what becomes of steps that some of them fail."""

from __future__ import annotations

import random
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import pytest
from fakes import ByteTokenizer, FakeRunner, emissions_of
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import thread_ranks

from ruvon.engine.grammar import Grammars
from ruvon.engine.ranks import process
from ruvon.engine.ranks import runner as ranks_runner
from ruvon.engine.ranks.codec import decode_plan, decode_result, encode_plan, encode_result
from ruvon.engine.ranks.nodes import prove, receive
from ruvon.engine.ranks.process import device_environments, share_cores, shares
from ruvon.engine.ranks.ring import PLACE, PlanRing, RingReader
from ruvon.engine.ranks.start import slowest
from ruvon.engine.ranks.steps import Meetings, RankError, Report, Step, why_parted
from ruvon.engine.types import (
    BEING_SAMPLED,
    Chunk,
    Job,
    NewSequence,
    Plan,
    PooledRows,
    PromptRow,
    SamplingParams,
    StepResult,
    TokenLogprobs,
)
from ruvon.errors import ConfigError, EngineDeadError
from ruvon.grammars import regex

LONG = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def run(engine) -> dict[int, list[int]]:
    """What is queued to its end, as many steps at once as the runner takes; tokens by sequence."""
    tokens: dict[int, list[int]] = {}
    for emission in emissions_of(engine):
        tokens.setdefault(emission.seq_id, []).extend(emission.tokens)
        if emission.error:
            tokens[emission.seq_id].append(-1)
    return tokens


def jobs(count: int = 6) -> list[Job]:
    drawn = random.Random(3)
    return [
        Job(tuple(drawn.randrange(97, 108) for _ in range(1 + 7 * i)), LONG) for i in range(count)
    ]


def make_runner(rank: int = 0) -> FakeRunner:
    return FakeRunner(16, depth=2)


def test_ranks_give_the_tokens_of_one_runner(make_engine):
    alone = make_engine(make_runner())
    for job in jobs():
        alone.add(job, 0.0)
    with thread_ranks(make_runner, 3) as (ranks, _):
        engine = make_engine(ranks)
        for job in jobs():
            engine.add(job, 0.0)
        assert run(engine) == run(alone)


@pytest.mark.parametrize("where", ["launch", "run"])
@pytest.mark.parametrize("on", [(0,), (1,), (0, 1)])
def test_a_step_that_raises_on_some_ranks_fails_and_nothing_else(make_engine, where, on):
    def make(rank: int) -> FakeRunner:
        runner = make_runner()
        if rank in on:
            runner.failing[3] = where
        return runner

    with thread_ranks(make) as (ranks, _):
        engine = make_engine(ranks, max_num_seqs=2)
        for job in jobs():
            engine.add(job, 0.0)
        tokens = run(engine)
        assert ranks.num_failures == 1
        assert not ranks.lost
    failed = [seq_id for seq_id, its in tokens.items() if its[-1] == -1]
    assert failed == [0, 1]  # they ran in the third step
    alone = make_engine(make_runner(), max_num_seqs=2)
    for job in jobs():
        alone.add(job, 0.0)
    right = run(alone)
    assert {i: its for i, its in tokens.items() if i not in failed} == {
        i: its for i, its in right.items() if i not in failed
    }


def launch_one(make_engine, ranks):
    engine = make_engine(ranks)
    engine.add(jobs(1)[0], 0.0)
    return engine, engine.launch(0.0)


def test_a_rank_that_is_gone_ends_the_engine_at_once(make_engine):
    with thread_ranks(lambda rank: FakeRunner(by_hand=True)) as (ranks, threads):
        engine, pending = launch_one(make_engine, ranks)
        threads[1].kill()
        with pytest.raises(EngineDeadError, match="RankError"):
            engine.collect(pending)
        assert "rank 1 was killed" in str(engine.dead)
        assert str(ranks.failed.exception(5)) == "rank 1 was killed"
        with pytest.raises(EngineDeadError):
            engine.add(jobs(1)[0], 0.0)
    assert isinstance(ranks.launch(Plan(1, ())).exception(), RankError)


def test_a_rank_that_is_gone_is_noticed_while_nothing_runs():
    with thread_ranks(make_runner) as (ranks, threads):
        threads[0].kill()
        assert "rank 0" in str(ranks.failed.exception(5))


def test_ranks_that_wait_for_one_that_failed_end_the_engine(make_engine, monkeypatch):
    monkeypatch.setattr(ranks_runner, "GRACE", 0.0)
    first = FakeRunner(by_hand=True)  # as in a sum that rank 1 does not come to
    second = make_runner()
    second.failing[1] = "run"
    with thread_ranks([first, second].__getitem__) as (ranks, _):
        engine, pending = launch_one(make_engine, ranks)
        with pytest.raises(EngineDeadError):
            engine.collect(pending)
        assert str(engine.dead) == "rank 0 did not end step 1, which failed elsewhere"
        assert "ArithmeticError" in str(engine.dead.__cause__)


def test_a_rank_that_does_not_answer_counts_as_hung(monkeypatch):
    monkeypatch.setattr(ranks_runner, "PING_EVERY", 0.0)
    stuck = threading.Event()

    class Stuck(FakeRunner):
        def launch(self, plan):
            stuck.wait()
            return super().launch(plan)

    with thread_ranks(lambda rank: Stuck() if rank else make_runner()) as (ranks, _):
        ranks.launch(Plan(1, ()))
        assert "rank 1 has not answered" in str(ranks.failed.exception(60))
        stuck.set()


def test_ranks_that_sample_different_tokens_end_the_engine(make_engine):
    def make(rank: int) -> FakeRunner:
        return FakeRunner(16, alphabet=(97 + rank,))

    with thread_ranks(make) as (ranks, _):
        engine, pending = launch_one(make_engine, ranks)
        with pytest.raises(EngineDeadError):
            engine.collect(pending)
        assert "rank 1 has sampled other tokens than rank 0" in str(engine.dead)


def test_a_plan_that_finds_no_room_in_the_ring_takes_memory_of_its_own(make_engine):
    with thread_ranks(make_runner, room=400) as (ranks, _):
        engine = make_engine(ranks)
        for job in jobs():
            engine.add(job, 0.0)
        tokens = run(engine)
    alone = make_engine(make_runner())
    for job in jobs():
        alone.add(job, 0.0)
    assert tokens == run(alone)


def test_ranks_compile_what_has_been_compiled_before_a_plan_asks_for_it():
    grammars = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, ByteTokenizer.eos_ids)
    with thread_ranks(make_runner) as (ranks, threads), closing(grammars):
        grammars.tell(ranks.announce)
        for _ in range(2):
            grammars.hold(regex("[a-f]é+"))
        assert [each.compiled.get(timeout=30) for each in threads] == [regex("[a-f]é+")] * 2
        assert all(each.compiled.empty() for each in threads)


def fine(*meetings: int) -> Report:
    return Report(Meetings(*meetings))


def failed(*meetings: int) -> Report:
    return Report(Meetings(*meetings), error="it")


@pytest.mark.parametrize(
    ("reports", "size", "why"),
    [
        ([fine(4), fine(4)], 2, None),
        ([failed(4), fine(4)], 2, None),
        ([failed(0), failed(0)], 2, None),
        ([failed(3), fine(4)], 2, "rank 1 met the others of its stage 4 times, and rank 0 3 times"),
        ([failed(3), failed(3, 0, 0, True)], 2, "rank 1 failed while it met others"),
        ([fine(0, 1), fine(0, 0, 1)], 1, None),
        ([fine(0, 1), failed(0, 0, 1)], 1, None),
        ([fine(0, 1), failed()], 1, "rank 1 has not received what rank 0 has sent"),
        ([fine(2, 1), fine(2, 1), fine(2, 0, 1), fine(2, 0, 1)], 2, None),
    ],
)
def test_ranks_go_on_together_if_nobody_waits_for_anybody(reports, size, why):
    step = Step(Future(), reports=dict(enumerate(reports)))
    assert why_parted(step, size) == why


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), max_size=60))
def test_a_ring_never_writes_over_what_some_reader_has_not_read(steps):
    ring = PlanRing(2, room=100)
    readers = [RingReader(ring.fd, place) for place in range(2)]
    unread: list[list[tuple[bytes, bytes]]] = [[], []]  # by reader: where, what
    try:
        for number, (size, reads) in enumerate(steps, 1):
            data = bytes([number]) * size
            place = ring.write(number, data)
            if place is not None:
                assert PLACE.unpack(place)[0] == number
                for its in unread:
                    its.append((place, data))
            else:
                assert any(unread), "it is empty, and has room"
            for reader, its in list(zip(readers, unread, strict=True))[:reads]:
                if its:
                    place, data = its.pop(0)
                    assert reader.read(place)[1] == data
    finally:
        for reader in readers:
            reader.close()
        ring.close()


def test_settings_of_every_kind_arrive_as_they_were_sent():
    sampling = SamplingParams(
        temperature=0.1 + 0.2,
        logit_bias={5: -100.0, 7: 1.5},
        allowed_token_ids=(1, 2),
        bad_words=((1, 2), (3,)),
        stop_token_ids=(9,),
        logprob_token_ids=(4,),
        logprobs=3,
        seed=2**63 - 1,
        max_tokens=None,
        grammar=regex("a+é"),
    )
    chunks = (
        Chunk(1, 2, (7, 8, 9), 4, ((3, 4), ()), False),
        Chunk(2, 0, BEING_SAMPLED, 9, (), True),
        Chunk(3, 0, (1,), 0, ((5,), (6,)), True),
    )
    new = NewSequence(1, sampling, 2, 2**63 - 1, (5, 6))
    scored, pooled = PromptRow(1, 0, (8, 9), 2), PooledRows(1, 0, 1, 2)
    plan = Plan(1, chunks, (new,), (4, 5), (scored,), (pooled,))
    assert decode_plan(encode_plan(plan)) == plan
    decodes = Plan(2, chunks[1:2] * 3)
    assert decode_plan(encode_plan(decodes)) == decodes
    scores = (TokenLogprobs(1, -0.1, 2, ((3, -0.5), (4, -9999.0))),)
    result = StepResult(
        ((1,), ()), (scores, None), {3: scores}, errors={4: "é"}, ended=frozenset({1}), seconds=0.25
    )
    assert decode_result(encode_result(result)) == result
    for cut in range(0, len(encode_plan(plan)), 9):
        with pytest.raises(ValueError, match="cut off"):
            decode_plan(encode_plan(plan)[:cut])


@pytest.mark.parametrize("key", ["0123456789abcdef", "0123456789abcdeX"])
def test_machines_know_each_other_by_a_key_that_is_not_sent(key):
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as other:
        proved = other.submit(prove, theirs, key.encode(), b"node", b"server")
        if key == "0123456789abcdef":
            prove(ours, b"0123456789abcdef", b"server", b"node")
            proved.result(10)
        else:
            for wait in (
                lambda: prove(ours, b"0123456789abcdef", b"server", b"node"),
                proved.result,
            ):
                with pytest.raises(ValueError, match="another --cluster-key"):
                    wait()


def test_a_machine_that_says_what_it_is_told_has_not_proved_anything():
    """A peer without the key could send everything back."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as mirror:
        mirror.submit(lambda: [theirs.sendall(receive(theirs, 32)) for _ in range(2)])
        with pytest.raises(ValueError, match="another"):
            prove(ours, b"0123456789abcdef", b"server", b"node")


def test_each_rank_has_a_gpu_of_its_own_first_and_sees_the_others(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc,7")
    environments = device_environments(3, 3)
    named = [its["CUDA_VISIBLE_DEVICES"] for its in environments]
    assert named == ["4,GPU-abc,7", "GPU-abc,4,7", "7,4,GPU-abc"]
    with pytest.raises(ConfigError, match="4 ranks on this machine, which has 3 CUDA devices"):
        device_environments(4, 3)


def test_ranks_share_the_cores_where_threads_fill_them(monkeypatch):
    monkeypatch.setattr(process, "cores", lambda: [0, 2, 4, 6, 8])
    assert share_cores(2, 5) == [[0, 2], [4, 6, 8]]
    assert shares(5, 2) == [2, 3]
    assert share_cores(2, 4) is None
    assert share_cores(6, 6) is None


def test_a_start_is_as_far_as_its_slowest_rank():
    assert slowest([(2, "loading weights", 0.5), (2, "loading weights", 0.7)])[1] == 0.6
    assert slowest([(3, "warming up", 0.0), (2, "loading weights", 0.5)]) == (
        "loading weights",
        0.75,
    )
