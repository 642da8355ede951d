"""Metrics equal their definitions, and measuring leaves no trace on the model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model, tiny_tokenizer

from luthier.data import Dataset, Renderer
from luthier.errors import ConfigError, DataError, NumericError, PreflightError
from luthier.evaluation import evaluate as evaluate_module
from luthier.evaluation import scores
from luthier.evaluation.answers import Answer
from luthier.evaluation.evaluate import evaluate
from luthier.evaluation.generate import generate_batch
from luthier.evaluation.sets import Extras
from luthier.evaluation.stops import end_tokens
from luthier.matrices import NF4Matrix
from luthier.models.load import load
from luthier.training.prepare import RunData, check_rows_fit

CHANNEL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
QUESTIONS = ["one", "two and two", "three " * 30, "four", "five?"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer, max_length=400)


def dataset_of(renderer, rows: list[dict]) -> Dataset:
    return Dataset([renderer.render(row, f"row {number}") for number, row in enumerate(rows)], {})


def some_rows() -> list[dict]:
    return [{"prompt": question, "completion": question.upper()} for question in QUESTIONS]


def test_loss_is_the_mean_over_all_supervised_tokens(tokenizer, renderer, monkeypatch) -> None:
    model = tiny_model("llama").train()
    dataset = dataset_of(renderer, some_rows())
    total, tokens = 0.0, 0
    for example in dataset.examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1]
        targets = torch.tensor(example.ids[1:]).masked_fill(~torch.tensor(example.supervised[1:]), -100)
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        tokens += sum(example.supervised)
    for pack_tokens in (1, 100, 2048):
        monkeypatch.setattr(scores, "PACK_TOKENS", pack_tokens)
        result = evaluate(model, tokenizer, dataset, renderer, metrics=("loss",), max_new_tokens=4)
        assert result.metrics == {
            "loss": pytest.approx(total / tokens, rel=1e-5),
            "perplexity": pytest.approx(math.exp(total / tokens), rel=1e-4),
            "tokens": tokens,
        }
        assert (result.rows, result.answers) == (5, [])


def test_exact_match_counts_answers_equal_but_for_white_space(tokenizer, renderer) -> None:
    model = tiny_model("llama", seed=1)
    rows = some_rows()
    prompts = [renderer.render(row, "row").prompt_ids for row in rows]
    given = generate_batch(model, tokenizer, prompts, max_new_tokens=5)
    rows[1]["completion"] = f" {given[1].strip()}\n" if given[1].strip() else "x"
    dataset = dataset_of(renderer, rows)
    result = evaluate(model, tokenizer, dataset, renderer, metrics=("exact",), max_new_tokens=5)
    right = [answer.exact for answer in result.answers]
    assert right == [False, bool(given[1].strip()), False, False, False]
    assert result.metrics == {"exact_match": sum(right) / 5}
    assert [answer.got for answer in result.answers] == given
    assert [answer.prompt for answer in result.answers] == QUESTIONS
    assert result.answers[3].expected == "FOUR"


def test_nothing_about_the_model_changes(tokenizer, renderer) -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    results = [evaluate(model, tokenizer, dataset_of(renderer, some_rows()[:2]), renderer, max_new_tokens=4) for _ in range(2)]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_limit_takes_the_first_rows_and_progress_is_told(tokenizer, renderer) -> None:
    model = tiny_model("llama")
    progress = []
    result = evaluate(
        model, tokenizer, dataset_of(renderer, some_rows()), renderer, max_new_tokens=2, rows=2,
        progress=lambda *state: progress.append(state),
    )  # fmt: skip
    assert result.rows == len(result.answers) == 2
    assert progress[0] == ("measuring the loss", 2, 2)
    assert progress[-1] == ("generating", 2, 2)


def test_plain_text_has_a_loss_and_no_answers(tokenizer, renderer) -> None:
    model = tiny_model("llama")
    mixed = Dataset([renderer.render({"text": "some words"}, "0"), renderer.render(some_rows()[0], "1")], {})
    result = evaluate(model, tokenizer, mixed, renderer, max_new_tokens=20)
    assert len(result.answers) == 1
    assert result.notes == ["exact match leaves out 1 rows of plain text, which expect no answer"]
    plain = Dataset(mixed.examples[:1], {})
    result = evaluate(model, tokenizer, plain, renderer, max_new_tokens=2)
    assert "exact_match" not in result.metrics
    with pytest.raises(DataError, match="exact match needs rows with an answer"):
        evaluate(model, tokenizer, plain, renderer, metrics=("exact",), max_new_tokens=2)


def test_expected_answers_that_cannot_be_given_whole_are_counted(tokenizer, renderer) -> None:
    rows = [{"prompt": "q", "completion": answer} for answer in ("x", "three words here", "a rather long answer to that")]
    lengths = [len(tokenizer(row["completion"], add_special_tokens=False).input_ids) for row in rows]
    dataset = dataset_of(renderer, rows)
    for room in (lengths[0], lengths[1] - 1, lengths[1], lengths[2]):
        result = evaluate(tiny_model("llama"), tokenizer, dataset, renderer, metrics=("exact",), max_new_tokens=room)
        long = sum(length > room for length in lengths)
        note = f"{long} of 3 expected answers are longer than {room} tokens and count as wrong; raise --max-new-tokens"
        assert result.notes == ([note] if long else [])


def test_an_answer_that_begins_with_control_tokens_is_given_whole_and_compared_without_them(monkeypatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    tokenizer.chat_template = CHANNEL
    renderer = Renderer(tokenizer, max_length=100)
    dataset = dataset_of(renderer, [{"prompt": "hi", "completion": "yes <|message|>"}])
    (example,) = dataset.examples
    answer = [token for token, supervised in zip(example.ids, example.supervised, strict=True) if supervised]
    assert answer[0] == tokenizer.convert_tokens_to_ids("<|channel|>")
    model = tiny_model("llama")
    assert end_tokens(model, tokenizer, renderer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    given = iter(answer)
    monkeypatch.setattr(evaluate_module, "_check_finite", lambda model, example: None)  # a forward pass of its own
    model.lm_head.register_forward_hook(lambda _m, _i, output: output.index_fill(-1, torch.tensor([next(given)]), 1e4))
    result = evaluate(model, tokenizer, dataset, renderer, metrics=("exact",), max_new_tokens=40)
    assert result.answers == [Answer("hi", "finalyes <|message|>", "finalyes <|message|>", exact=True)]


@pytest.mark.parametrize("metric", ["loss", "exact"])
def test_rows_beyond_the_model_are_named(tokenizer, metric) -> None:
    renderer = Renderer(tokenizer, max_length=1000)
    dataset = dataset_of(renderer, [{"prompt": "q", "completion": "a"}, {"prompt": "zq " * 200, "completion": "ok"}])
    length = len(dataset.examples[1].ids)
    message = f"256 positions and vocabulary of 512; these do not:\n  - row 1 has {length} tokens\nLeave long rows out"
    model = tiny_model("gpt2")
    with pytest.raises(DataError, match=re.escape(message)):
        evaluate(model, tokenizer, dataset, renderer, metrics=(metric,), max_new_tokens=2)
    dataset.examples.pop()
    dataset.examples[0].ids[0] = 512
    with pytest.raises(DataError, match=r"these do not:\n  - row 0 has token 512\n"):
        evaluate(model, tokenizer, dataset, renderer, metrics=(metric,), max_new_tokens=2)


def test_the_vocabulary_is_that_of_an_embedding_in_4_bits_too(tokenizer, tiny_llama: Path) -> None:
    """The codes of its table are not its rows."""
    renderer = Renderer(tokenizer, max_length=100)
    dataset = dataset_of(renderer, [{"prompt": "q", "completion": "a"}])
    model = load(str(tiny_llama)).model
    embedding = model.get_input_embeddings()
    embedding.matrix = NF4Matrix.quantize(embedding.matrix.dequantize())
    evaluate(model, tokenizer, dataset, renderer, metrics=("loss",), max_new_tokens=2)
    dataset.examples[0].ids[0] = 512
    with pytest.raises(DataError, match=r"vocabulary of 512; these do not:\n  - row 0 has token 512\n"):
        evaluate(model, tokenizer, dataset, renderer, metrics=("loss",), max_new_tokens=2)
    with pytest.raises(PreflightError, match="below the model's vocabulary of 512; row 0 has 512"):
        check_rows_fit(model, RunData(renderer, dataset, None))


def test_what_cannot_be_measured(tokenizer, renderer) -> None:
    model = tiny_model("llama")
    dataset = dataset_of(renderer, some_rows())
    with pytest.raises(
        ConfigError,
        match=r"metrics are loss, exact, json, label, bleu, chrf, rouge, choice; got 'exct'. Did you mean 'exact'\?",
    ):
        evaluate(model, tokenizer, dataset, renderer, metrics=("exct",), max_new_tokens=2)
    with pytest.raises(DataError, match="needs at least one row"):
        evaluate(model, tokenizer, Dataset([], {}), renderer, max_new_tokens=2)
    for example in dataset.examples:
        example.supervised = [False] * len(example.ids)
    with pytest.raises(DataError, match="a loss needs supervised tokens"):
        evaluate(model, tokenizer, dataset, renderer, metrics=("loss",), max_new_tokens=2)


def test_a_loss_that_is_not_finite_is_an_error(tokenizer, renderer) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericError, match="the loss must be finite; it is nan"):
        evaluate(model, tokenizer, dataset_of(renderer, some_rows()), renderer, metrics=("loss",), max_new_tokens=2)


def test_every_metric_in_one_call(tokenizer, renderer) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    model = tiny_model("llama")
    rows = [{"prompt": question, "completion": json.dumps({"n": number % 2})} for number, question in enumerate(QUESTIONS)]
    dataset = dataset_of(renderer, rows)
    metrics = ("loss", "exact", "json", "label", "bleu", "chrf", "rouge")
    result = evaluate(model, tokenizer, dataset, renderer, metrics=metrics, max_new_tokens=3)
    assert list(result.metrics) == [
        "loss", "perplexity", "tokens", "exact_match", "json_match", "json_f1", "json_precision", "json_recall", "json_valid",
        "bleu", "chrf", "rouge1", "rouge2", "rougeL", "json_invalid", "label_accuracy",
    ]  # fmt: skip
    assert {figure.name for figure in result.figures} == result.metrics.keys() - {"tokens", "json_invalid"}
    assert [judged.metric for judged in result.judged] == ["loss", "rouge", "label"]
    assert all(figure.value == result.metrics[figure.name] for figure in result.figures)


def test_references_stand_in_for_the_answer(tokenizer, renderer) -> None:
    pytest.importorskip("sacrebleu")
    model = tiny_model("llama")
    dataset = dataset_of(renderer, some_rows()[:2])
    common = {"metrics": ("chrf",), "max_new_tokens": 5}
    plain = evaluate(model, tokenizer, dataset, renderer, **common)
    given = [[answer.got or "x", "another"] for answer in plain.answers]
    told = evaluate(model, tokenizer, dataset, renderer, **common, extras=Extras(references=given))
    assert told.metrics["chrf"] == pytest.approx(100)
    assert plain.metrics["chrf"] < 50


def test_plain_text_is_left_out_of_labels(tokenizer, renderer) -> None:
    model = tiny_model("llama")
    rows = [{"prompt": str(number), "completion": "yes" if number % 2 else "no"} for number in range(4)]
    mixed = dataset_of(renderer, [{"text": "some words"}, *rows])
    result = evaluate(model, tokenizer, mixed, renderer, metrics=("label",), max_new_tokens=2)
    assert len(result.judged[0].scores) == 4
    assert result.judged[0].rows == [1, 2, 3, 4]
    assert result.notes[0] == "label accuracy leaves out 1 rows of plain text, which expect no label"
    with pytest.raises(DataError, match="label accuracy needs rows that expect a label"):
        evaluate(model, tokenizer, Dataset(mixed.examples[:1], {}), renderer, metrics=("label",), max_new_tokens=2)
    with pytest.raises(DataError, match="multiple choice needs rows with choices"):
        evaluate(model, tokenizer, mixed, renderer, metrics=("choice",), max_new_tokens=2)


def test_nan_is_noticed_though_only_answers_are_asked_for(tokenizer, renderer) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericError, match="logits must be finite; the log-likelihood of row 0 is nan"):
        evaluate(model, tokenizer, dataset_of(renderer, some_rows()), renderer, metrics=("exact",), max_new_tokens=2)
