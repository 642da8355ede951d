"""report.html: what a run did, in one self-contained file that opens anywhere and loads nothing.

Everything a run directory holds may come from strangers; `luthier.pages.page` renders it so that it stays text.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from luthier.config import RunConfig
from luthier.disk import write_atomically
from luthier.pages.page import Fact, Tile, render_page
from luthier.training.charts import Chart, Series, line_chart
from luthier.training.events import NOT_METRICS
from luthier.training.plots import write_plots
from luthier.training.run_files import RunFiles, finite, read_run_files
from luthier.units import count_text, duration_text, metric_text, number_text, percent_text, size_text, visible

ASSETS = Path(__file__).with_name("assets")
METRIC_NAMES = {"loss": "held-out loss", "perplexity": "held-out perplexity", "exact_match": "exact match"}
LONGEST_VALUE = 2_000


def write_report(run_dir: Path | str) -> Path:
    """Write report.html and plots/*.png from the files of `run_dir` alone, and return the path of report.html.

    Works on a run that was interrupted at any moment: what is missing is left out and said. Raises OSError if the
    directory cannot be written.
    """
    folder = Path(run_dir)
    files = read_run_files(folder)
    write_plots(files, folder / "plots")
    target = folder / "report.html"
    write_atomically(target, render_report(files, folder))
    return target


def render_report(files: RunFiles, folder: Path) -> str:
    """The page as text. folder: what the commands under "Use it" call the run."""
    notices = [_unfinished(files)] if _unfinished(files) else []
    values = {
        "run": files,
        "name": files.name,
        "eyebrow": "Luthier training report",
        "lead": _lead(files),
        "notices": notices + [f"{problem}." for problem in files.problems],
        "notes": files.notes,
        "unfinished": bool(notices),
        "headline": _headline(files),
        "loss_chart": _loss_chart(files),
        "charts": _small_charts(files),
        "evaluations": _evaluations(files),
        "samples": [_sample(sample) for sample in files.samples],
        "datasets": _datasets(files.manifests),
        "usage": _usage(files, folder),
        "configuration": _configuration(files.config),
        "environment": [Fact(label, text) for label, text in _flattened(files.environment)],
    }
    return render_page(ASSETS / "report.html", values, script=ASSETS / "report.js")


def _lead(files: RunFiles) -> str:
    config = files.config
    if not config:
        return "The configuration of this run was not found."
    method = (
        "All weights"
        if config.get("method") == "full"
        else f"A rank {config.get('rank', '?')} {_variant(config)} adapter{_start(config)}"
    )
    sentence = f"{method} for {config.get('model', '?')}, trained on {Path(str(config.get('data', '?'))).name}"
    steps = finite(files.result.get("steps")) or (files.steps[-1]["step"] if files.steps else None)
    return f"{sentence}, {count_text(steps)} steps." if steps else f"{sentence}."


def _variant(config: Mapping[str, Any]) -> str:
    return {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}.get(str(config.get("variant")), str(config.get("variant")))


def _start(config: Mapping[str, Any]) -> str:
    names = {"pissa": "PiSSA", "eva": "EVA", "loftq": "LoftQ", "qera": "QERA"}
    return f" that began from {names[str(config['init'])]}" if config.get("init") in names else ""


def _unfinished(files: RunFiles) -> str:
    if files.result:
        return ""
    step = f" The last step recorded is {count_text(files.steps[-1]['step'])}." if files.steps else ""
    return f"This run has not finished.{step} It goes on from its newest checkpoint when asked to."


def _headline(files: RunFiles) -> list[Tile]:
    result, tiles = files.result, []
    evaluation = result.get("eval")
    evaluation = evaluation if isinstance(evaluation, dict) else {}
    before, after = (value if isinstance(value, dict) else {} for value in (evaluation.get("before"), evaluation.get("after")))
    for name in ("loss", "exact_match"):
        old, new = finite(before.get(name)), finite(after.get(name))
        if new is not None:
            was = metric_text(name, old) if old is not None else ""
            tiles.append(Tile(METRIC_NAMES[name].capitalize(), metric_text(name, new), was, big=True))
    losses = [finite(result.get(key)) for key in ("loss_first", "loss_last")]
    if not tiles and losses[1] is not None:
        tiles.append(Tile("Training loss", number_text(losses[1]), number_text(losses[0]), big=True))
    return tiles + _resources(files)


def _token_note(result: Mapping[str, Any]) -> str:
    """How many tokens the run went through, and the share that was not computed: what rows of a step share, and ends
    without a target."""
    tokens, computed = finite(result.get("tokens")), finite(result.get("computed_tokens"))
    if not tokens:
        return ""
    saved = 1 - computed / tokens if computed else 0
    spared = f", {percent_text(round(saved, 3))} of them shared beginnings or behind the last target" if saved > 0 else ""
    return f"{count_text(tokens)} tokens{spared}"


def _resources(files: RunFiles) -> list[Tile]:
    result, tiles = files.result, []
    if (seconds := finite(result.get("seconds"))) is not None:
        tiles.append(Tile("Time", duration_text(seconds)))
    if (speed := finite(result.get("tokens_per_second"))) is not None:
        tiles.append(Tile("Tokens a second", count_text(speed), note=_token_note(result)))
    peak = finite(result.get("peak_rss_bytes")) or max((value for _, value in files.curve("rss_bytes")), default=None)
    if peak is not None:
        tiles.append(Tile("Peak memory", size_text(peak)))
    if (parameters := finite(result.get("trainable_parameters"))) is not None:
        total = finite(result.get("total_parameters"))
        note = f"{percent_text(round(parameters / total, 4))} of all" if total else ""
        tiles.append(Tile("Trainable parameters", count_text(parameters), note=note))
    return tiles


def _loss_chart(files: RunFiles) -> Chart | None:
    lines = [
        Series("training", files.curve("loss"), "raw"),
        Series("training, smoothed", files.curve("loss_smooth"), "main"),
        Series("held out", files.curve("loss", files.evaluations), "held-out"),
    ]
    return line_chart("Loss a supervised token", lines, number_text, tick=lambda loss: f"{loss:.3g}")


def _small_charts(files: RunFiles) -> list[Chart]:
    exact = Series("exact match", files.curve("exact_match", files.evaluations), "held-out")
    charts = [
        line_chart(
            "Learning rate", [Series("learning rate", files.curve("learning_rate"))], lambda x: f"{x:.3g}", from_zero=True
        ),
        line_chart(
            "Gradient norm before clipping",
            [Series("gradient norm", files.curve("grad_norm"))],
            lambda x: f"{x:.3g}",
            from_zero=True,
        ),
        line_chart(
            "Tokens a second", [Series("tokens a second", files.curve("tokens_per_second"))], count_text, from_zero=True
        ),
        line_chart("Memory", [Series("resident", files.curve("rss_bytes"))], size_text, from_zero=True),
        line_chart("Exact match on held-out rows", [exact], percent_text, from_zero=True) if len(exact.points) > 2 else None,
    ]
    return [chart for chart in charts if chart is not None]


def _evaluations(files: RunFiles) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(key for record in files.evaluations for key in record if key not in NOT_METRICS))
    rows = [
        [count_text(record["step"]), *(metric_text(name, finite(record.get(name))) for name in names)]
        for record in files.evaluations
    ]
    return {"header": ["step", *(METRIC_NAMES.get(name, name).removeprefix("held-out ") for name in names)], "rows": rows}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    expected = sample.get("expected")
    answers = []
    for key, label in (("expected", "Expected"), ("before", "Before"), ("after", "After")):
        text = sample.get(key)
        if text is None:
            continue
        mark = ""
        if key != "expected" and expected is not None:
            mark = "exact" if str(text).strip() == str(expected).strip() else "differs"
        answers.append({"kind": key, "label": label, "text": str(text), "mark": mark})
    return {"title": "Prompt", "prompt": str(sample.get("prompt", "")), "answers": answers}


def _datasets(manifests: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for key, title in (("train", "Training rows"), ("eval", "Held-out rows")):
        manifest = manifests.get(key)
        if not isinstance(manifest, dict):
            continue
        tokens, supervised = finite(manifest.get("tokens")), finite(manifest.get("supervised_tokens"))
        kept = finite(manifest.get("kept"))
        share = supervised / tokens if tokens and supervised is not None else None
        shown = {name: value for name, value in manifest.items() if name != "notes"}
        if tokens and kept:
            shown["mean_length"] = round(tokens / kept, 1)
        notes = manifest.get("notes")
        found.append({
            "title": title,
            "share": None if share is None else round(100 * share, 1),
            "share_text": "" if share is None else percent_text(share),
            "rows": [Fact(label, text) for label, text in _flattened(shown)],
            "notes": [str(note) for note in notes] if isinstance(notes, list) else [],
        })  # fmt: skip
    return found


def _configuration(config: Mapping[str, Any]) -> list[Fact]:
    facts = []
    for key, value in config.items():
        field = RunConfig.model_fields.get(key)
        default = None if field is None else field.get_default(call_default_factory=True)
        facts.append(Fact(key.replace("_", " "), _value_text(value), changed=field is not None and value != default))
    return facts


def _usage(files: RunFiles, folder: Path) -> list[dict[str, str]]:
    run = shlex.quote(str(files.result.get("run_dir") or folder))
    if not files.result:
        return [{"title": "", "code": f"luthier resume {run}"}]
    steps = [
        {"title": "Talk to it", "code": f"luthier chat {run}"},
        {
            "title": "Measure it on other rows, beside the model it came from",
            "code": f"luthier eval {run} --data test.jsonl --vs-base",
        },
    ]
    if files.config.get("method") != "full":
        base = str(files.adapter.get("base_model_name_or_path") or files.config.get("model") or "MODEL")
        adapter = str(files.result.get("adapter_dir") or folder / "adapter")
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})\n"
            f"model = PeftModel.from_pretrained(model, {json.dumps(adapter)})"
        )
        steps.append({"title": "Open the adapter in PEFT", "code": code})
    return steps


def _flattened(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as `outer · inner` rows; lists of plain values on one line."""
    for key, value in content.items():
        label = f"{prefix}{visible(str(key)).replace('_', ' ')}"
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{label} · ")
        elif str(key).endswith("bytes") and finite(value) is not None:
            yield label.removesuffix(" bytes"), size_text(float(value))
        else:
            yield label, _value_text(value)


def _value_text(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"[:LONGEST_VALUE]
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return visible(text[:LONGEST_VALUE])
