"""What a mutant is: one change, which a run of the tests then meets."""

import ast

import mutants


def all_of(source):
    tree = ast.parse(source)
    return [mutants.make_mutant("x", tree, place) for place in mutants.places(tree)]


def changes(source):
    return [(mutant.line, mutant.before, mutant.after) for mutant in all_of(source)]


def test_one_thing_changes_at_a_time():
    source = "def f(a: int = 1) -> bool:\n    if a < 2 and not a:\n        g(a)\n    return a + 3\n"
    assert changes(source) == [
        (1, "1", "2"),
        (2, "if a < 2 and (not a):", "if not (a < 2 and (not a)):"),
        (2, "a < 2 and (not a)", "a < 2 or not a"),
        (2, "a < 2", "a <= 2"),
        (2, "2", "3"),
        (2, "not a", "a"),
        (3, "g(a)", "pass"),
        (4, "a + 3", "a - 3"),
        (4, "3", "4"),
    ]
    for mutant in all_of(source):
        assert mutant.source != ast.unparse(ast.parse(source))


def test_annotations_and_decorators_stay():
    assert changes("@cache(1)\ndef f(x: A[2]) -> B[3]:\n    '''text'''\n    y: C[4]\n") == []


def test_what_no_test_could_notice_stays():
    assert changes("zip(a, b, strict=True)") == [(1, "zip(a, b, strict=True)", "pass")]
    assert changes("x = a.reshape(b, -1)") == []
    assert changes("x = a[-1]") == [(1, "1", "2")]


def test_every_file_has_its_tests():
    for file, tests in mutants.TESTS.items():
        assert (mutants.ROOT / file).exists()
        assert all((mutants.ROOT / "tests" / name).exists() for name in tests.split())
    assert mutants.sample(list(mutants.TESTS), 5, 1) == mutants.sample(list(mutants.TESTS), 5, 1)
