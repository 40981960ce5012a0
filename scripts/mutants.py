"""Do the tests notice when the code is wrong? Changes one thing at a time, and runs them.

    python scripts/mutants.py [--number 60] [--seed 0] [--seconds 540] [FILE ...]

A mutant is a copy of the package in which one comparison, sum, number, condition or call is another
one or gone. Those that no test notices are printed: each is a missing test, or code that makes no
difference. A sample is drawn from the files in `TESTS`, each with tests that are fast.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent
SERVER = get_context("forkserver")
"""Forks processes that have imported what all tests need: most of what a run would cost."""
SERVER.set_forkserver_preload(["torch", "transformers", "gguf", "aiohttp"])
TESTS: Mapping[str, str] = {
    "ruvon/config/engine.py": "test_config.py",
    "ruvon/config/fields.py": "test_config.py",
    "ruvon/config/server.py": "test_config.py",
    "ruvon/config/sizes.py": "test_config.py",
    "ruvon/config/sources.py": "test_config.py",
    "ruvon/engine/batch.py": "engine/test_batch.py",
    "ruvon/engine/blocks.py": "engine/test_blocks.py",
    "ruvon/engine/budget.py": "engine/test_scheduler.py",
    "ruvon/engine/cpu_sampler.py": "engine/test_cpu_sampler.py",
    "ruvon/engine/draw.py": "engine/test_sampler.py",
    "ruvon/engine/events.py": "engine/test_recorder.py",
    "ruvon/engine/grammar.py": "engine/test_grammar.py",
    "ruvon/engine/grammar_errors.py": "engine/test_grammar.py",
    "ruvon/engine/grouped_pool.py": "engine/test_grouped_pool.py",
    "ruvon/engine/jobs.py": "engine/test_engine.py",
    "ruvon/engine/kv_cache.py": "engine/test_kv_cache.py",
    "ruvon/engine/logprobs.py": "engine/test_sampler.py",
    "ruvon/engine/matching.py": "engine/test_grammar.py",
    "ruvon/engine/open_requests.py": "engine/test_loop.py",
    "ruvon/engine/outcome.py": "engine/test_scheduler.py",
    "ruvon/engine/policies.py": "engine/test_policies.py",
    "ruvon/engine/pooling.py": "engine/test_pooling.py",
    "ruvon/engine/prefixes.py": "engine/test_scheduler.py",
    "ruvon/engine/queues.py": "engine/test_scheduler.py engine/test_fairness.py",
    "ruvon/engine/ranks/codec.py": "engine/test_ranks.py",
    "ruvon/engine/ranks/ring.py": "engine/test_ranks.py",
    "ruvon/engine/recorder.py": "engine/test_recorder.py",
    "ruvon/engine/resources.py": "engine/test_resources.py",
    "ruvon/engine/runner.py": "engine/test_runner.py",
    "ruvon/engine/sampler.py": "engine/test_sampler.py",
    "ruvon/engine/scheduler.py": "engine/test_scheduler.py engine/test_recorder.py",
    "ruvon/engine/startup.py": "engine/test_startup.py",
    "ruvon/engine/trace.py": "engine/test_recorder.py",
    "ruvon/engine/transforms.py": "engine/test_sampler.py",
    "ruvon/engine/validation.py": "engine/test_validation.py",
    "ruvon/engine/waits.py": "engine/test_waits.py",
    "ruvon/models/added_tokens.py": "models/test_added_tokens.py",
    "ruvon/models/cache_groups.py": "models/test_cache_groups.py",
    "ruvon/models/chat.py": "models/test_chat.py models/test_formats_prompt.py "
    "models/test_formats_grammar.py",
    "ruvon/models/checkpoint.py": "models/test_checkpoint.py",
    "ruvon/models/defaults.py": "models/test_defaults.py",
    "ruvon/models/formats/json_calls.py": "models/test_formats.py",
    "ruvon/models/formats/qwen_coder.py": "models/test_formats.py",
    "ruvon/models/formats/reader.py": "models/test_formats.py",
    "ruvon/models/formats/scanner.py": "models/test_formats.py",
    "ruvon/models/formats/untaught.py": "models/test_formats.py",
    "ruvon/models/gguf.py": "models/test_gguf.py",
    "ruvon/models/gguf_types.py": "models/test_gguf.py",
    "ruvon/models/messages.py": "models/test_chat.py",
    "ruvon/models/quantize.py": "models/test_quantize.py",
    "ruvon/models/rope.py": "models/test_spec.py",
    "ruvon/models/shares.py": "models/test_shares.py",
    "ruvon/models/spec.py": "models/test_spec.py",
    "ruvon/models/spec_gemma3.py": "models/test_spec.py",
    "ruvon/models/spec_gguf.py": "models/test_gguf.py",
    "ruvon/models/template_cost.py": "models/test_template_cost.py",
    "ruvon/models/text_stream.py": "models/test_text_stream.py",
    "ruvon/models/tokenizer.py": "models/test_tokenizer.py",
    "ruvon/models/weights.py": "models/test_weights.py",
    "ruvon/router/choice.py": "router/test_choice.py",
    "ruvon/router/framing.py": "router/test_framing.py",
    "ruvon/router/prefixes.py": "router/test_choice.py",
    "ruvon/server/completions.py": "server/test_completions_api.py",
    "ruvon/server/constraints.py": "server/test_asked.py",
    "ruvon/server/embeddings.py": "server/test_embeddings.py",
    "ruvon/server/explain.py": "server/test_explain.py",
    "ruvon/server/keys.py": "server/test_keys.py",
    "ruvon/server/messages_api/convert.py": "server/test_messages_api.py",
    "ruvon/server/messages_api/writer.py": "server/test_messages_api.py",
    "ruvon/server/parsing.py": "server/test_schemas.py",
    "ruvon/server/responses_api/items.py": "server/test_responses_items.py",
    "ruvon/server/responses_api/store.py": "server/test_response_store.py",
    "ruvon/server/responses_api/writer.py": "server/test_responses_writer.py",
    "ruvon/server/resume.py": "server/test_resume.py",
    "ruvon/server/sealed.py": "server/test_responses_items.py",
    "ruvon/server/shape.py": "server/test_schemas.py",
    "ruvon/server/tls.py": "server/test_tls.py",
    "ruvon/server/watchdog.py": "server/test_watchdog.py",
    "ruvon/server/writers/chat.py": "server/test_writers.py",
    "ruvon/server/writers/completions.py": "server/test_writers.py server/test_completions_api.py",
    "ruvon/server/writers/logprobs.py": "server/test_writers.py server/test_completions_api.py",
    "ruvon/telemetry/collectors.py": "test_telemetry.py",
    "ruvon/telemetry/totals.py": "test_telemetry.py",
    "ruvon/verify/answers.py": "test_verify.py",
    "ruvon/verify/report.py": "test_verify.py",
}
"""Of each file those that are to notice."""
OTHER: Mapping[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change to one file."""

    file: str
    line: int
    before: str  # the smallest statement or expression around the change
    after: str
    source: str  # of the whole file


