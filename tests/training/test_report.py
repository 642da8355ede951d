"""report.html: complete for a whole run, honest about one that is not, and harmless whatever the run holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from luthier.config import RunConfig
from luthier.training.charts import Series, line_chart, nice_ticks, thinned
from luthier.training.report import render_report, write_report
from luthier.training.run_files import read_run_files

HOSTILE = (
    "</script></style><script>alert(1)</script>'\"><img src=http://evil.example/x onerror=alert(1)> {{ 7*7 }} \x1b[2J\u202e"
)
VOID = {"meta", "br", "img", "input", "link", "hr"}


def write_run(folder: Path, *, steps: int = 40, text: str = "Turn it into JSON.", finished: bool = True) -> Path:
    """A run directory with every file a run leaves; `text` stands in every place that strangers fill."""
    folder.mkdir(parents=True)
    config = RunConfig(data=f"{text}.jsonl", eval_data="valid.jsonl", model=text, rank=8, learning_rate=1.36e-3)
    files: dict[str, Any] = {
        "config.resolved.yaml": config.model_dump(mode="json"),
        "env.json": {
            "luthier": "0.1.0",
            "packages": {"torch": "2.13.0", "peft": None},
            "memory_bytes": 8_300_000_000,
            "processor": text,
        },
        "data_manifest.json": {"train": manifest(text, 1000), "eval": manifest(text, 200)},
        "samples.json": [{"prompt": text, "expected": '{"a": 1}', "before": text, "after": '{"a": 1} '}],
    }
    if finished:
        files["result.json"] = {
            "run_dir": "runs/one", "adapter_dir": "runs/one/adapter", "steps": steps, "tokens": 117_320,
            "tokens_per_second": 851.2, "seconds": 171.3, "loss_first": 2.31, "loss_last": 0.17,
            "peak_rss_bytes": 1_190_000_000, "trainable_parameters": 4_884_480, "total_parameters": 139_399_488,
            "eval": {"before": metrics(2.504, 0.0), "after": metrics(0.1944, 0.855)},
        }  # fmt: skip
    for name, content in files.items():
        # JSON is YAML too.
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    records = [step_record(step) for step in range(1, steps + 1)]
    records += [
        {"kind": "eval", "step": step, "rows": 200, "seconds": 4.2, **metrics(2.5 / (step + 1), step / 50)}
        for step in (0, 20, 40)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def metrics(loss: float, exact: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": 2.718281828**loss, "tokens": 4400, "exact_match": exact}


def manifest(text: str, rows: int) -> dict[str, Any]:
    return {
        "path": text, "sha256": "9f2c" * 16, "form": "messages", "rows": rows, "kept": rows, "dropped": 0, "truncated": 0,
        "tokens": rows * 58, "supervised_tokens": rows * 22, "longest": 118, "notes": [text],
    }  # fmt: skip


def step_record(step: int) -> dict[str, Any]:
    return {
        "kind": "step", "step": step, "epoch": step / 40, "loss": 2.0 / step, "loss_smooth": 2.1 / step, "learning_rate": 1e-3,
        "grad_norm": None if step == 7 else 1.5, "tokens": 400, "supervised_tokens": 160, "seconds": 0.5,
        "tokens_per_second": 800.0, "rss_bytes": 1_000_000_000, "skipped": 0,
    }  # fmt: skip


class Page(HTMLParser):
    """Parses a page strictly enough to notice a tag that is not closed, and keeps its tags and its text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path) -> Page:
    return Page(render_report(read_run_files(folder), folder))


