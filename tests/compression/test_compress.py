"""Whole compressions of a tiny model: budgets kept, folders that open, choices by measured loss, clear refusals."""

from __future__ import annotations

import errno
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_tiny

from luthier.compression import contest, measure, runner
from luthier.compression import heal as healing
from luthier.compression.heal import Teacher, heal
from luthier.compression.measure import Windows, cost_of, loss_difference, measure_windows, quality_of
from luthier.compression.report import Candidate, Report
from luthier.compression.runner import compress
from luthier.compression.settings import Budget, CompressSettings
from luthier.compression.tasks import measure_task
from luthier.compression.texts import read_texts
from luthier.data import Renderer
from luthier.errors import ConfigError, DataError, PreflightError
from luthier.evaluation.evaluate import evaluate
from luthier.evaluation.sets import NamedFile, load_set
from luthier.linear import count_numbers
from luthier.models.compressed_folder import stored_bytes
from luthier.models.load import load

LINES = [
    f"Book a table for {i} at noon, please. The quick brown fox {i * i} jumps over the lazy dog {i % 7}." for i in range(400)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"), "llama", tied=True, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(LINES))
    return str(path)


def settings(model: Path, out: Path, text: str | None, budget: str = "60%", **more) -> CompressSettings:
    small = {"windows": 8, "window": 32, "eval_windows": 4, "footprints": False}
    return CompressSettings(str(model), Budget.parse(budget), out, data=text, **{**small, **more})


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("budget", "bits"), [("60%", "auto"), ("45%", "4"), ("75%", "16")])
def test_the_result_fits_the_budget_opens_and_is_the_best_that_was_measured(
    model: Path, text: str, tmp_path: Path, budget: str, bits: str
) -> None:
    report = compress(settings(model, tmp_path / "out", text, budget, bits=bits))
    assert weights_bytes(tmp_path / "out") == report.result.size_bytes <= report.budget_bytes
    assert report.budget_bytes == Budget.parse(budget).bytes_of(94528)
    allowed = [one for one in report.candidates[1:] if one.size_bytes <= report.budget_bytes]
    allowed = [one for one in allowed if bits != "16" or one.name != "plain nf4"]
    assert report.result.validation_loss == min(one.validation_loss for one in allowed)
    assert {one.name for one in report.candidates} >= {"original", "allocated", "plain nf4"}
    loaded = load(str(tmp_path / "out"))
    with torch.no_grad():
        assert loaded.model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    kinds = {spec.kind or spec.factors for spec in report.layers.values()}
    assert kinds <= {"16": {"bf16"}, "4": {"nf4", "q4_0"}, "auto": {"nf4", "q4_0", "q8_0", "bf16"}}[bits]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_report_says_what_was_measured(model: Path, text: str, tmp_path: Path) -> None:
    report = compress(settings(model, tmp_path / "out", text))
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    for one in content["candidates"]:
        quality = one["quality"]
        low, high = quality["perplexity_interval"]
        assert low <= quality["perplexity"] <= high
        assert one["cost"]["decode_tokens_per_second"] > 0
    original = content["candidates"][0]["quality"]
    assert original["rise"] == 0
    assert original["agreement"] == 1
    plain, result = (report.named(name).windows for name in ("plain nf4", report.chosen))
    if report.chosen != "plain nf4":
        beside = next(one for one in content["candidates"] if one["name"] == report.chosen)["loss_beside_plain_nf4"]
        assert beside["difference"] == pytest.approx(result.mean_loss - plain.mean_loss)
        assert tuple(beside["interval"]) == loss_difference(result, plain)[1]
    assert content["measured_on"] == "a part of text.txt that was kept out of calibration"
    assert content["measured_on"] in (tmp_path / "out" / "report.html").read_text()
    assert content["size_bytes"] == weights_bytes(tmp_path / "out")
    assert content["layers"].keys() == report.layers.keys()
    page = (tmp_path / "out" / "report.html").read_text()
    assert report.sentence().split(":")[0] in page
    assert all(name in page for name in report.layers)


