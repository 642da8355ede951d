"""The README.md of an export: what it is, what it was made of and how, how good it is, and how to run it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import luthier
from luthier.export.choices import Measured
from luthier.export.subject import Subject
from luthier.models.gguf_file import read_gguf
from luthier.models.smollm2 import ALIAS, HUB_NAME
from luthier.training.run_files import RunFiles, read_run_files
from luthier.units import metric_text, number_text, percent_text, shortened, size_text

CARD = "README.md"
KNOWN_LICENSES = {ALIAS: "apache-2.0", HUB_NAME: "apache-2.0"}
RECIPE_KEYS = (
    "method", "variant", "init", "base", "rank", "alpha", "dropout", "targets", "learning_rate", "epochs", "steps",
    "batch_size", "max_length", "optimizer", "seed",
)  # fmt: skip
LIBRARIES = {"peft": "peft", "merged": "transformers", "gguf": "gguf", "gguf-adapter": "gguf", "mlx": "mlx"}
_PLAIN_YAML = re.compile(r"(?!(?i:null|true|false|yes|no|on|off|y|n)\Z)[A-Za-z][\w./+-]*")
_LICENSE = re.compile(r"^license:\s*['\"]?([\w.+-]+)", re.MULTILINE)


def license_of(subject: Subject) -> str | None:
    """The base's license where its own files, or what is known of the default model, say it."""
    path = subject.source.path
    if subject.is_full:  # its folder is the run's own: a base that is still there, on this machine, may say it
        path = Path(subject.base_name).expanduser()
    if path.is_file():
        stated = read_gguf(path).metadata.get("general.license")
    else:
        stated = _license_in(path / CARD)
    return shortened(stated, 80) if isinstance(stated, str) and stated else KNOWN_LICENSES.get(subject.base_name)


def write_card(
    stage: Path,
    subject: Subject,
    to: str,
    files: Sequence[str],
    *,
    license_name: str | None,
    measured: Sequence[Measured],
    recommendation: str | None,
    notes: Sequence[str],
) -> None:
    """Write `stage`/README.md. measured: the choices compared on the run's rows, [] where there were none."""
    run = read_run_files(subject.run_dir) if subject.run_dir is not None else None
    sections = [
        _front_matter(subject, to, license_name),
        f"# {escape(shortened(subject.name, 80), quote=False)}\n",
        _summary(subject, to, license_name),
    ]
    if run is not None:
        sections += [_data(run), _recipe(run), _evaluation(run)]
    sections += [_merging(measured, recommendation), how_to_run(subject, to, files), _notes(notes)]
    (stage / CARD).write_text("\n".join(section for section in sections if section), encoding="utf-8")


