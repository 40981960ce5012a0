"""Templates that never end, or make more than there is room for (vLLM's CVE-2026-115911)."""

from __future__ import annotations

import jinja2
import pytest

from ruvon.errors import RequestError
from ruvon.models import template, template_cost
from ruvon.models.template import compile_template, render_template
from ruvon.models.template_cost import PATIENCE, SlowTemplateError

LOOP = "{% for i in range(99999) %}"
OWN = LOOP + "a text of the template's own, which is somewhat longer than others"
NEVER = LOOP * 3 + "{% endfor %}" * 3


def doubling(step: str) -> str:
    """A template that makes something twice as large, forty times."""
    return (
        "{% set ns = namespace(x='ab', l=[1]) %}{% for i in range(40) %}"
        + step
        + "{% endfor %}{{ ns.l|length }}"
    )


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(template_cost, "MOST", 1 << 22)
    monkeypatch.setattr(template_cost, "MOST_SECONDS", 0.2)


@pytest.mark.parametrize(
    "source",
    [
        NEVER,
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        LOOP + "{% set x = range(99999)|map('upper')|list|length %}{% endfor %}",
        LOOP + "{% set x = range(999)|select('odd')|list|length %}{% endfor %}",
    ],
)
def test_what_never_ends_is_ended(small, source):
    with pytest.raises(RequestError, match=r"it took more than 0\.2 seconds"):
        render_template(compile_template(source), {"messages": []})


@pytest.mark.parametrize(
    "source",
    [
        LOOP + "{{ 'x' * 99 }}{% endfor %}",
        OWN + "{% endfor %}",
        "{% set y %}" + OWN + "{% endfor %}{% endset %}",
        "{% macro m() %}" + OWN + "{% endfor %}{% endmacro %}{{ m()|length }}",
        doubling("{% set ns.x = ns.x ~ ns.x %}"),
        doubling("{% set ns.x = ns.x + ns.x %}"),
        doubling("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
        doubling("{% set ns.x = ns.x.replace('a', 'abab') %}"),
        doubling("{% set ns.x = ns.x|replace('a', 'abab') %}"),
        doubling("{% set ns.x = [ns.x, ns.x]|join %}"),
        doubling("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
        doubling("{% set ns.x = '{0}{0}'.format(ns.x) %}"),
        doubling("{% set ns.l = ns.l + ns.l %}"),
        doubling("{% set ns.l = [ns.l, ns.l] %}"),
        doubling("{% set ns.l = (ns.l, ns.l) %}"),
        doubling("{% set ns.l = {'a': ns.l, 'b': ns.l} %}"),
        doubling("{% set ns.l = dict(a=ns.l, b=ns.l) %}"),
        doubling("{% set ns.l = ns.l * 2 %}"),
        doubling("{% set ns.l = [ns.l] * 2 %}"),
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'x' }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 10 ** 9999999999 }}",
        "{% set ns = namespace(x=9) %}" + LOOP + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'x'.center(10 ** 9) }}{{ 'x'.zfill(10 ** 9) }}",
        "{{ ''.rjust(10 ** 9) }}",
        "{{ 'x'|center(10 ** 9) }}",
        "{{ 'x\ny'|indent(10 ** 9) }}",
        "{{ [[1]]|tojson(indent=10 ** 9) }}",
        "{{ range(9)|batch(10 ** 9, 'x')|list }}",
        "{{ range(99999)|join('x' * 9999) }}",
        "{{ ('x' * 9999).join(range(99999)|map('string')|list) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%.999999999f'|format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 9) }}",
        "{{ 1.5|round(10 ** 9) }}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ [ns, ns] }}",
    ],
)
def test_what_grows_without_end_is_ended(small, source):
    with pytest.raises(RequestError, match=r"more than|no value|width"):
        render_template(compile_template(source), {"messages": []})


def test_what_is_made_little_by_little_costs_little(monkeypatch):
    """A list that grows by one at a time is weighed by what is added."""
    source = (
        "{% set ns = namespace(kept=[]) %}{% for m in messages %}"
        "{% set ns.kept = ns.kept + [m] %}{% endfor %}{{ ns.kept|length }} {{ ns.kept[-1]['n'] }}"
    )
    monkeypatch.setattr(template_cost, "MOST", 1 << 22)
    messages = [{"role": "user", "n": i} for i in range(4000)]
    assert render_template(compile_template(source), {"messages": messages}) == "4000 3999"


def test_lists_weigh_as_much_together_as_each_alone(monkeypatch):
    monkeypatch.setattr(template_cost, "MOST", 5000)
    words = {"words": ["x" * 1000] * 3}
    assert render_template(compile_template("{{ (words + ['y'])|length }}"), words) == "4"
    with pytest.raises(RequestError, match="a value of more than 5000"):
        render_template(compile_template("{{ (words + words)|length }}"), words)


def test_who_is_in_a_hurry_is_told_and_may_come_back(monkeypatch):
    monkeypatch.setattr(template_cost, "MOST_SECONDS", 0.2)
    compiled = compile_template(NEVER)
    token = PATIENCE.set(0.01)
    with pytest.raises(SlowTemplateError):
        render_template(compiled, {})
    PATIENCE.reset(token)
    with pytest.raises(RequestError, match="it took more than"):
        render_template(compiled, {})


@pytest.mark.parametrize(
    "source",
    [
        "x" * (template.MOST_SOURCE + 1),
        "{{ " + "(" * 9999 + ")" * 9999 + " }}",
        LOOP * 50,
        "{% if %}",
    ],
)
def test_what_cannot_be_compiled_is_a_syntax_error(source):
    with pytest.raises(jinja2.TemplateSyntaxError):
        compile_template(source)