def test_the_same_seed_gives_the_same_bytes(model: Path, text: str, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        compress(settings(model, tmp_path / name, text, "50%", bits="4", heal=2))
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")})
    assert files[0] == files[1]


@pytest.mark.parametrize("helps", [True, False])
def test_healing_is_kept_where_it_makes_the_best_and_stays_within_the_budget(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helps: bool
) -> None:
    def train(compressed, teacher: Teacher, steps: int, **options) -> list[float]:
        assert len(teacher.packs) == len(teacher.hidden) == 30  # more text than the eight windows of calibration
        compressed.was_healed = True
        return heal(compressed, teacher, 2, **options)

    def loss(measured, texts) -> float:
        """As measured, and a nat less or more of what was healed: training a model of random weights does next to nothing."""
        return mean(measured, texts) + (0 if not hasattr(measured, "was_healed") else -1 if helps else 1)

    mean = contest.mean_loss
    monkeypatch.setattr(contest, "heal", train)
    monkeypatch.setattr(contest, "mean_loss", loss)
    report = compress(settings(model, tmp_path / "out", text, "50%", bits="4", heal=30))
    assert weights_bytes(tmp_path / "out") == report.result.size_bytes <= report.budget_bytes
    allowed = [one for one in report.candidates[1:] if one.size_bytes <= report.budget_bytes]
    assert report.result.validation_loss == min(one.validation_loss for one in allowed)
    assert report.result.healed is helps
    healed = [one for one in report.candidates if one.healed]
    assert healed == ([report.result] if helps else [])
    if helps:  # beside what it was made of, which is as it was measured before
        before = report.named(report.chosen.removesuffix(", healed"))
        assert before is not None
        assert before.validation_loss > report.result.validation_loss
        assert before.windows is not report.result.windows
        page = (tmp_path / "out" / "report.html").read_text()
        assert f"the result: {report.chosen}" in page
        assert page.count("healed, healed") == 0
    assert any("healing was dropped" in note for note in report.notes) is not helps
    assert load(str(tmp_path / "out")).model.config.model_type == "llama"


def test_a_step_of_healing_that_is_not_finite_loses_nothing_that_was_measured(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, float("nan")])
    monkeypatch.setattr(healing, "_backward", lambda *_arguments: next(losses))
    report = compress(settings(model, tmp_path / "out", text, "50%", bits="4", heal=30))
    assert not any(one.healed for one in report.candidates)
    assert report.result.validation_loss == min(one.validation_loss for one in report.candidates[1:])
    failed = [note for note in report.notes if "failed, and the best plan without it was kept" in note]
    assert len(failed) == 1
    assert "the loss of step 2 is nan" in failed[0]
    assert load(str(tmp_path / "out")).model.config.model_type == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_head_that_healing_does_not_know_is_refused_before_anything_is_measured(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_arguments) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(healing, "head_of", lambda _model: None)
    monkeypatch.setattr(runner, "measure_windows", never)
    with pytest.raises(ConfigError, match="healing needs a head that is known; LlamaForCausalLM has another"):
        compress(settings(model, tmp_path / "out", text, heal=2))
    assert not list(tmp_path.iterdir())


def test_without_data_the_model_writes_its_own_text_and_that_is_said(model: Path, tmp_path: Path) -> None:
    report = compress(settings(model, tmp_path / "out", None, windows=12))
    assert report.origin == "text that the model wrote itself"
    assert any(note.startswith("No --data") for note in report.notes)


def test_calibration_and_evaluation_never_overlap(model: Path, text: str) -> None:
    loaded = load(str(model))
    for evaluation in (None, text):
        texts = read_texts(settings(model, Path("nowhere"), text, eval_data=evaluation), loaded.model, loaded.tokenizer)
        windows = [
            {tuple(pack.ids.tolist()) for pack in packs}
            for packs in (texts.calibration, texts.validation, texts.evaluation, texts.healing)
        ]
        assert all(windows)
        for one, other in itertools.combinations(windows, 2):
            assert not one & other
    assert any("hold text that is in text.txt too" in note for note in texts.notes)


