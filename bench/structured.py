"""Structured output: whether what the model writes validates, and what the masks cost.

python bench/structured.py [--model MODEL] [--device cuda] [--schemas 308] [--rounds 5]
                           [--load-format dummy]

Every schema is asked for at temperature 0 and 1; each answer has to validate, or end because it was
cut off. Then streams with a schema and streams without take turns, and new schemas are compiled.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import replace

import jsonschema
from measure import machine, write
from schemas import FAMILIES, record, schemas

from ruvon import LLM, SamplingParams
from ruvon.bench import random_prompt
from ruvon.errors import RequestError
from ruvon.grammars import json_schema

STREAMS = 16
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["customer", "employee", "supplier"]},
        "notes": {"type": "string", "maxLength": 80},
    },
    "required": ["name", "age", "email", "kind", "notes"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 100}  # more than anybody waits for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="Default: the embedded one.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--schemas", type=int, default=22 * len(FAMILIES))
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    numbers = {}
    with LLM(args.model, device=args.device, load_format=args.load_format) as llm:
        if args.schemas:
            numbers["answers"] = [
                answers(llm, args.schemas, args.max_tokens, temperature) for temperature in (0, 1)
            ]
        numbers["first_mask_ms"] = first_masks(llm)
        if args.rounds:
            numbers["cost"] = cost(llm, args.rounds)
    print(f"\nWrote {write('structured', {'machine': machine(), 'numbers': numbers})}")


def answers(llm: LLM, count: int, max_tokens: int, temperature: float) -> dict[str, int]:
    """How many answers there were of each kind; whatever is wrong is printed."""
    tally: Counter[str] = Counter()
    asked, params = [], []
    for i, (family, schema) in enumerate(schemas(count)):
        grammar = json_schema(schema)
        sampling = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, seed=i, grammar=grammar
        )
        try:
            llm.engine.prepare(llm_job(llm, sampling))
        except RequestError as error:
            tally["refused"] += 1
            print(f"refused: {family} {json.dumps(schema)[:200]}: {error}")
            continue
        asked.append((family, schema))
        params.append(sampling)
    prompts = [
        [{"role": "user", "content": f"Answer as JSON of this schema: {json.dumps(schema)[:400]}"}]
        for _, schema in asked
    ]
    completions = llm.chat(prompts, params, use_tqdm=False)
    for (family, schema), (completion,) in zip(asked, completions, strict=True):
        verdict = judge(schema, completion.text, completion.finish_reason)
        tally[verdict] += 1
        if verdict == "wrong":
            print(f"wrong: {family} {json.dumps(schema)}: {completion.text!r}")
    print(f"temperature {temperature}: {dict(tally)}")
    return dict(tally)


def llm_job(llm: LLM, sampling: SamplingParams):
    from ruvon.engine.types import Job

    return Job((1,), sampling)


def judge(schema, text: str, finish: str) -> str:
    if finish == "length":
        return "cut off"
    if finish != "stop":
        return "failed"
    draft = jsonschema.Draft202012Validator
    try:
        draft(schema, format_checker=draft.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return "wrong"
    return "right"


def first_masks(llm: LLM) -> dict[str, float]:
    """Milliseconds for schemas that are new: to compile one, and for a stream's first mask."""
    rng, compiling, masks = random.Random(time.time_ns()), [], []
    grammars = llm.engine.preparation.grammars
    for _ in range(50):
        grammar = json_schema(record(rng))
        began = time.perf_counter()
        grammars.hold(grammar)
        compiling.append(1e3 * (time.perf_counter() - began))
        began = time.perf_counter()
        grammars.matcher(grammar).compute_bitmask()
        masks.append(1e3 * (time.perf_counter() - began))
    numbers = {
        "compile p50": statistics.median(compiling),
        "compile p95": sorted(compiling)[47],
        "mask p50": statistics.median(masks),
        "mask p95": sorted(masks)[47],
    }
    print(", ".join(f"{name} {value:.2f} ms" for name, value in numbers.items()))
    return numbers


def cost(llm: LLM, rounds: int) -> dict[str, object]:
    """Tokens a second of so many streams with a schema and without, by turns."""
    plain = SamplingParams(temperature=0.8, max_tokens=128, ignore_eos=True)
    kinds = {"without": plain, "with": replace(plain, grammar=json_schema(PEOPLE))}
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    steps = dict.fromkeys(kinds, 0)
    rng = random.Random(0)
    for turn in range(-1, rounds):
        for kind, sampling in kinds.items():
            prompts = [random_prompt(rng, 32) for _ in range(STREAMS)]
            before, began = llm.engine.stats.step, time.perf_counter()
            completions = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - began
            if turn >= 0:  # the first warms up
                num_tokens = sum(len(c.tokens) for (c,) in completions)
                speeds[kind].append(num_tokens / seconds)
                steps[kind] += llm.engine.stats.step - before
    ratios = [w / wo for w, wo in zip(speeds["with"], speeds["without"], strict=True)]
    medians = {kind: statistics.median(values) for kind, values in speeds.items()}
    print(
        f"{STREAMS} streams: {medians['without']:.0f} tok/s without, {medians['with']:.0f} with; "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); steps "
        f"{steps['without']} and {steps['with']}"
    )
    return {"speeds": speeds, "ratios": ratios, "steps": steps}


if __name__ == "__main__":
    main()