def _license_in(card: Path) -> str | None:
    """`license:` in the front matter of a model card."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace")[:20000]
    except OSError:
        return None
    if not text.startswith("---"):
        return None
    found = _LICENSE.search(text.split("---", 2)[1])
    return found[1] if found else None


def _front_matter(subject: Subject, to: str, license_name: str | None) -> str:
    lines = ["---", f"base_model: {_yaml(shortened(subject.public_base_name, 200))}", f"library_name: {LIBRARIES[to]}"]
    lines += [f"license: {_yaml(license_name)}"] if license_name else []
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags:", "- luthier", "---", ""])


def _summary(subject: Subject, to: str, license_name: str | None) -> str:
    what = {
        "merged": "The base with the adapter merged in" if subject.adapter else "The model, every weight trained or as it was",
        "peft": "An adapter in PEFT's layout",
        "mlx": "An adapter in mlx-lm's layout",
        "gguf": "The merged model as a GGUF file",
        "gguf-adapter": "An adapter as a GGUF file",
    }[to]
    terms = f"The base's license is {license_name}." if license_name else "The base's license is not known; look it up."
    return f"{what}, made with luthier {luthier.__version__} from `{_plain(subject.public_base_name)}`. {terms}\n"


def _data(run: RunFiles) -> str:
    rows = []
    for label, key in (("training", "train"), ("held out", "eval")):
        manifest = run.manifests.get(key)
        if isinstance(manifest, dict):
            name = Path(str(manifest.get("path", ""))).name
            rows.append([label, _plain(name), str(manifest.get("kept", "")), f"`{_plain(manifest.get('sha256', ''))}`"])
    return f"## Data\n\n{_table(['use', 'file', 'rows', 'sha256'], rows)}" if rows else ""


def _recipe(run: RunFiles) -> str:
    rows = [[key, f"`{_plain(run.config[key])}`"] for key in RECIPE_KEYS if run.config.get(key) not in (None, [], {})]
    for key in ("steps", "tokens", "trainable_parameters", "total_parameters"):
        if isinstance(run.result.get(key), int):
            rows.append([f"{key.replace('_', ' ')} in all", f"{run.result[key]:,}"])
    return f"## Recipe\n\n{_table(['setting', 'value'], rows)}"


def _evaluation(run: RunFiles) -> str:
    result = run.result.get("eval")
    if not isinstance(result, dict) or not all(isinstance(result.get(key), dict) for key in ("before", "after")):
        return ""
    before, after = result["before"], result["after"]
    rows = [
        [name.replace("_", " "), metric_text(name, before.get(name)), metric_text(name, value)]
        for name, value in after.items()
        if isinstance(value, int | float) and name != "tokens"
    ]
    return f"## Evaluation\n\nOn the held-out rows, {_tokens(after)}.\n\n{_table(['metric', 'base', 'tuned'], rows)}"


def _tokens(metrics: dict[str, Any]) -> str:
    tokens = metrics.get("tokens")
    return f"loss over {tokens:,} supervised tokens" if isinstance(tokens, int) else "the loss over all supervised tokens"


def _merging(measured: Sequence[Measured], recommendation: str | None) -> str:
    if not measured:
        return ""
    rows = [
        [
            one.choice.label, size_text(one.size_bytes), number_text(one.difference.logits_error),
            number_text(one.difference.loss), percent_text(one.difference.token_agreement),
            percent_text(one.difference.row_agreement),
        ]
        for one in measured
    ]  # fmt: skip
    first = measured[0].difference
    heads = ["merged into, stored in", "size", "logits error", "loss", "same next token", "same on whole rows"]
    said = f"{recommendation}\n" if recommendation else ""
    return (
        f"## What merging costs\n\nAgainst base and adapter as they were trained, on {first.tokens} supervised tokens of "
        f"{first.rows} rows, where the loss is {number_text(first.loss_reference)}.\n\n{_table(heads, rows)}\n{said}"
    )


def how_to_run(subject: Subject, to: str, files: Sequence[str]) -> str:
    """How to use this form, and what to do for the programs that want another."""
    base, gguf = _plain(subject.public_base_name), next((file for file in files if file.endswith(".gguf")), "")
    python = {
        "merged": "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n',
        "peft": "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "FOLDER")\n```\n',
        "mlx": f"```\nmlx_lm.generate --model {base} --adapter-path FOLDER --prompt TEXT\n```\n",
        "gguf": f"```\nllama-cli -m {gguf}\nollama create NAME -f Modelfile && ollama run NAME\n```\n",
        "gguf-adapter": f"```\nllama-cli -m BASE.gguf --lora {gguf}\nollama create NAME -f Modelfile && ollama run NAME\n```\n",
    }[to]
    others = {
        "PEFT": "peft", "Transformers": "merged", "llama.cpp and Ollama": "gguf",
        "llama.cpp, on the base's own file": "gguf-adapter", "mlx-lm": "mlx",
    }  # fmt: skip
    if subject.adapter is None:
        others = {"Transformers": "merged", "llama.cpp and Ollama": "gguf"}
    lines = [f"- {program}: `luthier export RUN --to {form} --out FOLDER`" for program, form in others.items() if form != to]
    return f"## How to run it\n\n{python}\nFor other programs:\n\n" + "\n".join(lines) + "\n"


def _notes(notes: Sequence[str]) -> str:
    return "## Notes\n\n" + "\n".join(f"- {_plain(note, 600)}" for note in notes) + "\n" if notes else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _yaml(text: str) -> str:
    """A scalar of YAML; what is more than a plain word or path stands in quotes, with JSON's escapes."""
    return text if _PLAIN_YAML.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _plain(value: Any, most: int = 200) -> str:
    """A value on one line, without what would end a table's cell or a span of code."""
    return shortened(str(value), most).replace("|", "\\|").replace("`", "'")
