"""`luthier eval` on several sets, beside another model, with guards, labels and a page, on tiny models."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny

import luthier
from luthier.cli.main import run

LABELS = ["pay", "card", "lost card"]
ROWS = [{"prompt": f"say {n}", "completion": LABELS[n % 3], "references": [LABELS[n % 3], "x"]} for n in range(6)]
JSON_ROWS = [{"prompt": f"say {n}", "completion": json.dumps({"n": n})} for n in range(3)]
SCHEMA = {"type": "object", "properties": {"n": {"enum": [0, 1, 2]}}, "required": ["n"], "additionalProperties": False}
CHOICES = [{"prompt": f"which {n}?", "choices": ["red", "blue", "very green"], "answer": n % 3} for n in range(4)]
TEXT = [{"text": f"Some words about {n} and nothing else."} for n in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("labels", ROWS), ("json", JSON_ROWS), ("quiz", CHOICES), ("text", TEXT)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "names.txt").write_text("\n".join(LABELS))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return tmp_path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """An adapter that changes everything, and makes the loss of TEXT about 1.3 % worse."""
    model, *_ = luthier.load(str(tiny_llama))
    luthier.attach(model, luthier.AdapterSpec(rank=4), seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    luthier.save_adapter(model, folder / "adapter")
    return folder / "adapter"


def invoke(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = 0
    try:
        run([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def last_json(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


def test_several_sets_each_with_its_metrics(capsys, tiny_llama: Path, folder: Path) -> None:
    code, out, err = invoke(
        capsys, "eval", tiny_llama, "--data", f"intents={folder / 'labels.jsonl'}", "--data", folder / "quiz.jsonl",
        "--metrics", "loss,label,choice", "--labels", folder / "names.txt", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = last_json(out)
    assert list(found["sets"]) == ["intents", "quiz"]
    assert found["metrics"] == found["sets"]["intents"]["metrics"]
    assert found["metrics"].keys() == {"loss", "perplexity", "tokens", "label_accuracy"}
    assert found["sets"]["quiz"]["metrics"].keys() == {
        "loss", "perplexity", "tokens", "choice_accuracy", "choice_accuracy_per_token",
    }  # fmt: skip
    assert found["intervals"].keys() == {"loss", "perplexity", "label_accuracy"}
    low, high = found["intervals"]["loss"]
    assert low < found["metrics"]["loss"] < high
    assert sum(rows for _, _, rows in found["confusion"]) == round(6 * (1 - found["metrics"]["label_accuracy"]))


def test_answers_held_to_a_schema(capsys, tiny_llama: Path, folder: Path) -> None:
    """A random model writes no JSON by itself."""
    pytest.importorskip("llguidance")
    common = ["eval", tiny_llama, "--data", folder / "json.jsonl", "--metrics", "json", "--max-new-tokens", "60", "--json"]
    _, out, _ = invoke(capsys, *common)
    assert last_json(out)["metrics"]["json_valid"] == 0
    code, out, _ = invoke(capsys, *common, "--json-schema", folder / "schema.json")
    assert code == 0
    assert last_json(out)["metrics"]["json_valid"] == 1.0


def test_labels_without_a_file_are_the_rows_own(capsys, tiny_llama: Path, folder: Path) -> None:
    common = ["eval", tiny_llama, "--data", folder / "labels.jsonl", "--metrics", "label", "--json"]
    _, out, _ = invoke(capsys, *common, "--labels", folder / "names.txt")
    named = last_json(out)
    code, out, err = invoke(capsys, *common)
    assert code == 0, err
    assert last_json(out)["metrics"] == named["metrics"]
    assert "note: the labels are the 3 different answers of the rows; --labels FILE gives others." in err


def test_json_match_counts_what_is_not_json(capsys, tiny_llama: Path, folder: Path) -> None:
    code, out, err = invoke(
        capsys, "eval", tiny_llama, "--data", folder / "json.jsonl", "--metrics", "json", "--max-new-tokens", "4", "--json"
    )
    assert code == 0, err
    found = last_json(out)
    assert found["metrics"] == {
        "json_match": 0.0, "json_f1": 0.0, "json_precision": 0.0, "json_recall": 0.0, "json_valid": 0.0, "json_invalid": 3,
    }  # fmt: skip
    assert found["json_fields"] == {"n": {"expected": 3, "given": 0, "right": 0, "f1": 0.0}}
    assert "3 of 3 answers are not JSON, and match nothing" in err


def test_text_metrics_take_several_references(capsys, tiny_llama: Path, folder: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    code, out, err = invoke(
        capsys, "eval", tiny_llama, "--data", folder / "labels.jsonl", "--metrics", "bleu,chrf,rouge", "--max-new-tokens", "4",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    assert last_json(out)["intervals"].keys() == {"bleu", "chrf", "rouge1", "rouge2", "rougeL"}
    assert "references" not in err


def test_a_missing_library_is_said_before_anything_is_loaded(capsys, monkeypatch, folder: Path) -> None:
    import importlib

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    code, out, err = invoke(capsys, "eval", folder / "no-model", "--data", folder / "labels.jsonl", "--metrics", "bleu")
    assert (code, out) == (2, "")
    assert "Install them with: pip install 'luthier[metrics]'" in err


def test_two_models_are_compared_in_pairs(capsys, tmp_path: Path, tiny_llama: Path, folder: Path) -> None:
    other = write_tiny(tmp_path / "other", "qwen2")
    common = ["eval", tiny_llama, "--data", folder / "labels.jsonl", "--metrics", "loss", "--json"]
    _, out, _ = invoke(capsys, "eval", other, *common[2:])
    alone = last_json(out)["metrics"]
    code, out, err = invoke(capsys, *common, "--vs", other)
    assert code == 0, err
    found = last_json(out)
    assert found["vs"] == alone
    assert found["difference"]["loss"]["value"] == pytest.approx(found["metrics"]["loss"] - alone["loss"])
    low, high = found["difference"]["loss"]["interval"]
    assert low <= found["difference"]["loss"]["value"] <= high
    code, _, err = invoke(capsys, *common, "--vs", other, "--vs-base")
    assert code == 2
    assert "error: one comparison at a time; got --vs-base and --vs. Leave one out." in err


def test_a_guard_that_breaks_ends_with_its_own_code(capsys, tiny_llama: Path, folder: Path, adapter: Path) -> None:
    page = folder / "page.html"
    common = ["eval", tiny_llama, "--adapter", adapter, "--data", folder / "labels.jsonl", "--metrics", "loss"]
    code, out, err = invoke(
        capsys, *common, "--guard", f"words={folder / 'text.jsonl'}:0.5%", "--guard", f"quiz={folder / 'quiz.jsonl'}:loss=1000",
        "--html", page, "--json",
    )  # fmt: skip
    assert code == 6
    found = last_json(out)
    assert {"base", "tuned", "difference", "sets", "guards"} <= found.keys()
    assert list(found["sets"]) == ["labels", "words", "quiz"]
    assert (found["guards"]["words"]["kept"], found["guards"]["quiz"]["kept"]) == (False, True)
    assert not found["guards_kept"]
    assert "error: tuning must not make a guarded set worse than its bound allows; a guard did not hold:" in err
    assert f"\n  - {found['guards']['words']['sentence']}\n" in err
    assert "quiz: " not in err.partition("error:")[2]
    assert found["guards"]["words"]["sentence"] in page.read_text().replace("&gt;", ">").replace("&#39;", "'")
    code, out, err = invoke(capsys, *common, "--guard", f"{folder / 'text.jsonl'}:1000")
    assert code == 0, err
    assert "guard text: loss " in out
    assert "kept" in out


def test_a_page_is_written_and_named(capsys, tiny_llama: Path, folder: Path) -> None:
    page = folder / "out.html"
    common = ["eval", tiny_llama, "--data", folder / "labels.jsonl", "--max-new-tokens", "3"]
    code, out, err = invoke(capsys, *common, "--html", page)
    assert code == 0, err
    assert f"page: {page}" in out
    assert "Worst cases by exact match" in page.read_text()
    for bad in (folder, folder / "missing" / "out.html"):
        code, _, err = invoke(capsys, *common, "--html", bad)
        assert code == 2
        assert f"--html needs a file in a folder that exists; got {bad}. Make its folder first." in err
    code, _, err = invoke(capsys, *common, "--html", folder / ("x" * 300))
    assert code == 2
    assert "error: --html needs a file that can be written; " in err


def test_names_that_lead_nowhere_cost_no_time(capsys, monkeypatch, tiny_llama: Path, folder: Path, adapter: Path) -> None:
    """They are said before a model is loaded, and before hours of measuring."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("luthier.training.load_run.load", never)
    rows = folder / "labels.jsonl"
    for arguments, code, message in (
        (("--data", folder / "typo.jsonl"), 4, f"there is no file {folder / 'typo.jsonl'}."),
        (("--data", rows, "--guard", f"{folder / 'typo.jsonl'}:2%"), 4, f"there is no file {folder / 'typo.jsonl'}."),
        (("--data", rows, "--vs", folder / "typo"), 2, f"no model is called '{folder / 'typo'}'."),
        (("--data", rows, "--vs", adapter), 2, f"an adapter needs its base below it; {adapter} is an adapter folder."),
    ):
        got, _, err = invoke(capsys, "eval", tiny_llama, "--adapter", adapter, *arguments)
        assert got == code
        assert message in err
    for command in (("eval", adapter, "--data", rows), ("chat", adapter, "--prompt", "x")):
        got, _, err = invoke(capsys, *command)
        assert got == 2
        assert f"Give MODEL --adapter {adapter}." in err


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("json", {"prompt": "x", "completion": "{not json"}, "1 of 1 are not:"),
        ("label", {"prompt": "x", "completion": "blue"}, "labels taken from the rows must be 2 to 1000 answers"),
        ("exact", {"text": "words and no answer"}, "exact match needs rows with an answer; all rows are plain text"),
        ("label", {"text": "words and no answer"}, "label accuracy needs rows that expect a label"),
        ("exact", {"prompt": "word " * 600, "completion": "x"}, "rows must fit the model's 512 positions"),
    ],
)
def test_a_row_of_one_set_does_not_cost_the_measuring_of_another(
    capsys, monkeypatch, tiny_llama: Path, folder: Path, metric: str, row: dict[str, str], message: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("luthier.cli.compare.evaluate", never)
    (folder / "bad.jsonl").write_text(json.dumps(row) + "\n")
    code, _, err = invoke(
        capsys, "eval", tiny_llama, "--data", folder / ("json.jsonl" if metric == "json" else "labels.jsonl"), "--data",
        folder / "bad.jsonl", "--metrics", metric, "--max-length", "4000",
    )  # fmt: skip
    assert code == 4
    assert message in err


def test_a_page_that_cannot_be_written_takes_no_figures_along(capsys, monkeypatch, tiny_llama: Path, folder: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("luthier.disk.write_atomically", full)
    page = folder / "out.html"
    common = ["eval", tiny_llama, "--data", folder / "labels.jsonl", "--metrics", "loss", "--html", page]
    for more in ([], ["--json"]):
        code, out, err = invoke(capsys, *common, *more)
        assert code == 3
        assert f"error: the page must be written to --html; {page}: No space left on device." in err
        assert "loss" in out
        assert "page:" not in out
    assert last_json(out)["metrics"].keys() >= {"loss"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "an evaluation needs rows; give --data FILE, or --guard FILE."),
        (["--data", "a=labels.jsonl", "--data", "a=quiz.jsonl"], 2, "labels.jsonl and quiz.jsonl are both called 'a'."),
        (["--data", "labels.jsonl", "--labels", "missing"], 2, "--labels needs a file that can be read; missing: No such file"),
        (["--data", "labels.jsonl", "--labels", "names.txt"], 2, "Add --metrics label."),
        (["--data", "labels.jsonl", "--json-schema", "missing"], 2, "--json-schema needs a file that can be read; missing: No"),
        (
            ["--data", "labels.jsonl", "--json-schema", "names.txt"],
            2,
            "--json-schema needs a JSON Schema; names.txt holds none",
        ),
        (["--data", "labels.jsonl", "--json-schema", "schema.json", "--metrics", "loss"], 2, "Add one of exact, json, bleu"),
        (["--data", "labels.jsonl", "--guard", "text.jsonl"], 2, "--guard compares a tuned model with its base;"),
        (["--data", "json.jsonl", "--metrics", "label", "--labels", "names.txt"], 4, "expects '{\"n\": 0}'"),
        (["--data", "labels.jsonl", "--metrics", "json"], 4, "JSON match needs rows whose expected answer is JSON; 6 of 6"),
        (["--data", "labels.jsonl", "--metrics", "choice"], 2, "labels has no rows with choices"),
        (["--data", "text.jsonl", "--metrics", "label"], 4, "label accuracy needs rows that expect a label"),
        (["--data", "empty.jsonl"], 4, "the file is empty"),
        (["--data", "bad.jsonl"], 4, "bad.jsonl:1: references must be a list of 1 to 100 texts"),
    ],
)
def test_what_is_wrong_is_said_once(capsys, monkeypatch, tiny_llama: Path, folder: Path, arguments, code, message) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.jsonl").write_text(json.dumps({**ROWS[0], "references": "x"}) + "\n")
    got, out, err = invoke(capsys, "eval", tiny_llama, *arguments, "--max-new-tokens", "2")
    assert (got, out) == (code, "")
    assert message in err
    assert err.count("error:") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("metrics", ["loss", "exact", "label"])