def main() -> None:
    args = parse()
    drawn = sample(args.files, args.number, args.seed)
    end = time.monotonic() + args.seconds
    with ThreadPoolExecutor(args.jobs) as pool:
        run = [(mutant, pool.submit(is_noticed, mutant, end)) for mutant in drawn]
        outcomes = []
        for mutant, future in run:
            noticed = future.result()
            if noticed is False:
                what = f"{mutant.before}  ->  {mutant.after}"
                print(f"{mutant.file}:{mutant.line}: {what}", flush=True)
            if noticed is not None:
                outcomes.append(noticed)
    print(f"{sum(outcomes)} of {len(outcomes)} mutants noticed, seed {args.seed}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=540, help="No mutant begins after that.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE")
    args = parser.parse_args()
    if unknown := set(args.files) - TESTS.keys():
        parser.error(f"no tests are named for {', '.join(sorted(unknown))}")
    return args


def sample(files: list[str], number: int, seed: int) -> list[Mutant]:
    trees = {file: ast.parse((ROOT / file).read_text()) for file in files}
    found = [(file, place) for file, tree in trees.items() for place in places(tree)]
    drawn = random.Random(seed).sample(found, min(number, len(found)))
    return [make_mutant(file, trees[file], place) for file, place in drawn]


def make_mutant(file: str, tree: ast.Module, place: Place) -> Mutant:
    """The tree is changed only meanwhile."""
    node, instead = place.node, changed(place.node)
    setattr(place.parent, place.field, replaced(place, instead))
    source = ast.unparse(tree)
    setattr(place.parent, place.field, place.value)
    return Mutant(file, node.lineno, text(node), text(instead), source)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node hangs in the tree."""

    parent: ast.AST
    field: str
    value: object  # of the field: the node, or a list with it
    node: ast.expr | ast.stmt


SKIPPED = {"annotation", "returns", "decorator_list", "bases"}


def places(tree: ast.AST) -> list[Place]:
    """Where a mutant can be made."""
    return [place for place in walk(tree) if changed(place.node) is not None]


def walk(tree: ast.AST) -> Iterator[Place]:
    """Everything that is run, in order; annotations and decorators are not. Nor what no test could
    notice: whether `zip` looks after us, and which negative size it is that numpy works out."""
    fields = ast.iter_fields(tree)
    match tree:
        case ast.keyword(arg="strict"):
            return
        case ast.Call(func=ast.Attribute(attr="reshape")):
            fields = iter([("func", tree.func)])
    for field, value in fields:
        if field in SKIPPED:
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.expr | ast.stmt):
                yield Place(tree, field, value, node)
            if isinstance(node, ast.AST):
                yield from walk(node)


def changed(node: ast.AST) -> ast.expr | ast.stmt | None:
    """What stands in a mutant instead of this node; None where nothing does."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in OTHER:
            return with_field(node, ops=[OTHER[type(operator)]()])
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in OTHER:
            return with_field(node, op=OTHER[type(operator)]())
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return inner
        case ast.Constant(value=bool(value)):
            return ast.Constant(not value)
        case ast.Constant(value=int(value)):
            return ast.Constant(value + 1)
        case ast.IfExp(body=body, orelse=other):
            return with_field(node, body=other, orelse=body)
        case ast.If(test=test):
            return with_field(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Continue() | ast.Break():
            return ast.Pass()
    return None


def with_field(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def replaced(place: Place, instead: ast.AST) -> object:
    if isinstance(place.value, list):
        return [instead if node is place.node else node for node in place.value]
    return instead


def text(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]


def is_noticed(mutant: Mutant, end: float) -> bool | None:
    """Whether a test fails; None where there was no time to find out."""
    if time.monotonic() > end:
        return None
    tests = TESTS[mutant.file]
    return run_tests(tests, 20 + 5 * seconds_unchanged(tests), {mutant.file: mutant.source})


@cache
def seconds_unchanged(tests: str) -> float:
    """How long they usually take. Ends the program if they fail without a change."""
    began = time.monotonic()
    if run_tests(tests, 600, {}):
        raise SystemExit(f"{tests} fails without a change")
    return time.monotonic() - began


def run_tests(tests: str, patience: float, changes: Mapping[str, str]) -> bool:
    """Whether tests fail, or hang, where these files have another text."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "ruvon", Path(folder) / "ruvon")
        (Path(folder) / "docs").symlink_to(ROOT / "docs")  # tests look for them beside it
        for file, source in changes.items():
            (Path(folder) / file).write_text(source)
        tester = SERVER.Process(target=run_pytest, args=(folder, tests))
        tester.start()
        tester.join(patience)
        tester.kill()
        tester.join()
    return tester.exitcode != 0


def run_pytest(folder: str, tests: str) -> NoReturn:
    """In a process of its own, with the package that lies in this folder."""
    os.chdir(ROOT)
    os.environ |= {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    os._exit(pytest.main([*options, *(str(ROOT / "tests" / name) for name in tests.split())]))


if __name__ == "__main__":
    main()
