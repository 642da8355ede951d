"""Chat templates in the style of the common families, and for each the pieces it must give, written out by hand.

`pieces(turns)` is the whole conversation as (text, supervised); it shares nothing with the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tiny import CHATML, tiny_tokenizer

Turns = list[tuple[str, str]]
Pieces = list[tuple[str, bool]]

LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set reasoning = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{%- if loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
HEADING = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
)
END_BETWEEN = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% else %}{{ message['content'] }}{% if not loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
)
CHANNEL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Family:
    """A template, the special tokens of its tokenizer, and the pieces it gives."""

    template: str
    pieces: Callable[[Turns], Pieces]
    special: tuple[str, ...] = ()
    bos: str = "<|im_start|>"
    eos: str = "<|im_end|>"
    system: bool = True
    ordinary: tuple[str, ...] = field(default=())

    def tokenizer(self):
        """The tiny tokenizer with this family's control tokens and template."""
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        tokenizer.add_tokens(list(self.ordinary))
        tokenizer.bos_token, tokenizer.eos_token = self.bos, self.eos
        tokenizer.chat_template = self.template
        return tokenizer


def chatml_pieces(turns: Turns) -> Pieces:
    pieces = []
    for role, content in turns:
        if role == "assistant":
            pieces += [("<|im_start|>assistant\n", False), (content + "<|im_end|>", True), ("\n", False)]
        else:
            pieces.append((f"<|im_start|>{role}\n{content}<|im_end|>\n", False))
    return pieces


def llama3_pieces(turns: Turns) -> Pieces:
    pieces = [("<|begin_of_text|>", False)]
    for role, content in turns:
        heading = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        pieces += [(heading, False), (content.strip() + "<|eot_id|>", role == "assistant")]
    return pieces


def gemma_pieces(turns: Turns) -> Pieces:
    pieces = [("<bos>", False)]
    for role, content in turns:
        heading = "<start_of_turn>model\n" if role == "assistant" else "<start_of_turn>user\n"
        pieces += [(heading, False), (content.strip() + "<end_of_turn>", role == "assistant"), ("\n", False)]
    return pieces


def mistral_pieces(turns: Turns) -> Pieces:
    pieces = [("<s>", False)]
    for role, content in turns:
        pieces.append((f" {content}</s>", True) if role == "assistant" else (f"[INST] {content} [/INST]", False))
    return pieces


def phi3_pieces(turns: Turns) -> Pieces:
    pieces = []
    for role, content in turns:
        pieces += [(f"<|{role}|>\n", False), (content + "<|end|>", role == "assistant"), ("\n", False)]
    return [*pieces, ("<|endoftext|>", False)]


def qwen3_pieces(turns: Turns) -> Pieces:
    pieces = []
    for place, (role, content) in enumerate(turns):
        if role != "assistant":
            pieces.append((f"<|im_start|>{role}\n{content}<|im_end|>\n", False))
            continue
        thought, _, said = content.rpartition("</think>")
        thought = thought.replace("<think>", "").strip("\n")
        answer = f"<think>\n{thought}\n</think>\n\n" + said.lstrip("\n") if place == len(turns) - 1 else said.lstrip("\n")
        pieces += [("<|im_start|>assistant\n", False), (answer + "<|im_end|>", True), ("\n", False)]
    return pieces


def zephyr_pieces(turns: Turns) -> Pieces:
    pieces = []
    for role, content in turns:
        pieces += [(f"<|{role}|>\n", False), (f"{content}</s>", role == "assistant"), ("\n", False)]
    return pieces


def no_end_pieces(turns: Turns) -> Pieces:
    pieces = []
    for place, (role, content) in enumerate(turns):
        last = place == len(turns) - 1
        pieces.append((f"{role}:", False))
        pieces.append((f" {content}<|im_end|>" if last else f" {content}", role == "assistant"))
        pieces += [] if last else [("\n", False)]
    return pieces


def heading_pieces(turns: Turns) -> Pieces:
    pieces = []
    for role, content in turns:
        pieces += [(f"### {role}\n", False), (content + "<|im_end|>", role == "assistant"), ("\n", False)]
    return pieces


def end_between_pieces(turns: Turns) -> Pieces:
    forms = {"user": "[INST] {} [/INST]\n", "system": "{}\n", "assistant": "{}<|im_end|>"}
    return [(forms[role].format(content), role == "assistant") for role, content in turns]


def channel_pieces(turns: Turns) -> Pieces:
    pieces = []
    for role, content in turns:
        pieces.append((f"<|im_start|>{role}", False))
        pieces.append((f"{'<|channel|>final' * (role == 'assistant')}<|message|>{content}<|im_end|>", role == "assistant"))
    return pieces


FAMILIES = {
    "chatml": Family(CHATML, chatml_pieces),
    "generation": Family(GENERATION, chatml_pieces),
    "llama3": Family(
        LLAMA3,
        llama3_pieces,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": Family(
        GEMMA, gemma_pieces, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", system=False
    ),
    "mistral": Family(MISTRAL, mistral_pieces, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", system=False),
    "mistral-plain": Family(MISTRAL, mistral_pieces, ("<s>", "</s>"), "<s>", "</s>", system=False),
    "phi3": Family(PHI3, phi3_pieces, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), eos="<|endoftext|>"),
    "qwen3": Family(QWEN3, qwen3_pieces, ordinary=("<think>", "</think>")),
    "zephyr": Family(ZEPHYR, zephyr_pieces, ("<s>", "</s>"), "<s>", "</s>"),
    "no-end": Family(NO_END, no_end_pieces),
    "heading": Family(HEADING, heading_pieces),
    "end-between": Family(END_BETWEEN, end_between_pieces),
    "channel": Family(CHANNEL, channel_pieces, ("<|channel|>", "<|message|>")),
}
