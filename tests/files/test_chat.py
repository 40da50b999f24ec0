"""Chat templates render as transformers renders them, tags and methods that Jinja2 alone lacks included."""

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from teal_fast.files import chat
from teal_fast.files.chat import render_chat

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": ' Hi <b>"quoted"</b>\n 123 '},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n  Hello!  "},
    {"role": "user", "content": "日本? Straße ǅ 3"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
METHODS = [
    *("m.content.strip()", "m.content.lstrip('\\n ')", "m.content.rstrip(' 3')", "m.content.removeprefix(' ')"),
    *("m.content.removesuffix(' ')", "m.content.split('</think>')[-1].lstrip('\\n')", "m.content.splitlines()"),
    *("m.role.rsplit('s', 1)", "m.content.partition('i')", "m.content.rpartition('i')", "m.content.startswith(' H')"),
    *(
        "m.content.endswith('3')",
        "m.content.upper()",
        "m.content.title()",
        "m.content.casefold()",
        "m.role.capitalize()",
    ),
    *("m.content.swapcase()", "m.content.replace('H', 'J')", "m.content.find('i')", "m.content.count('H')"),
    *("m.role.center(12, '*')", "m.role.ljust(12)", "m.role.zfill(12)", "m.content.expandtabs()", "m.content[::-1]"),
    *("m.content.isdigit()", "m.content.encode('utf8')", "','.join(m.keys())", "m.get('x', 'y')", "m.items() | list"),
    *("'{:>8}|{:<5.2f}|{x}'.format('a', 3.14159, x=m.role)", "'{0[role]}'.format(m)", "'{x}'.format_map({'x': 1})"),
    *("'%s-%s' % (1, m.role)", "m.content | trim | length", "m | tojson(indent=2)", "dict(a=1)", "dict.fromkeys('ab')"),
]
EACH = "{{% for m in messages %}}{{{{ {} }}}};{{% endfor %}}"
TEMPLATES = {
    **{method: EACH.format(method) for method in METHODS},
    "break": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}\n  {% generation %}\n"
    "{{ m.content + eos_token }}\n  {% endgeneration %}\n{% endif %}{% endfor %}",
    "generation, trimmed": "{%- for m in messages -%}\n {%- generation -%} {{ m.content }} {{ loop.index }} "
    "{%- endgeneration -%}\n{% endfor %}",
    "generation is a block": "{% set n = namespace(x=1) %}{% set x = 1 %}{% generation %}{% set x = 2 %}"
    "{% set n.x = 2 %}{{ x }}{% endgeneration %}{{ x }}{{ n.x }}",
    "generation in a macro": "{% macro f(a) %}{% generation %}[{{ a }}]{% endgeneration %}{% endmacro %}{{ f(1) }}",
    "date": "{{ strftime_now('%d %b %Y') }}, {{ strftime_now(format='%A %j %% %-d') }}{{ strftime_now('') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name):
    template = TEMPLATES[name]
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, **NAMES)
    assert render_chat(template, MESSAGES, NAMES) == expected


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% generation %}", "TemplateSyntaxError"),
        ("{% endgeneration %}", "TemplateSyntaxError"),
        ("{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}", "SyntaxError"),
        ("{% generation %}{{ ''.__class__ }}{% endgeneration %}", "SecurityError"),
        ("{{ strftime_now() }}", "TypeError"),
        ("{{ messages[0].pop('role') }}", "SecurityError"),
        ("{{ '%099999999d' % 1 }}", "SecurityError: % gives more"),
        ("{{ '%*d' % (99999999, 1) }}", "SecurityError: % gives more"),
        ("{{ '%(a)5.99999999f' % {'a': 1} }}", "SecurityError: % gives more"),
        ("{{ 'a' | center(99999999) }}", "SecurityError: a number"),
        ("{{ messages | tojson(indent=99999999) }}", "SecurityError: a number"),
        ("{{ 'a'.ljust(99999999) }}", "SecurityError: a number"),
        ("{{ '{:20000000}'.format(1) | length }}", "SecurityError: a part of it"),
        ("{{ '%020000000d' | format(1) | length }}", "SecurityError: a part of it"),
        ("{% set x = 'a' * 9999999 %}{% set y = x + x %}", r"SecurityError: \+ gives more"),
        ("{% set x = 'a' * 9999999 %}{{ x }}{{ x }}", "SecurityError: its text is longer"),
        ("{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "longer than"),
        ("{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}", "longer than"),
        ("{{ '%*d' % (-99999999, 1) }}", "SecurityError: % gives more"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "SecurityError: it takes"),
    ],
)
def test_refuses_in_one_line(template, said, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    with pytest.raises(ValueError, match=said) as refused:
        render_chat("{% set n = namespace(x='a') %}" + template, MESSAGES, NAMES)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'At 20261129001500: %5.1f%%, %-3s|' % (99999999, 'é') }}{{ 7 % 4 }}{{ 20261129001500 + 1 }}",
        "{{ '%(a)s' % {'a': 20261129001500} }}{{ messages + [1] | list }}{{ 'a' | center(9) }}{{ 'a'.ljust(9) }}|",
        "{% macro f(n) %}{{ n | string }}{% endmacro %}{{ f(20261129001500) }}{{ 20261129001500 | tojson }}",
        "{% set x %}{{ 1 ~ none ~ 'é' ~ [1] }}{% endset %}{{ 'a' ~ 2 }}{{ x ~ (messages[0].role ~ 3.5) | upper }}",
        "{{ messages | map(attribute='role') | join(',') }}{{ '%s-%s' | format('a', 3) }}",
    ],
)
def test_bounds_leave_ordinary_templates_alone(template):
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, **NAMES)
    assert render_chat(template, MESSAGES, NAMES) == expected


def test_a_process_that_stands_still_is_no_slow_template(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    names = NAMES | {"wait": lambda: time.sleep(0.4) or "a"}
    assert render_chat("{{ wait() }}{{ dict(a=1).a }}", MESSAGES, names) == "a1"