def test_weights_that_give_nan_are_a_numeric_error(capsys, tmp_path: Path, folder: Path, metrics: str) -> None:
    from tiny import tiny_model, tiny_tokenizer

    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
        model.model.layers[0].mlp.up_proj.weight.fill_(1e38)
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    code, out, err = invoke(capsys, "eval", tmp_path / "broken", "--data", folder / "labels.jsonl", "--metrics", metrics)
    assert (code, out) == (5, "")
    assert "must be finite" in err


def test_rows_are_rendered_once(capsys, tiny_llama: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    arguments = [
        "eval",
        tiny_llama,
        "--data",
        folder / "labels.jsonl",
        "--metrics",
        "loss,bleu",
        "--max-new-tokens",
        2,
        "--json",
    ]
    code, plain, err = invoke(capsys, *arguments, "--no-data-cache")
    assert code == 0, err
    assert list(tmp_path.glob("cache/rows/*")) == []
    code, first, err = invoke(capsys, *arguments)
    assert code == 0, err
    monkeypatch.setattr("luthier.data.load.render_source", lambda *_: pytest.fail("rendered again"))
    code, second, err = invoke(capsys, *arguments)
    assert code == 0, err
    assert last_json(first)["metrics"] == last_json(second)["metrics"] == last_json(plain)["metrics"]
    (kept,) = tmp_path.glob("cache/rows/*")
    kept.write_bytes(b"damaged")
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    code, again, err = invoke(capsys, *arguments)
    assert (code, last_json(again)["metrics"]) == (0, last_json(first)["metrics"])
    assert "note: rows kept in the cache were damaged" in err


def test_rows_that_the_run_was_trained_on_are_counted(capsys, tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    rows = [json.dumps({"prompt": f"say {n}", "completion": str(n)}) for n in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.jsonl").write_text("\n".join([*rows[2:4], *(row.replace("say", "tell") for row in rows)]))
    flags = ["--model", tiny_llama, "--steps", 2, "--batch-size", 2, "--rank", 2, "--out", tmp_path / "run"]
    code, _, err = invoke(capsys, "train", tmp_path / "train.jsonl", *flags)
    assert code == 0, err
    arguments = ["eval", tmp_path / "run", "--data", tmp_path / "held.jsonl", "--metrics", "loss"]
    code, _, err = invoke(capsys, *arguments)
    assert code == 0, err
    assert "2 of 8 rows of held are also in the training data" in err
    assert "1 of 1 rows of held" in invoke(capsys, *arguments, "--rows", 1)[2]
    (tmp_path / "train.jsonl").unlink()
    assert "are also in the training data" not in invoke(capsys, *arguments)[2]
