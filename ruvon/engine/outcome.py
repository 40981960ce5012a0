"""What a step's result means for one sequence: which tokens count, and whether it is over."""

from __future__ import annotations

from ruvon.engine.types import Emission, Sequence, TokenLogprobs


def accept(
    seq: Sequence,
    end: int,
    tokens: tuple[int, ...],
    logprobs: tuple[TokenLogprobs, ...] | None,
    ended: bool,
) -> Emission | None:
    """Append what was sampled after the first ``end`` tokens, up to what ends the sequence; None if
    there is no news of it. ``ended``: nothing may follow all of it.

    That no stop token comes before ``min_tokens`` is the sampler's doing: it masks them.
    """
    if len(tokens) > 1:
        whole, tokens = tokens, up_to_the_end(seq, end - seq.num_prompt, tokens)
        logprobs = logprobs and logprobs[: len(tokens)]
        ended = ended and tokens == whole
    seq.tokens += tokens
    stopped = bool(tokens) and tokens[-1] in seq.stop_ids
    if stopped or ended:
        seq.finish = "stop"
    elif end - seq.num_prompt + len(tokens) >= seq.max_tokens:
        seq.finish = "length"
    elif not tokens:
        return None
    emission = Emission(
        seq.id, seq.index, tokens, logprobs, num_cached=seq.num_cached, finish=seq.finish
    )
    if stopped:
        emission.stop_token = tokens[-1]
    if seq.prompt_logprobs is not None and end == seq.num_prompt:
        emission.prompt_logprobs = tuple(seq.prompt_logprobs)
    emission.pooled = seq.pooled
    return emission


def up_to_the_end(seq: Sequence, num_output: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Those of several tokens that the sequence may have: none beyond ``max_tokens``, none after a
    stop token."""
    tokens = tokens[: seq.max_tokens - num_output]
    stop = next((i for i, token in enumerate(tokens) if token in seq.stop_ids), len(tokens))
    return tokens[: stop + 1]


def fail(seq: Sequence, error: str) -> Emission:
    """End a sequence whose row came to nothing."""
    seq.finish = "error"
    return Emission(seq.id, seq.index, (), finish="error", error=error)