def test_rows_that_are_measured_on_are_left_out_of_calibration(model: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Row {number}: {line}"}) for number, line in enumerate(LINES[:60])]
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.jsonl").write_text("\n".join(rows[::7]))
    loaded = load(str(model))
    wanted = settings(model, tmp_path / "out", str(tmp_path / "all.jsonl"), eval_data=str(tmp_path / "held.jsonl"))
    texts = read_texts(wanted, loaded.model, loaded.tokenizer)
    assert "4 of 60 rows of all.jsonl hold text that is in held.jsonl too and were left out of calibration." in texts.notes
    used = {tuple(pack.ids.tolist()) for pack in (*texts.calibration, *texts.validation)}
    assert used
    assert not used & {tuple(pack.ids.tolist()) for pack in texts.evaluation}


def test_a_budget_that_cannot_be_met_is_refused_and_leaves_nothing(model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="the budget must hold the smallest form of every layer"):
        compress(settings(model, tmp_path / "out", text, "10%"))
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(settings(model, tmp_path / "out", text))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_from_what_cannot_be_read(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments) -> None:
        name = tmp_path / "model.json" if reads else arguments[2] / "compressed.safetensors"
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(runner, "_run", refuse)
    reads = False
    with pytest.raises(PreflightError, match="out could not be written: Permission denied"):
        compress(settings(model, tmp_path / "out", text))
    reads = True
    with pytest.raises(PermissionError, match=r"model\.json"):
        compress(settings(model, tmp_path / "out", text))
    assert not list(tmp_path.iterdir())


def test_texts_that_are_too_short_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(DataError, match="needs at least 4 windows"):
        compress(settings(model, tmp_path / "out", str(tmp_path / "short.txt")))
    with pytest.raises(DataError, match=r"--data must be a text file that can be read; .* is not there"):
        compress(settings(model, tmp_path / "out", str(tmp_path / "none.txt")))


def test_settings_are_checked_before_anything_is_looked_for(model: Path, tmp_path: Path) -> None:
    one = settings(model, tmp_path / "out", None)
    with pytest.raises(ConfigError, match=r"--bits is one of auto, 16, 4; got '8'"):
        replace(one, bits="8")
    with pytest.raises(ConfigError, match="--heal is a number of steps"):
        replace(one, heal=-1)
    with pytest.raises(ConfigError, match="goes to a new folder"):
        replace(one, out=tmp_path)


@pytest.mark.parametrize("text", ["", "60", "0%", "101%", "-5%", "sixty", "nan%", "0MB", "%"])
def test_budgets_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        Budget.parse(text)


def test_budgets_are_shares_of_16_bits_or_bytes() -> None:
    assert Budget.parse("60%").bytes_of(1000) == 1200
    assert Budget.parse(" 12.5 % ").bytes_of(1000) == 250
    assert Budget.parse("80MB").bytes_of(1) == Budget.parse("80 MB").bytes_of(10**9)


NOISE = np.random.default_rng(0).normal(size=24)


def sentence(plain_loss: float, own_loss: float, name: str = "allocated", plain_bytes: int = 410, noise: float = 0.1) -> str:
    """Losses of 24 windows of 10 tokens; noise: how far those of plain NF4 lie from the result's, window by window."""

    def candidate(name: str, loss: float, size_bytes: int, noise: float = 0.0) -> Candidate:
        tokens = np.full(24, 10.0)
        windows = Windows(tokens * (loss + noise * (NOISE - NOISE.mean())), tokens, [torch.zeros(10)] * 24, tokens / 2)
        return Candidate(name, loss, loss, 0, size_bytes, quality=quality_of(windows, windows), windows=windows)

    found = [candidate("original", 1.0, 1000), candidate("allocated", own_loss, 400)]
    found.append(candidate("plain nf4", plain_loss, plain_bytes, noise))
    return Report("m", "50%", 500, "auto", "luthier", found, name, [], {}, {}, "", 1, 0).sentence()


def test_where_plain_4_bit_is_better_the_sentence_says_so() -> None:
    assert sentence(plain_loss=2.0, own_loss=1.5).startswith("Ship this result")
    assert sentence(plain_loss=1.4, own_loss=1.5).startswith("Ship plain 4-bit (NF4) instead")
    assert sentence(plain_loss=1.4, own_loss=1.5, name="plain nf4").startswith("Ship plain 4-bit (NF4): ")
    assert sentence(plain_loss=1.6, own_loss=1.5, plain_bytes=600).endswith("plain 4-bit (NF4) does not fit the budget.")


def test_where_the_windows_show_no_difference_the_sentence_says_so() -> None:
    for plain in (1.49, 1.51):
        unsure = sentence(plain_loss=plain, own_loss=1.5)
        assert unsure.startswith("Ship this result, the smaller of two between which 24 windows show no difference: ")
    assert sentence(plain_loss=1.51, own_loss=1.5, plain_bytes=399).startswith("Ship plain 4-bit (NF4), the smaller of two")
    # The same distance, the same in every window, is a difference.
    assert sentence(plain_loss=1.51, own_loss=1.5, noise=0.0).startswith("Ship this result: ")
    assert sentence(plain_loss=1.49, own_loss=1.5, noise=0.0).startswith("Ship plain 4-bit (NF4) instead")


def test_rows_with_answers_give_task_figures_with_paired_intervals(model: Path, text: str, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": line, "completion": ("yes", "no")[place % 2]}) for place, line in enumerate(LINES[:24])]
    (tmp_path / "task.jsonl").write_text("\n".join(rows))
    held = str(tmp_path / "task.jsonl")
    report = compress(settings(model, tmp_path / "out", text, "45%", bits="4", eval_data=held, window=128, footprints=True))
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    named = {one["name"]: one for one in content["candidates"]}
    for name, one in named.items():
        figures = one["task"]["figures"]
        assert one["task"]["rows"] == 24
        assert figures.keys() == {"loss", "perplexity", "label_accuracy"}
        for figure in figures.values():
            assert figure["interval"][0] <= figure["value"] <= figure["interval"][1]
        assert ("beside_original" in figures["loss"]) == (name != "original")
        assert ("beside_plain_nf4" in figures["loss"]) == (name != "plain nf4")
    difference = named["allocated"]["task"]["figures"]["loss"]["beside_plain_nf4"]
    apart = report.named("allocated").task.metrics["loss"] - report.named("plain nf4").task.metrics["loss"]
    assert difference["difference"] == pytest.approx(apart)
    assert difference["interval"][0] <= apart <= difference["interval"][1]
    assert " On 24 rows of the task this result's label accuracy is " in content["sentence"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "label accuracy beside plain NF4" in page
    for name in ("original", "plain nf4", content["chosen"]):
        memory = named[name]["memory"]
        assert memory["peak_bytes"] > memory["before_bytes"] > 10**7
    assert "before loading" in page


def test_rows_with_choices_are_scored_by_likelihood_as_an_evaluation_scores_them(
    model: Path, text: str, tmp_path: Path
) -> None:
    options = {"choices": ["yes", "not at all"]}
    rows = [json.dumps({"prompt": line, **options, "answer": place % 2}) for place, line in enumerate(LINES[:24])]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(rows))
    report = compress(settings(model, tmp_path / "out", text, "45%", bits="4", eval_data=str(path), window=128))
    loaded = load(str(tmp_path / "out"))
    renderer = Renderer(loaded.tokenizer, max_length=128)
    one = load_set(NamedFile("task", str(path)), renderer, on_long="error")
    asked = evaluate(
        loaded.model, loaded.tokenizer, one.dataset, renderer, metrics=("loss", "choice"), max_new_tokens=1, extras=one.extras
    )
    assert report.result.task is not None
    assert report.result.task.metrics == pytest.approx(asked.metrics)
    assert " On 24 rows of the task this result's choice accuracy is " in report.sentence()


def test_an_answer_is_the_likelier_label_for_the_model_that_is_written(model: Path, text: str, tmp_path: Path) -> None:
    """The figures of the result are those of the folder when it is opened again."""
    rows = [json.dumps({"prompt": line, "completion": ("yes", "no")[place % 2]}) for place, line in enumerate(LINES[:24])]
    (tmp_path / "task.jsonl").write_text("\n".join(rows))
    wanted = settings(model, tmp_path / "out", text, "45%", bits="4", eval_data=str(tmp_path / "task.jsonl"), window=128)
    report = compress(wanted)
    loaded = load(str(tmp_path / "out"))
    task = read_texts(wanted_again(wanted, tmp_path), None, loaded.tokenizer).task
    assert task is not None
    again = measure_task(loaded.model, loaded.tokenizer, task)
    assert again.metrics == pytest.approx(report.result.task.metrics)


def wanted_again(one: CompressSettings, tmp_path: Path) -> CompressSettings:
    return replace(one, out=tmp_path / "elsewhere")


def test_the_next_token_is_right_where_it_is_the_likeliest(model: Path, text: str) -> None:
    loaded = load(str(model))
    texts = read_texts(settings(model, Path("nowhere"), text), None, loaded.tokenizer)
    found = measure_windows(loaded.model, texts.evaluation)
    for pack, right in zip(texts.evaluation, found.right, strict=True):
        with torch.no_grad():
            likeliest = loaded.model(pack.ids[None]).logits[0, :-1].argmax(1)
        assert right == float((likeliest == pack.ids[1:]).sum())
    assert quality_of(found, found).accuracy == found.right.sum() / found.tokens.sum()


def test_of_an_embedding_that_is_not_the_heads_too_one_row_is_read_a_token(tmp_path: Path) -> None:
    tied, own = (
        load(str(write_tiny(tmp_path / name, "llama", tied=name == "tied", dtype=torch.bfloat16))).model
        for name in ("tied", "own")
    )
    embedding = tied.get_input_embeddings().matrix
    row = 2 * embedding.shape[1] * measure.JOULES_A_BYTE
    assert measure.joules_of_a_token(own) == pytest.approx(measure.joules_of_a_token(tied) + row, rel=1e-9)
    numbers = count_numbers(tied)
    expected = stored_bytes(tied) * measure.JOULES_A_BYTE + numbers * measure.JOULES_A_MULTIPLY_ADD
    assert measure.joules_of_a_token(tied) == pytest.approx(expected)


def test_a_first_token_that_is_held_up_makes_decoding_no_faster(
    model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of (prompt, first token, all tokens) in seconds: 32 tokens take 3 - 1 at best, however rounds fell."""
    seconds = iter([8.0, 2.5, 3.0, 4.0, 1.0, 3.5, 9.0, 1.5, 9.0])
    monkeypatch.setattr(measure, "_seconds", lambda work: (work(), next(seconds))[1])
    cost = cost_of(load(str(model)).model, torch.arange(3, 40))
    assert cost.decode_tokens_per_second == 32 / 2
    assert cost.prompt_tokens_per_second == pytest.approx((512 - 33) / 4)
