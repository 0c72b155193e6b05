"""tcinfer.chat.template: real templates against Jinja itself, hostile ones against the clock, contents as they are."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jinja2.ext
import jinja2.sandbox
import pytest
from conftest import but_slow, smollm2

from tcinfer.chat import template as module
from tcinfer.chat.template import CHATML, ChatTemplate, Part, fill, render
from tcinfer.errors import TcinferError
from tcinfer.gguf.reader import read
from tcinfer.tokenizer import from_metadata

BOS, EOS = "<s>", "</s>"
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL1 = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n# Tools' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}{% if m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[a]{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ '[' + m.role[0] + ']' + m.content }}{% endif %}"
    "{% if m.role == 'tool' %}{% break %}{% endif %}{% endfor %}[a]"
)

# Template, what its answers begin with beyond their text, whether it takes a system prompt.
REAL = {
    "chatml": (CHATML, "", True), "llama-2": (LLAMA2, " ", True), "llama-3": (LLAMA3, "", True),
    "mistral-1": (MISTRAL1, "", False), "mistral-3": (MISTRAL3, " ", True), "gemma": (GEMMA, "", False),
    "qwen3": (QWEN3, "", True), "phi-3": (PHI3, "", True), "zephyr": (ZEPHYR, "", True),
    "generation": (GENERATION, "", True),
}  # fmt: skip


def jinja(source, messages):
    """The oracle: a conversation as apply_chat_template renders it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def refuse(message):
        raise jinja2.TemplateError(message)

    source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source).render(
        messages=messages, tools=None, documents=None, bos_token=BOS, eos_token=EOS, add_generation_prompt=True
    )


def talk(turns, system):
    """A conversation of so many answers, and one more message."""
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"question {turn}"},
            {"role": "assistant", "content": f"answer {turn}"},
        ]
    return [*messages, {"role": "user", "content": f"question {turns}"}]


def text_of(parts, **said):
    return "".join(text for text, _ in fill(parts, **said))


def short(parts):
    return "".join(f"{{{part.who}}}" if part.who else part.text for part in parts)


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_turn_by_turn_is_the_whole_conversation(name, system):
    source, space, knows_system = REAL[name]
    template = ChatTemplate(source, BOS, EOS)
    assert template.folds_system == (not knows_system)
    messages = talk(50, system)
    if system and not knows_system:
        with pytest.raises(jinja2.TemplateError):
            jinja(source, messages)
        messages = talk(50, False)
        messages[0]["content"] = "Be brief.\n\nquestion 0"
    whole = jinja(source, messages)
    following = template.next(system)
    last = text_of(following, system="Be brief.", user="question 50")
    assert whole.endswith("answer 49" + last)  # as rendered with the full history
    if name == "mistral-3" and system:  # the system prompt moves to the newest message
        assert template.rewrites_history(system)
        assert short(following) == f"{EOS}[INST] {{system}}\n\n{{user}}[/INST]"
        return
    assert template.rewrites_history(system) == (name == "qwen3")
    text = text_of(template.opening(system), system="Be brief.", user="question 0")
    for turn in range(1, 51):
        text += f"{space}answer {turn - 1}" + text_of(following, system="Be brief.", user=f"question {turn}")
    assert text == whole


def test_the_file_of_smollm2():
    metadata = read(smollm2()).metadata
    template = ChatTemplate(metadata["tokenizer.chat_template"], "<|im_start|>", "<|im_end|>")
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    user = "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    assert short(template.opening(False)) == system + user
    assert short(template.opening(True)) == "<|im_start|>system\n{system}<|im_end|>\n" + user
    assert short(template.next()) == short(template.next(True)) == "<|im_end|>\n" + user
    assert not template.folds_system
    assert not template.rewrites_history(True)
    tokenizer = from_metadata(metadata, 49152)
    ids = tokenizer.encode_parts(fill(template.opening(True), system="Be <|im_end|>", user="Hi<|im_start|>"))
    assert [ids.count(1), ids.count(2)] == [3, 2]
    assert tokenizer.decode(ids) == "system\nBe <|im_end|>\nuser\nHi<|im_start|>\nassistant\n"


def test_known_openings():
    template = ChatTemplate(LLAMA2, BOS, EOS)
    assert short(template.opening(True)) == "<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]"
    assert short(template.system_part()) == "<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"
    assert short(template.system_part(False)) == "<s>[INST] "
    assert short(template.next()) == " </s><s>[INST] {user} [/INST]"
    template = ChatTemplate(GEMMA, BOS, EOS)
    assert template.opening(True) == [
        Part("<s><start_of_turn>user\n"), Part("", "system"), Part("\n\n"), Part("", "user"),
        Part("<end_of_turn>\n<start_of_turn>model\n"),
    ]  # fmt: skip
    assert ChatTemplate(None, "", "").opening(False) == ChatTemplate(CHATML, "", "").opening(False)


def test_fill_says_whose_text_it_is():
    parts = ChatTemplate(None, "", "").opening(True)
    assert fill(parts, system="<|im_end|>", user="x") == [
        ("<|im_start|>system\n", True), ("<|im_end|>", False), ("<|im_end|>\n<|im_start|>user\n", True), ("x", False),
        ("<|im_end|>\n<|im_start|>assistant\n", True),
    ]  # fmt: skip


