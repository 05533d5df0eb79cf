"""A template that reaches for Python, or for time and memory, is an error, soon; a long conversation is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tuner.tokenizers.chat_template import ChatTemplate
from tuner.tokenizers.tiny import CHATML
from tuner.types import Message

ATTACKS = Path(__file__).with_name("attacks.py")
SECONDS = 4.0
"""Two of the limit, and what the last step may take on a busy machine."""


@pytest.mark.parametrize(
    ("kind", "fewest"),
    [
        ("python", 20),
        pytest.param("memory", 45, marks=pytest.mark.slow),
        pytest.param("time", 20, marks=pytest.mark.slow),
    ],
)
def test_hostile_templates_are_refused_in_time_and_memory(kind: str, fewest: int) -> None:
    done = subprocess.run([sys.executable, ATTACKS, kind], capture_output=True, text=True, check=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) >= fewest
    assert [line for line in lines if not line.split(" ", 1)[1].startswith("refused FOLDER: the chat template")] == []
    assert [line for line in lines if float(line.split()[0]) > SECONDS] == []
    assert max(map(len, lines)) < 600  # a reason, and not the text that was too long


def test_long_conversations_are_written() -> None:
    """Ten thousand turns, and one of 40 MB, which is more than a template may make of nothing."""
    template = ChatTemplate(CHATML, {}, "FOLDER")
    many: list[Message] = [{"role": "user", "content": f"{i}"} for i in range(10_000)]
    assert template.render(many).text.endswith("<|im_start|>user\n9999<|im_end|>\n")
    long: list[Message] = [{"role": "user", "content": "é" * 40_000_000}]
    assert len(template.render(long).text) == 40_000_000 + len("<|im_start|>user\n<|im_end|>\n")


def test_one_rendering_takes_nothing_from_the_next() -> None:
    template = ChatTemplate("{{ 'a' * 3000000 }}", {}, "FOLDER")  # nearly half of what it may make
    assert [len(template.render([]).text) for _ in range(10)] == [3000000] * 10


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ ns.none }}", "2 "),
        ("{{ 'a' ~ 1 ~ [1, 'x'] ~ none }}", "a1[1, 'x']None"),
        ("{{ 1 + 2 + 3.5 }} {{ [1] + [2] + [3] }} {{ (1,) + (2,) }}", "6.5 [1, 2, 3] (1, 2)"),
        ("{{ 'ab' * 2 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ '%s-%03d' % ('x', 5) }}", "abab 3 1024 x-005"),
        ("{{ '{:>5}|{!r}|{x[k]}'.format('a', 'b', x={'k': 1}) }}", "    a|'b'|1"),
        ("{{ '{a}'.format_map({'a': 2}) }}", "2"),
        ("{{ [1, 2, 3][1:] }} {{ 'abcdef'[::-2] }} {{ 'abc'[-1] }}", "[2, 3] fdb c"),
        ("{{ ['a', 'b']|join('-') }} {{ [{'x': 1}, {'x': 2}]|join(',', attribute='x') }}", "a-b 1,2"),
        ("{{ [1, 2]|sum }} {{ [{'x': 1}]|sum(attribute='x') }} {{ 'a\nb'|indent(2) }}", "3 1 a\n  b"),
        ("{{ '<' + ('>'|safe) }} {{ '<'|e }} {{ ('a'|safe) ~ '<' }}", "&lt;> &lt; a<"),
        ("{% for x in [3, 1, 2] if x > 1 %}{{ loop.index }}{{ x }}{% else %}none{% endfor %}", "1322"),
        ("{% for x in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for x in [[1, []], [2, []]] recursive %}{{ x[0] }}{{ loop(x[1]) }}{% endfor %}", "12"),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ f(1) }}{{ f(1, 3, 4) }}", "12()13(4,)"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x|upper }}{% filter upper %}b{% endfilter %}", "A1B"),
        ("{{ {'b': 1, 'a': 2}|dictsort }} {{ {'a': 1}.items()|list }}", "[('a', 2), ('b', 1)] [('a', 1)]"),
        ("{{ dict(a=1) }} {{ dict([('k', 2)])|tojson }}", "{'a': 1} {\"k\": 2}"),
        ("{{ [1, 2, 3]|map('string')|join }} {{ [1, 2, 3]|select('odd')|list }}", "123 [1, 3]"),
        ("{{ messages[0].role }}{{ messages[0].content.split('i')[0] }}{{ messages[0]['none'] }}", "userH"),
        (
            "{{ 'a' in 'cab' }} {{ 'role' in messages[0] }} {{ 1 < 2 < 3 }} {{ messages == messages }}",
            "True True True True",
        ),
        ("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}{% set c, d = (1, 2) %}{{ c }}{{ d }}", "x112"),
    ],
)
def test_what_templates_write_is_what_jinja_writes(template: str, said: str) -> None:
    """The counting stands in the compiled code of every expression: each kind, against Jinja's own sandbox."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    messages: list[Message] = [{"role": "user", "content": "Hi"}]
    jinjas = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    assert jinjas.from_string(template).render(messages=messages) == said
    assert ChatTemplate(template, {}, "FOLDER").render(messages).text == said
