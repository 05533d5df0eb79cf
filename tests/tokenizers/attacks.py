"""Renders hostile templates, each in a process of limited memory, and prints a line each: see the tests of bounds."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

from tuner.errors import ModelError
from tuner.tokenizers.chat_template import ChatTemplate
from tuner.types import Message

DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
LARGE = "{% set s = 'é' * 4000000 %}"
NESTED = "{% set a = ['x', 'x'] %}" + "{% set a = [a, a] %}" * 60
PAIRS = "{% set a = (1, 1) %}{% set b = (1, 1) %}" + "{% set a = (a, a) %}{% set b = (b, b) %}" * 60

REACHING_PYTHON = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}{{ ''.format.__self__.__class__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages[0].items.__self__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.func.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ 'a'.encode().ljust(10**9) }}",
    "{{ dict.__base__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ lipsum(n=1000000) }}",
    "{% macro m() %}{{ caller.__code__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{% include '/etc/passwd' %}",
]

TAKING_TIME = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% set r = range(100000) %}{{ " + "r|select|".replace("r|", "", 0) + "select|" * 15000 + "list }}",
    "{% set r = range(100000)|list %}{% for a in r %}{% if r == r|list %}{% endif %}{% endfor %}",
    "{% for a in range(100000) %}{% set x = range(100000)|sum %}{% endfor %}",
    "{% for a in range(100000) %}{% set x = range(100000)|map('string')|join %}{% endfor %}",
    LARGE + "{% for i in range(100000) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    LARGE + "{% set t = s ~ '' %}{% for i in range(100000) %}" + "{% if s == t %}{% endif %}" * 100 + "{% endfor %}",
    LARGE + "{% for i in range(100000) %}{% set x = s.count('b') %}{% endfor %}",
    LARGE + "{% set t = s ~ '' %}{% for i in range(100000) %}" + "{{ s is eq(t) }}" * 100 + "{% endfor %}",
    LARGE + "{% set t = s ~ '' %}{% for i in range(100000) %}{{ loop.changed(s if i % 2 else t) }}{% endfor %}",
    LARGE + "{{ s.rfind('éb' + s[:2000000]) }}",
    LARGE + "{{ s.rsplit('éb' + s[:2000000]) }}",
    LARGE + "{{ s.strip('abcdefgh' * 100000 + 'é') }}",
    LARGE + "{{ s|trim('abcdefgh' * 100000 + 'é') }}",
    "{{ ('<>' * 4000000)|striptags }}",
    PAIRS + "{{ a == b }}",
    PAIRS + "{{ {a: 1} }}",
    NESTED + "{{ a|tojson }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 10 ** 1000000 }}",
    "{% set ns = namespace(x=3) %}{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 1.5|round(1000000000, 'ceil') }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "9" * 100000 + " }}",
    "x" * 200000,
    "{% if a %}" * 2000,
]

TAKING_MEMORY = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ (0,) * 10 ** 9 }}",
    "{{ range(10 ** 9)|list }}",
    "{{ range(100000)|list * 100000 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%.999999999f' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%s' * 100000 % (('a' * 100000,) * 100000) }}",
    "{{ '%(a)s' * 100000 % {'a': 'a' * 1000000} }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '{0:.999999999f}'.format(1.5) }}",
    "{{ ('{0}' * 100000).format('a' * 1000000) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ ['%999999999d']|map('format', 1)|list }}",
    "{{ 'a'.center(10 ** 9) }}",
    "{{ 'a'.ljust(width=10 ** 9) }}",
    "{{ '1'.zfill(10 ** 9) }}",
    "{{ '\t'.expandtabs(10 ** 9) }}",
    "{{ 'a'|center(10 ** 9) }}",
    "{{ 'a'|center(999999999) }}",
    "{{ 'a\nb'|indent(10 ** 9) }}",
    "{{ ('a\n' * 100000)|indent('b' * 100000) }}",
    "{{ ('b' * 1000000).join('a' * 1000000) }}",
    "{{ ['a'] * 1000000 | join('b' * 1000000) }}",
    "{{ range(100000)|join('b' * 1000000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 100000).replace('', 'b' * 1000000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 1000000) }}",
    "{{ [1]|batch(10 ** 9, 0)|list }}",
    "{{ [1]|slice(10 ** 9)|list }}",
    "{{ [1]|tojson(indent=10 ** 9) }}",
    "{{ [1, 2]|tojson(separators=('a' * 10000000, 'b')) }}",
    "{{ ([[1]] * 1000)|sum(start=[]) }}",
    "{{ ('f' * 30000000)|int(0, 16) }}",
    DOUBLED,
    DOUBLED.replace("ns.x + ns.x", "ns.x ~ ns.x"),
    DOUBLED.replace("ns.x + ns.x", "[ns.x, ns.x]"),
    DOUBLED.replace("ns.x + ns.x", "ns.x|list + ns.x|list"),
    DOUBLED.replace("ns.x + ns.x", "ns.x|replace('a', ns.x)"),
    DOUBLED.replace("ns.x + ns.x", "'%s%s' % (ns.x, ns.x)"),
    DOUBLED.replace("ns.x + ns.x", "'{0}{0}'.format(ns.x)"),
    NESTED + "{{ a }}",
    NESTED + "{{ a|string }}",
    NESTED + "{{ a ~ '' }}",
    "{% macro m() %}{{ varargs }}{{ m(varargs, varargs, varargs) }}{% endmacro %}{{ m('x', 'y') }}",
    LARGE + "{{ " + " ~ ".join(["s"] * 10000) + " }}",
    LARGE + "{{ " + " + ".join(["s"] * 10000) + " }}",
    LARGE + "{% set t %}{% for i in range(100000) %}{{ s }}{% endfor %}{% endset %}",
    LARGE + "{% for i in range(100000) %}{{ s }}{% endfor %}",
    LARGE + "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = [ns.l, s[i:]] %}{% endfor %}",
    LARGE + "{% macro f(s) %}{{ f(s[1:]) }}{% endmacro %}{{ f(s) }}",
    LARGE + "{{ s|escape|escape|escape|escape|escape }}{{ ('<' * 30000000)|escape|escape }}",
    "{% for i in range(100000) %}" + "y" * 100000 + "{% endfor %}",
    "{{ strftime_now('%999999999Y') }}",
    "{{ strftime_now('%Y' * 10000000) }}",
    "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = ns.l + [i] %}{% endfor %}",
]

KINDS = {"python": REACHING_PYTHON, "time": TAKING_TIME, "memory": TAKING_MEMORY}
MEMORY = 256 * 2**20


def outcome(attack: str) -> str:
    """What a rendering comes to."""
    conversation: list[Message] = [{"role": "user", "content": "Hi"}]
    began = time.process_time()
    try:
        rendered = ChatTemplate(attack, {"bos_token": "<s>"}, "FOLDER").render(conversation)
    except ModelError as error:
        return f"{time.process_time() - began:.2f} refused {error}"
    return f"{time.process_time() - began:.2f} rendered {len(rendered.text)} characters: {rendered.text[:80]!r}"


def limited(attack: str) -> str:
    """The same in a process of its own that has `MEMORY` more than now, and 30 seconds."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        os.write(writing, " ".join(outcome(attack).split()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read().decode()
    _, status = os.wait()
    return said or f"0.00 ended with {status}"


if __name__ == "__main__":
    for attack in KINDS[sys.argv[1]]:
        print(limited(attack), flush=True)
