"""Chat templates are strangers' programs: what they can reach, and what stops those that do not stop."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.data import sandbox as sandbox_module
from luthier.data import template_worker
from luthier.data.sandbox import TemplateSandbox
from luthier.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}]
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}",
    "one power": "{{ (9 ** (9 ** 9)) % 7 }}",
}


def sandbox(template: str, **options: float) -> TemplateSandbox:
    return TemplateSandbox(template, {"bos_token": "<s>"}, **options)


def test_renders_what_templates_use() -> None:
    template = (
        "{%- for message in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}{{ bos_token + message.content }}"
        "\n{% endfor %}"
        "{% generation %}{{ messages | tojson }}{% endgeneration %}"
        "{{ strftime_now('%Y-%m-%d') }}{% if tools is none %}!{% endif %}{% if add_generation_prompt %}?{% endif %}"
    )
    box = sandbox(template)
    text = '<s>hi\n[{"role": "user", "content": "hi"}]2024-07-26!'
    assert box.render([(MESSAGES, False), (MESSAGES, True)]) == [(text, None), (text + "?", None)]
    box.close()


def test_one_refusal_does_not_stop_the_others() -> None:
    box = sandbox("{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}")
    assert box.render([(MESSAGES * 2, False), (MESSAGES, False)]) == [(None, "one at a time"), ("hi", None)]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ messages.nothing.more }}", "'list object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages + 1 }}", 'TypeError: can only concatenate list (not "int") to list'),
        ("{% include 'secrets' %}", "TypeError: no loader for this environment specified"),
        ("{{ range(1000000) }}", "OverflowError: Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)"),
    ],
)
def test_what_a_template_may_not_do(template: str, said: str) -> None:
    assert sandbox(template).render([(MESSAGES, False)]) == [(None, said)]


def test_a_template_that_is_not_jinja() -> None:
    message = "the chat template must be valid Jinja; this one is not: unexpected end of template"
    with pytest.raises(DataError, match="^" + re.escape(message)):
        sandbox("{{ messages")


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_does_not_end_is_stopped(name: str) -> None:
    message = "a chat template must render within 1.5 seconds; this one was stopped. Check the model's chat template."
    with pytest.raises(DataError, match="^" + re.escape(message) + "$"):
        # Jinja works out constants while it compiles.
        sandbox(BOMBS[name], seconds=1.5).render([(MESSAGES, False)])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux bounds the address space of a process")
@pytest.mark.parametrize("template", ["{{ 'a' * 10 ** 11 }}", "{% set x = 'a' * 10 ** 9 %}{{ x ~ x ~ x ~ x }}"])
def test_a_template_that_eats_memory_is_stopped(template: str) -> None:
    box = sandbox(template, memory_bytes=400 * 2**20)
    assert box.render([(MESSAGES, False)]) == [(None, "it needs too much memory")]
    assert box.render([(MESSAGES, False)])[0][1] == "it needs too much memory"


def test_endless_output_is_stopped() -> None:
    box = sandbox("{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}")
    assert box.render([(MESSAGES, False)]) == [(None, f"ValueError: it wrote more than {128 * 2**20} characters")]


def test_a_worker_that_dies_is_an_error() -> None:
    box = sandbox("{{ messages[0].content }}")
    box._process.kill()
    with pytest.raises(DataError, match=r"^the chat template ended the process that renders it, as too much memory does\."):
        box.render([(MESSAGES, False)])


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs the timer signal of Unix")
def test_the_worker_ends_itself_should_its_owner_be_gone() -> None:
    requests = [{"template": BOMBS["loops"], "variables": {}}, {"jobs": [[MESSAGES, False]]}]
    done = subprocess.run(
        [sys.executable, "-I", template_worker.__file__, str(2**30), "0.5"],
        input="".join(json.dumps(request) + "\n" for request in requests).encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, b'{"error": null}\n')


def test_loops_nested_deeper_than_python_allows() -> None:
    template = "{% for a in [1] %}" * 30 + "{% endfor %}" * 30
    with pytest.raises(DataError, match=r"^the chat template must be valid Jinja; this one is not: SyntaxError: too many stat"):
        sandbox(template)


def test_jinja_may_be_where_isolated_python_does_not_look() -> None:
    """As after `pip install --user`, or with PYTHONPATH: the worker is started by a Python without jinja2."""
    python = Path(sys.executable).resolve()
    request = json.dumps({"template": "x", "variables": {}}) + "\n"
    command = [str(python), "-I", "-S", template_worker.__file__, str(2**30), "25"]
    bare = subprocess.run(command, input=request, capture_output=True, text=True, timeout=60, check=False)
    assert "No module named 'jinja2'" in bare.stderr
    given = subprocess.run(
        [*command, *sandbox_module._LIBRARIES], input=request, capture_output=True, text=True, timeout=60, check=False
    )
    assert given.stdout == '{"error": null}\n', given.stderr


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import jinja2_that_is_not_there\n")
    monkeypatch.setattr(sandbox_module, "_WORKER", worker)
    message = "it ended with: ModuleNotFoundError: No module named 'jinja2_that_is_not_there'. Check the model's chat template"
    with pytest.raises(DataError, match=re.escape(message)):
        sandbox("x")


def test_many_jobs_go_in_portions() -> None:
    box = sandbox("{{ messages[0].content | length }}")
    jobs = [([{"role": "user", "content": "x" * size}], False) for size in (400_000, 700_000, 5, 2**21, 7)]
    assert list(box.render_all(jobs)) == [(str(len(messages[0]["content"])), None) for messages, _ in jobs]
    assert list(box.render_all([])) == []


def test_the_worker_ends_with_its_owner() -> None:
    box = sandbox("{{ messages[0].content }}")
    process = box._process
    assert process.poll() is None
    del box
    assert process.wait(timeout=10) is not None