def test_whole_run_shows_every_figure(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run-one"))
    for wanted in (
        "run-one",
        "A rank 8 LoRA adapter",
        "40 steps.",
        "2.5040 → 0.1944",
        "0 % → 85.5 %",
        "2 min 51 s",
        "851 117,320 tokens",
        "1.19 GB",
        "4,884,480 3.5 % of all",
        "Loss a supervised token",
        "Learning rate",
        "Gradient norm before clipping",
        "Tokens a second",
        "Memory",
        "Exact match on held-out rows",
        "37.9 % of the tokens carry loss",
        "luthier chat runs/one",
        "luthier eval runs/one --data test.jsonl --vs-base",
        'PeftModel.from_pretrained(model, "runs/one/adapter")',
        "packages · torch 2.13.0",
        "packages · peft none",
        "memory 8.30 GB",
    ):
        assert wanted in page.text, wanted
    assert "not finished" not in page.text
    changed = [text for tag, text in page.tags if tag == "div" and text.get("class") == "changed"]
    assert len(changed) == 5  # data, eval_data, model, rank, learning_rate
    marks = [attributes["class"] for tag, attributes in page.tags if tag == "span" and "mark " in str(attributes.get("class"))]
    assert marks == ["mark differs", "mark exact"]


def test_curves_carry_their_numbers(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    figures = [json.loads(str(attributes["data-curves"])) for tag, attributes in page.tags if tag == "figure"]
    loss = {one["label"]: one["rows"] for one in figures[0]["series"]}
    assert [len(rows) for rows in loss.values()] == [40, 40, 3]
    assert loss["training"][0] == [1, 2.5, 66.67, "2.0000"]
    assert loss["held out"][0][0] == 0
    gradient = figures[2]["series"][0]["rows"]
    assert len(gradient) == 39
    assert all(row[0] != 7 for row in gradient)
    labels = [str(attributes.get("aria-label")) for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert "Loss a supervised token. training: 2.0000 at step 1, 0.0500 at step 40" in labels[0]


def test_nothing_is_loaded_and_only_our_script_may_run(tmp_path: Path) -> None:
    text = render_report(read_run_files(folder := write_run(tmp_path / "run")), folder)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    policy = next(str(attributes["content"]) for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert f"'sha256-{base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()}'" in policy


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", text=HOSTILE)
    text = render_report(read_run_files(folder), folder)
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    assert not any(tag == "img" or any(name.startswith("on") for name in attributes) for tag, attributes in page.tags)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_hostile_name_of_the_directory_and_of_keys(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>")
    (folder / "env.json").write_text(json.dumps({"<b>key</b>": {"<i>": "<u>"}}))
    page = page_of(folder)
    assert not {"img", "b", "u"} & {tag for tag, _ in page.tags}
    assert "<b>key</b> · <i> <u>" in page.text


def test_lone_surrogates_and_huge_values_are_survived(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "samples.json").write_text('[{"prompt": "\\ud800", "expected": "x", "before": null, "after": 3}]')
    (folder / "env.json").write_text(json.dumps({"long": "x" * 100_000, "big": 10**400, "list": [1, {"a": 2}]}))
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "step": 41, "loss": NaN, "grad_norm": Infinity, "rss_bytes": "many"}\n')
    text = render_report(read_run_files(folder), folder)
    text.encode("utf-8")
    assert len(text) < 150_000
    assert "\\ud800" in Page(text).text


def test_empty_directory_says_what_is_missing(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "The configuration of this run was not found." in page.text
    assert "This run has not finished." in page.text
    assert "No step has been recorded." in page.text


@pytest.mark.parametrize(
    "missing", ["config.resolved.yaml", "env.json", "data_manifest.json", "samples.json", "result.json", "metrics.jsonl"]
)
def test_any_one_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / missing).unlink()
    page = page_of(folder)
    assert "luthier chat runs/one" in page.text or missing == "result.json"


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null", "\x00", "[[" * 3000, "7"])
def test_any_file_may_be_damaged_and_it_is_said(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("config.resolved.yaml", "env.json", "data_manifest.json", "samples.json", "result.json"):
        (folder / name).write_text(content)
    files = read_run_files(folder)
    assert files.config == files.environment == files.manifests == files.result == {}
    assert files.samples == []
    Page(render_report(files, folder))
    if content not in ("", "null"):
        assert any(problem.startswith("env.json ") for problem in files.problems)


def test_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    page = page_of(folder)
    assert "This run has not finished. The last step recorded is 40." in page.text
    assert f"luthier resume {folder}" in page.text
    assert "luthier chat" not in page.text
    assert "1.00 GB" in page.text


def test_half_a_line_and_repeated_steps_of_a_resumed_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({**step_record(40), "loss": 9.0}) + "\n")
        stream.write('{"kind": "step", "st')
    files = read_run_files(folder)
    assert len(files.steps) == 40
    assert files.steps[-1]["loss"] == 9.0
    assert files.problems == ["metrics.jsonl has 1 unreadable line"]


def test_full_fine_tuning_offers_no_adapter(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    config = RunConfig(data="train.jsonl", method="full")
    (folder / "config.resolved.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    page = page_of(folder)
    assert "All weights for smollm2-135m" in page.text
    assert "PeftModel" not in page.text


@pytest.mark.parametrize("steps", [0, 1, 2, 5000])
def test_runs_of_every_length_have_a_page(tmp_path: Path, steps: int) -> None:
    folder = write_run(tmp_path / "run", steps=steps)
    text = render_report(read_run_files(folder), folder)
    Page(text)
    assert len(text) < 400_000


def test_written_with_plots_and_twice_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    names = ["grad_norm.png", "learning_rate.png", "loss.png", "memory.png", "speed.png"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == names
    first = {path.name: path.read_bytes() for path in [folder / "report.html", *(folder / "plots").iterdir()]}
    assert all(content.startswith(b"\x89PNG") for name, content in first.items() if name.endswith("png"))
    write_report(folder)
    assert {path.name: path.read_bytes() for path in [folder / "report.html", *(folder / "plots").iterdir()]} == first


def test_ticks_are_round_and_cover_the_values() -> None:
    assert nice_ticks(0.0, 2.7) == [0.0, 1.0, 2.0, 3.0]
    assert nice_ticks(1, 6, whole=True) == [0.0, 2.0, 4.0, 6.0]
    for low, high in ((0.19, 0.21), (-3.0, 5.0), (1e-9, 2e-9), (2.0, 2.0), (0.0, 0.0), (1e9, 1.2e9)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 8


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[7_321] = (7_321.0, 99.0)
    kept = thinned(points, 800)
    assert len(kept) <= 802
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (7_321.0, 99.0) in kept
    assert kept == sorted(kept)


def test_a_chart_without_points_is_none() -> None:
    assert line_chart("empty", [Series("nothing", [])], str) is None