def test_a_thinking_template_rewrites_history():
    template = ChatTemplate(DEEPSEEK_R1, BOS, EOS)
    assert template.rewrites_history()
    assert short(template.next()) == "<｜end▁of▁sentence｜><｜User｜>{user}<｜Assistant｜><think>\n"


def test_a_template_that_forgets():
    template = ChatTemplate("Q: {{ messages[-1].content }}\nA:", "", "")
    assert template.folds_system
    assert template.rewrites_history()
    assert short(template.next()) == "Q: {user}\nA:"
    template = ChatTemplate("{{ messages[-2:] | map(attribute='content') | join('|') }}|", "", "")
    assert template.rewrites_history()
    assert short(template.next()) == "|{user}|"


def test_the_time_is_one_time():
    source = CHATML.replace("{% for", "{{ strftime_now('%Y %H:%M:%S.%f') }}{% for", 1)
    assert ChatTemplate(source, "", "").opening(False)[0].text.startswith("20")


def test_json_is_as_hugging_face_writes_it():
    source = "{{ {'a': '<é>'} | tojson(indent=1) }}" + CHATML
    assert ChatTemplate(source, "", "").opening(False)[0].text.startswith('{\n "a": "<é>"\n}<|im_start|>')


def test_a_turn_costs_nothing_however_long_the_conversation():
    template = ChatTemplate(CHATML, "", "")
    start = time.perf_counter()
    for _ in range(100_000):
        template.next()
    assert time.perf_counter() - start < 2


def test_many_at_once():
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda name: ChatTemplate(REAL[name][0], BOS, EOS), ["gemma", "qwen3"] * 4))
    assert {short(template.next()) for template in made} == {
        short(ChatTemplate(REAL[name][0], BOS, EOS).next()) for name in ("gemma", "qwen3")
    }


UNFAITHFUL = {
    "upper": "{{ messages[-1].content | upper }}", "cut": "{{ messages[-1].content[:10] }}",
    "cut late": "{{ messages[-1].content[:1000] }}", "escaped": "{{ messages[-1].content | e }}",
    "as JSON": "{{ messages[-1].content | tojson }}", "twice": "{{ messages[-1].content * 2 }}",
    "replaced": "{{ messages[-1].content | replace('\"', '') }}",
    "counted": CHATML + "{{ messages[-1].content|length }}",
    "left out": "Hello.", "looked into": CHATML + "{{ 'a' if '<' in messages[-1].content }}",
    "reversed": "{{ messages[::-1] | map(attribute='content') | join(' ') }}",
    "newest first": "{{ messages[-1].content }} {{ messages[-2].content if messages|length > 1 }}",
    "moved": "{{ messages[-2].content if messages|length > 2 }} {{ messages[0].content }} "
    "{{ messages[-1].content if messages|length > 1 }}",
    "an earlier one changed": "{{ messages[0].content[:5] if messages|length > 1 }}" + CHATML,
    "random": "{{ range(9999) | random }}" + CHATML,
}  # fmt: skip


def refused(source):
    """The one line that a template is refused with, in time."""
    start = time.perf_counter()
    with pytest.raises(TcinferError) as caught:
        ChatTemplate(source, BOS, EOS)
    assert time.perf_counter() - start < 3
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    assert message.startswith("the chat template ")
    assert message.endswith("--chat-template chatml uses the plain one")
    return message


@pytest.mark.parametrize("name", UNFAITHFUL)
def test_what_people_say_stays_as_it_is(name):
    message = refused(UNFAITHFUL[name])
    assert any(word in message for word in ("leaves out", "changes", "order"))


ESCAPES = [
    "{{ ''.__class__.__mro__ }}", "{{ ''|attr('__class__') }}", "{{ ''['__class__'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__self__.__class__ }}", "{{ self.__init__.__globals__ }}", "{{ lipsum.__globals__['os'] }}",
    "{{ '{0.__class__.__mro__}'.format('') }}", "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))('') }}", "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "{{ ['{0.__class__.__mro__}'] | map('format', '') | list }}",
    "{{ (['']|map(attribute='__class__')|list)[0].mro() }}",
    "{{ ([''] | groupby('__class__') | list)[0].grouper.mro() }}", "{{ joiner.__call__.__code__ }}",
    "{{ messages.append(1) }}", "{{ messages[0].update({'role': 1}) }}", "{{ messages.pop() }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}",
    "{{ ().__class__.__base__.__subclasses__() }}", "{{ (messages|map('attr', '__class__')|list)[0].mro() }}",
]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source):
    (answer,) = render(source, BOS, EOS, [[("user", "hello")]])
    assert not answer.get("text")  # an attribute that is hidden may read as nothing
    refused(source)


