"""Ollama's Modelfile: the Go template writes what the model's chat template does, or there is none."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from tiny import CHATML, tiny_tokenizer

from luthier.data.sandbox import TemplateSandbox
from luthier.export.modelfile import go_template, modelfile, turn_texts

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from chat_templates import GEMMA, LLAMA3, MISTRAL, PHI3, ZEPHYR

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "phi3": PHI3, "zephyr": ZEPHYR}
TURNS = [("user", "first?"), ("assistant", "yes."), ("user", "second?"), ("assistant", "no."), ("user", "third?")]


def tokenizer_with(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def go(template: str, system: str, turns: list[tuple[str, str]]) -> str:
    """What Go's template engine makes of the few actions used here."""
    head, body = template.split("{{ range .Messages }}")
    found = re.fullmatch(r"(?s)\{\{ if \.System \}\}(.*?)\{\{ \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", head)
    text = head if found is None else found[1] + system + found[2] if system else found[3]
    actions = re.fullmatch(
        r'(?s)\{\{ if eq \.Role "user" \}\}(.*?)\{\{ \.Content \}\}(.*?)\{\{ else if eq \.Role "assistant" \}\}'
        r"(.*?)\{\{ \.Content \}\}(.*?)\{\{ end \}\}\{\{ end \}\}",
        body,
    )
    assert actions is not None
    for role, content in turns:
        text += f"{actions[1]}{content}{actions[2]}" if role == "user" else f"{actions[3]}{content}{actions[4]}"
    return text


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("system", ["", "be brief"])
def test_the_go_template_writes_the_same_text(name: str, system: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    template = go_template(tokenizer)
    assert template is not None
    if system and ".System" not in template:
        return  # the family takes no system text; Ollama leaves it out then
    messages = [{"role": role, "content": content} for role, content in [*([("system", system)] if system else []), *TURNS]]
    variables = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    sandbox = TemplateSandbox(TEMPLATES[name], variables)
    ((expected, error),) = sandbox.render([(messages, True)])
    sandbox.close()
    assert expected is not None, error
    assert go(template, system, TURNS) == expected


def test_templates_that_cannot_be_said_have_none() -> None:
    """One writes another thing around each turn, one writes what Go would take for an action of its own."""
    changing = CHATML.replace("message['content']", "message['content'] + (loop.length | string)")
    for template in (changing, CHATML.replace("<|im_end|>", "{' + '{")):
        tokenizer = tokenizer_with(template)
        assert turn_texts(tokenizer) is None
        text, note = modelfile("m.gguf", tokenizer, ["<|im_end|>"])
        assert "TEMPLATE" not in text
        assert note == "The chat template cannot be said in Ollama's language; Ollama will look for one that fits the file's."
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert modelfile("m.gguf", tokenizer, []) == ("FROM ./m.gguf\nPARAMETER temperature 0\n", None)


def test_an_adapter_stands_on_a_base() -> None:
    text, _ = modelfile("base.gguf", tiny_tokenizer(), ['say "stop"'], adapter="a.gguf")
    assert "FROM ./base.gguf\nADAPTER ./a.gguf\n" in text
    assert 'PARAMETER stop "say \\"stop\\""\n' in text
