"""Answers of many prompts together equal Transformers' own generation of each alone, through both kinds of session."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf
from tiny import FAMILIES, tiny_model, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM

import luthier
from luthier.adapters import AdapterSpec, attach, trainable_parameters
from luthier.errors import ConfigError, DataError, NumericError
from luthier.generation import Generator, LabelConstraint, Sampling, generation_obstacle, generator
from luthier.generation.generator import AnswerRow
from luthier.generation.native_session import NativeSession
from luthier.generation.transformers_session import TransformersSession
from luthier.kernels import native

needs_native = pytest.mark.skipif(not native.use_native(), reason="the decoder is one of the compiled kernels")
NATIVE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
def test_who_generates(family: str) -> None:
    obstacle = generation_obstacle(tiny_model(family))
    assert (obstacle is None) == (family in NATIVE), obstacle


@needs_native
@pytest.mark.parametrize("family", NATIVE)
def test_the_native_decoder_writes_what_transformers_writes(family: str, prompts, alone) -> None:
    model = tiny_model(family, seed=2)
    assert generation_obstacle(model) is None
    expected = [alone(model, prompt, 70 if len(prompt) == 130 else 12) for prompt in prompts]
    assert Generator(model).generate(prompts, 12) == [answer[:12] for answer in expected]
    assert Generator(model).generate([prompts[4]], 70) == [expected[4]]  # over the end of a page


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_modules_write_the_same_in_a_padded_batch(family: str, prompts, alone, through_modules) -> None:
    model = tiny_model(family, seed=2)
    assert Generator(model).generate(prompts, 12) == [alone(model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_rows_with_a_memory_of_another_kind_go_alone_and_without_the_models_own_settings(family: str, prompts, alone) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "n_layer": 2, "n_head": 4, "vocab_size": 400}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, bos_token_id=1, eos_token_id=2)).eval()
    expected = [alone(model, prompt, 8) for prompt in prompts[:3]]
    own = model.generation_config
    own.repetition_penalty, own.min_new_tokens, own.no_repeat_ngram_size = 5.0, 6, 1
    assert Generator(model).generate(prompts[:3], 8) == expected
    assert model.generation_config is own
    stops = (expected[0][0], expected[1][3])
    own.repetition_penalty, own.min_new_tokens, own.no_repeat_ngram_size = None, None, None
    ended = [alone(model, prompt, 8, stops) for prompt in prompts[:3]]
    assert Generator(model, stops=frozenset(stops)).generate(prompts[:3], 8) == ended


@needs_native
@pytest.mark.parametrize("base", ["f32", "bf16", "f16", "nf4", Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0])
def test_stored_weights_and_an_adapter(base, tmp_path, prompts) -> None:
    """Prompt and steps give the logits of the model's own forward over the whole text.

    bound: the fixed point of few tokens rounds activations to 15 bits (csrc/decode.h).
    """
    if isinstance(base, str):
        model, _ = luthier.load(str(write_tiny(tmp_path / "model")), base=base)
    else:
        model, _ = luthier.load(str(write_gguf(tmp_path / "m.gguf", random_model("llama"), "llama", base)))
    attach(model, AdapterSpec(rank=3), seed=0)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        model.eval()
        assert generation_obstacle(model) is None
        session = NativeSession(model)
        rows, logits = session.start([prompts[4], prompts[7], prompts[3]])
        parts = [logits, session.extend(rows, [7, 8, 9]), session.extend(rows[:1], [11])]
        first = model(torch.tensor([[*prompts[4], 7, 11]])).logits[0]
        third = model(torch.tensor([[*prompts[3], 9]])).logits[0]
    assert_near(torch.stack([parts[0][0], parts[1][0], parts[2][0]]), first[-3:])
    assert_near(torch.stack([parts[0][2], parts[1][2]]), third[-2:])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("native_rows", [pytest.param(True, marks=needs_native), False])
def test_answers_end_at_stops_and_rows_leave(native_rows: bool, prompts, alone, request) -> None:
    if not native_rows:
        request.getfixturevalue("through_modules")
    model = tiny_model("llama", seed=2)
    free = [alone(model, prompt, 12) for prompt in prompts]
    stops = (free[0][0], free[1][4], free[4][9])
    expected = [alone(model, prompt, 12, stops) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2
    assert expected[0] == []
    told = {}
    answers = Generator(model, stops=frozenset(stops)).generate(prompts, 12, done=told.__setitem__)
    assert answers == expected
    assert told == dict(enumerate(expected))


class _Counting:
    """A session that keeps what it was asked."""

    def __init__(self, session):
        self.session, self.joins = session, session.joins
        self.started, self.extended = [], []

    def __getattr__(self, name: str):
        return getattr(self.session, name)

    def start(self, prompts):
        self.started.append([list(prompt) for prompt in prompts])
        return self.session.start(prompts)

    def extend(self, rows, tokens):
        self.extended.append(len(rows))
        return self.session.extend(rows, tokens)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[_Counting]:
    made: list[_Counting] = []

    def make(kind):
        def build(model):
            made.append(_Counting(kind(model)))
            return made[-1]

        return build

    monkeypatch.setattr(generator, "NativeSession", make(NativeSession))
    monkeypatch.setattr(generator, "TransformersSession", make(TransformersSession))
    return made


@needs_native
def test_waiting_rows_take_the_place_of_those_that_ended(prompts, alone, sessions) -> None:
    model = tiny_model("llama", seed=2)
    expected = [alone(model, prompt, 12) for prompt in prompts]
    stops = frozenset({expected[0][2], expected[1][4]})
    ended = [alone(model, prompt, 12, tuple(stops)) for prompt in prompts]
    assert Generator(model, stops=stops, max_rows=4).generate(prompts, 12) == ended
    (session,) = sessions
    assert len(session.started) > 1
    assert max(session.extended) <= 4
    assert Counter(map(tuple, (prompt for group in session.started for prompt in group))) == Counter(map(tuple, prompts))
    assert session._pool.used == 0


@needs_native
def test_a_row_starts_beside_others_only_where_the_cache_has_room(prompts, sessions, monkeypatch) -> None:
    model = tiny_model("llama", seed=2)
    expected = Generator(model).generate(prompts, 6)
    page = sessions[0]._pool.page_bytes
    monkeypatch.setattr(generator, "CACHE_BYTES_AT_ONCE", 3 * page)  # the longest row takes 3
    used = []
    monkeypatch.setattr(_Counting, "extend", _used(used))
    assert Generator(model).generate(prompts, 6) == expected
    assert max(used) <= 3
    assert len(sessions[1].started) > 2


def _used(pages: list[int]):
    def extend(self, rows, tokens):
        logits = self.session.extend(rows, tokens)
        pages.append(self._pool.used)
        return logits

    return extend


@needs_native
def test_a_beginning_in_common_counts_once_where_rows_start_together(sessions, monkeypatch) -> None:
    model = tiny_model("llama", seed=2)
    beginning = list(range(3, 203))
    prompts = [[*beginning, token] for token in range(300, 312)]
    monkeypatch.setattr(generator, "PROMPT_TOKENS_AT_ONCE", 220)
    page = NativeSession(model).cache_bytes(1)
    monkeypatch.setattr(generator, "CACHE_BYTES_AT_ONCE", 15 * page)  # 4 pages of the first row, the last one of each other
    laid = []
    prefill = generator.NativeSession  # the counting one

    def build(made):
        session = prefill(made)
        inner = session.session._stack.prefill
        session.session._stack.prefill = lambda ids, *rest: laid.append(len(ids)) or inner(ids, *rest)
        return session

    monkeypatch.setattr(generator, "NativeSession", build)
    Generator(model).generate(prompts, 3)
    assert laid == [200 + 12]
    monkeypatch.setattr(generator, "CACHE_BYTES_AT_ONCE", 14 * page)
    Generator(model).generate(prompts, 3)
    assert laid[1:] == [200 + 11, 201]


@pytest.mark.parametrize("native_rows", [pytest.param(True, marks=needs_native), False])
def test_sampled_rows_do_not_depend_on_their_neighbours(native_rows: bool, prompts, request) -> None:
    if not native_rows:
        request.getfixturevalue("through_modules")
    model = tiny_model("qwen3", seed=2)
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=5)
    state = torch.get_rng_state()
    together = Generator(model).generate(prompts, 8, sampling=sampling)
    assert Generator(model, max_rows=1).generate(prompts, 8, sampling=sampling) == together
    assert Generator(model).generate(prompts[:1], 8, sampling=sampling) == together[:1]
    assert Generator(model).generate(prompts, 8, sampling=Sampling(temperature=1.5, top_k=50, seed=6)) != together
    assert together[3] != together[9]  # the same prompt, another row
    assert torch.equal(torch.get_rng_state(), state)


def test_a_repetition_penalty_is_transformers_own(prompts) -> None:
    model = tiny_model("llama", seed=2)
    found = Generator(model).generate(prompts[:4], 12, sampling=Sampling(repetition_penalty=1.7))
    for prompt, answer in zip(prompts, found, strict=False):
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.7,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == output[0, len(prompt) :].tolist()
    assert found != Generator(model).generate(prompts[:4], 12)


@pytest.mark.parametrize("native_rows", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=4.0, repetition_penalty=1.3)])
@pytest.mark.parametrize("stops", [frozenset({2}), frozenset()])
def test_every_answer_is_one_of_the_labels(native_rows: bool, sampling, stops, prompts, request) -> None:
    if not native_rows:
        request.getfixturevalue("through_modules")
    model = tiny_model("llama", seed=2)
    labels = [[5, 6], [5, 6, 7, 8], [9], [10, 11, 12], [10, 11, 13]]
    answers = Generator(model, stops=stops).generate(prompts * 3, 4, sampling=sampling, constraint=LabelConstraint(labels))
    assert all(answer in labels for answer in answers)
    assert len({tuple(answer) for answer in answers}) > 1


def test_the_likeliest_label_token_by_token() -> None:
    """Among labels of one token, the greedy answer is the label with the largest logit behind the prompt."""
    model = tiny_model("llama", seed=2)
    prompt, labels = [4, 8, 15, 16, 23, 42], [[token] for token in range(50, 90)]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1, 50:90]
    assert Generator(model).generate([prompt], 1, constraint=LabelConstraint(labels)) == [[50 + int(logits.argmax())]]


def test_an_answer_ends_where_positions_end() -> None:
    model = tiny_model("gpt2", seed=2)
    answers = Generator(model).generate([[5] * 250, [6] * 3], 50)
    assert list(map(len, answers)) == [6, 50]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_weights_that_are_not_finite_are_said(family: str) -> None:
    if family == "mamba":
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=400)
        )
    else:
        model = tiny_model(family, tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(NumericError, match="logits must be finite; the largest is nan"):
        Generator(model.eval()).generate([[5, 6, 9]], 3)


def test_wrong_options_and_prompts() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ConfigError, match="max_rows must be at least 1; got 0"):
        Generator(model, max_rows=0)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1; got 0"):
        Generator(model).generate([[5]], 0)
    with pytest.raises(DataError, match=r"1 to 255 tokens, the model having 256 positions; got:\n  - prompt 2 is empty\n"):
        Generator(model).generate([[5], [], [5] * 256], 3)
    labels = LabelConstraint([[5], [6, 7, 8]])
    with pytest.raises(ConfigError, match="room for its longest label of 3 tokens; prompt 2 leaves 2"):
        Generator(model).generate([[5], [5] * 254], 10, constraint=labels)
    assert Generator(model).generate([], 3) == []


def test_a_row_takes_what_must_follow_at_once() -> None:
    labels = LabelConstraint([[5, 6, 7], [8], [8, 9]])
    likes = [torch.zeros(20).index_fill(0, torch.tensor([token]), 3.0) for token in range(20)]
    row = AnswerRow(0, [1], 4, frozenset({2}), Sampling(), labels)
    assert row.choose(likes[5]) == 5
    assert (row.answer, row.has_ended) == ([5, 6, 7], True)
    row = AnswerRow(0, [1], 4, frozenset({2}), Sampling(), labels)
    assert row.choose(likes[8]) == 8
    assert (row.answer, row.has_ended) == ([8], False)  # 8 may end here, or go on
    assert row.choose(likes[2]) is None
    assert (row.answer, row.has_ended) == ([8], True)