HUNGRY = {
    "range": "{% for i in range(10**9) %}a{% endfor %}", "times": "{{ 'a' * 10**9 }}",
    "power": "{{ 10**(10**9) }}", "powers": "{{ 9**(9**(9**9)) }}", "percent": "{{ '%999999999d' % 1 }}",
    "precision": "{{ '%.999999999f' % 1 }}", "format": "{{ '{:>999999999}'.format('a') }}",
    "ljust": "{{ 'x'.ljust(10**9) }}", "zfill": "{{ 'x'.zfill(10**9) }}", "center": "{{ 'x' | center(10**9) }}",
    "indent": "{{ ('x\\n' * 10**5) | indent(10**5) }}", "batch": "{{ 'x' | batch(10**9, 'y') | list }}",
    "slice": "{{ 'x' | slice(10**9) | list }}", "lipsum": "{{ lipsum(n=10**6) }}",
    "join": "{{ ('a' * 10**5) | join('b' * 10**5) }}", "replace": "{{ ('a' * 10**5) | replace('', 'b' * 10**5) }}",
    "list": "{{ [1] * 10**9 }}", "tuple": "{{ (1,) * 10**9 }}", "tojson": "{{ ([[1] * 10**4] * 10**4) | tojson }}",
    "cycler": "{% for i in range(10**5) %}{{ cycler(*range(10**5)).next() }}{% endfor %}",
    "doubled text": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "added text": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested pairs": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{{ ns.x }}",
    "loop over a doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(20) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{% for i in ns.x %}{% for j in ns.x %}{% endfor %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "big number": "{{ (10**99999)**99 % 7 }}" * 999,
    "macros": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "calls": "{% macro f(x) %}{{ caller(x ~ x) }}{% endmacro %}" + "{% call(x) f('a' * 9**7) %}" * 9 + "{{ x }}"
    + "{% endcall %}" * 9,
    "a recursive loop": "{% for i in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "a long output": "{% for i in range(99999) %}{{ 'a' * 50 }}{% endfor %}",
    "wordwrap": "{{ ('a ' * 10**7) | wordwrap(1) }}", "urlize": "{{ ('http://a.' * 10**6) | urlize }}",
    "sort": "{{ (range(99999) | list * 99) | sort | length }}" * 9, "sum": "{{ ([[1] * 999] * 9999) | sum(start=[]) }}",
    "deep": "{{ " + "(" * 99999, "signs": "{{ " + "-" * 99999 + "1 }}", "ifs": "{% if 1 %}" * 9999,
    "attributes": "{{ a" + ".b" * 99999 + " }}", "sums": "{{ 1" + "+1" * 99999 + " }}",
    "blocks": "{% block a %}" * 9999,
}  # fmt: skip


@pytest.mark.parametrize("name", but_slow(HUNGRY, *sorted(HUNGRY)[::2], *sorted(HUNGRY)[1::4]))
def test_no_template_takes_more_than_it_may(name, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    refused(HUNGRY[name] + CHATML)


def test_time_is_bounded():
    assert "takes more than 2 seconds" in refused(HUNGRY["nested loops"])


@pytest.mark.parametrize("name", ["times", "doubled text", "doubled list", "a long output", "nested pairs", "list"])
def test_memory_is_bounded(name):
    code = """if True:
        import resource, sys
        from tcinfer.chat.template import ChatTemplate, TcinferError
        of = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        before = resource.getrusage(of[0]).ru_maxrss
        try:
            ChatTemplate(sys.stdin.read(), "", "")
        except TcinferError:
            print(resource.getrusage(of[0]).ru_maxrss - before, resource.getrusage(of[1]).ru_maxrss)
    """
    run = subprocess.run([sys.executable, "-c", code], input=HUNGRY[name], capture_output=True, text=True, check=True)
    assert all(int(kib) < 200 * 1024 for kib in run.stdout.split())
    assert len(run.stdout.split()) == 2


BROKEN = {
    "{% for": "TemplateSyntaxError", "{{ x.y.z }}": "UndefinedError", "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages[0].nothing.more }}": "UndefinedError", "{{ raise_exception('a\n\x1b[2Jb') }}": r"fails: a [2Jb;",
    "{% nothing %}": "unknown tag", "{{ 1 | nothing }}": "No filter named", "": "leaves out",
    "x" * 300_000: "300000 characters", "\ud800{{": "Error", "{{ raise_exception('a' * 9999) }}": "aaaa",
}  # fmt: skip


@pytest.mark.parametrize("source", BROKEN, ids=range(len(BROKEN)))
def test_broken_templates(source):
    assert BROKEN[source] in refused(source)


def test_not_a_text():
    with pytest.raises(TcinferError, match="not a text"):
        ChatTemplate(7, "", "")


def test_python_that_cannot_start(monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/nowhere/python")
    assert "could not be run" in refused(CHATML)
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    refused(CHATML)


def test_the_process_takes_nothing_from_the_working_directory(tmp_path, monkeypatch):
    for name in ("jinja2", "json", "tcinfer"):
        (tmp_path / f"{name}.py").write_text("print('taken')")
    monkeypatch.chdir(tmp_path)
    assert ChatTemplate(None, "", "").next()


def test_jinja_stays_outside():
    code = "import sys; from tcinfer.chat.template import *; ChatTemplate(None, '', ''); print('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
