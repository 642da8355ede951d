"""Conversations: streaming, sampling, the cache across turns, and being interrupted."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from luthier.data import Renderer
from luthier.errors import ConfigError, DataError
from luthier.evaluation.conversation import Conversation
from luthier.evaluation.generate import generate_batch
from luthier.evaluation.pieces import PieceDecoder, text_of
from luthier.generation import LabelConstraint, Sampling


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    """A model that never ends by itself and speaks only tokens that the tokenizer knows."""
    model = tiny_model("llama", tied=False, seed=3)
    with torch.no_grad():
        model.lm_head.weight[:3] = 0
        model.lm_head.weight[len(tokenizer) :] = 0
    return model


def prompt_of(tokenizer, *contents: str, system: str | None = None) -> list[int]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, (*contents, "-"), strict=False)]
    turns = [{"role": "system", "content": system}, *turns] if system else turns
    return Renderer(tokenizer, max_length=4096).render({"messages": turns}, "test").prompt_ids


@pytest.mark.parametrize("text", ["plain", "é", "日本語 🎻 naïve", "🏳️‍🌈 and text", "a\ufffdb\ufffd"])
def test_pieces_joined_are_the_text_and_no_character_is_cut(text: str, tokenizer) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.add(token) for token in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert decoder.finish() == ""
        assert "".join(pieces) == text
    else:
        assert "".join([*pieces, decoder.finish()]) == text


def test_bytes_that_are_no_character_come_out_as_the_tokenizer_writes_them(tokenizer) -> None:
    ids = [*tokenizer("ab", add_special_tokens=False).input_ids, *tokenizer("é🎻", add_special_tokens=False).input_ids[:-1]]
    ids += tokenizer("c", add_special_tokens=False).input_ids + tokenizer("🎻", add_special_tokens=False).input_ids[:2]
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.add(token) for token in ids]
    assert "".join([*pieces, decoder.finish()]) == text_of(tokenizer, ids)


def test_an_answer_streams_and_equals_the_batched_one(model, tokenizer) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=20)
    pieces = list(conversation.ask("hello"))
    assert len(pieces) > 3
    expected = generate_batch(model, tokenizer, [prompt_of(tokenizer, "hello")], max_new_tokens=20)
    assert "".join(pieces) == expected[0]


def test_the_cache_lives_across_turns_and_reset_forgets(model, tokenizer) -> None:
    conversation = Conversation(model, tokenizer, system="Be brief.", max_new_tokens=8)
    first = "".join(conversation.ask("hello"))
    lengths = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    second = "".join(conversation.ask("and now?"))
    whole = prompt_of(tokenizer, "hello", first, "and now?", system="Be brief.")
    assert second == generate_batch(model, tokenizer, [whole], max_new_tokens=8)[0]
    start = prompt_of(tokenizer, "hello", system="Be brief.")
    written = tokenizer(first, add_special_tokens=False).input_ids
    if whole[len(start) : len(start) + len(written)] == written:
        assert lengths[0] <= len(whole)
    conversation.reset()
    assert conversation.turns == [{"role": "system", "content": "Be brief."}]
    assert "".join(conversation.ask("hello")) == first


def test_only_what_is_new_is_read(model, tokenizer) -> None:
    """With an answer that tokenizes the way it was written, a second turn reads the question and nothing before it."""
    token = tokenizer("x", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 0.0
    model.lm_head.register_forward_hook(lambda _m, _i, output: output.index_fill(-1, torch.tensor([token]), 9.0))
    conversation = Conversation(model, tokenizer, max_new_tokens=1)
    lengths = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    assert "".join(conversation.ask("hello")) == "x"
    assert "".join(conversation.ask("again")) == "x"
    first, both = len(prompt_of(tokenizer, "hello")), len(prompt_of(tokenizer, "hello", "x", "again"))
    assert lengths == [first, both - first]


def test_sampling_follows_its_seed_and_top_p(model, tokenizer) -> None:
    def answer(**values) -> str:
        return "".join(Conversation(model, tokenizer, max_new_tokens=16, sampling=Sampling(**values)).ask("hello"))

    state = torch.get_rng_state()
    greedy = answer()
    warm = answer(temperature=3.0, seed=1)
    assert warm == answer(temperature=3.0, seed=1)
    assert warm != answer(temperature=3.0, seed=2)
    assert warm != greedy
    assert answer(temperature=3.0, top_p=1e-6) == greedy
    assert torch.equal(torch.get_rng_state(), state)


def test_answers_may_be_constrained_and_each_draws_numbers_of_its_own(model, tokenizer) -> None:
    labels = LabelConstraint.of_texts(tokenizer, ["table", "jumps over", "tab"])
    conversation = Conversation(model, tokenizer, sampling=Sampling(temperature=5.0), constraint=labels)
    said = ["".join(conversation.ask("hello")) for _ in range(12)]
    assert set(said) <= {"table", "jumps over", "tab"}
    assert len(set(said)) > 1


def test_an_interrupted_answer_stays_and_the_conversation_goes_on(model, tokenizer) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=30)
    answer = conversation.ask("hello")
    said = next(answer) + next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)
    assert conversation.turns[-1] == {"role": "assistant", "content": said}
    expected = generate_batch(model, tokenizer, [prompt_of(tokenizer, "hello", said, "more")], max_new_tokens=30)
    assert "".join(conversation.ask("more")) == expected[0]


def test_an_interruption_inside_the_model_does_not_leave_half_a_cache(model, tokenizer) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=6)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("hello"))
    hook.remove()
    assert conversation.turns == []
    expected = generate_batch(model, tokenizer, [prompt_of(tokenizer, "hello")], max_new_tokens=6)
    assert "".join(conversation.ask("hello")) == expected[0]


@pytest.mark.parametrize("said", ["so\x00me\ufdd0", "\x00", "\ufdd3 \ufdef", ""])
def test_characters_that_no_turn_may_hold_do_not_end_the_conversation(model, tokenizer, monkeypatch, said: str) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=5)
    monkeypatch.setattr(conversation, "_answer", lambda _prompt: iter(said))
    assert "".join(conversation.ask("hello")) == said
    stored = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "some"}] if said[:1] == "s" else []
    assert conversation.turns == stored
    monkeypatch.undo()
    assert list(conversation.ask("and now?"))


def test_control_tokens_in_a_message_are_plain_text(model, tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    ids = conversation._prompt("<|im_end|> end")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_without_a_template_each_message_stands_alone(model) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    conversation = Conversation(model, tokenizer, max_new_tokens=5)
    assert not conversation.remembers
    first = "".join(conversation.ask("hello"))
    assert "".join(conversation.ask("hello")) == first
    with pytest.raises(ConfigError, match="a system message needs a chat template"):
        Conversation(model, tokenizer, system="Be brief.")


def test_a_conversation_longer_than_the_model_is_refused(tokenizer) -> None:
    conversation = Conversation(tiny_model("gpt2"), tokenizer, max_new_tokens=300)
    with pytest.raises(DataError, match="a conversation must stay below the model's 256 positions"):
        list(conversation.ask("word " * 300))
    assert list(conversation.ask("hello"))
    labels = LabelConstraint([[5] * 250, [6]])
    conversation = Conversation(tiny_model("gpt2"), tokenizer, max_new_tokens=300, constraint=labels)
    with pytest.raises(DataError, match="a conversation must stay below the model's 256 positions"):
        list(conversation.ask("hello"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        (
            {"max_new_tokens": 2, "constraint": LabelConstraint([[5], [6, 7, 8]])},
            "room for its longest label of 3 tokens; max_new_tokens is 2",
        ),
    ],
)
def test_values_out_of_range(model, tokenizer, values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Conversation(model, tokenizer, **values)
