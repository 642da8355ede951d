"""`luthier eval` and `luthier chat` from the command line, on tiny models."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import luthier
from luthier.cli.main import run

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": f"{word}!"}]}
    for word in ("one", "two", "three", "four")
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def adapter(tmp_path: Path, tiny_llama: Path) -> Path:
    """An adapter that does something."""
    model, _ = luthier.load(str(tiny_llama))
    luthier.attach(model, luthier.AdapterSpec(rank=4), seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    luthier.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def invoke(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        run(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_eval_json(capsys, tiny_llama: Path, data: Path) -> None:
    code, out, err = invoke(capsys, "eval", str(tiny_llama), "--data", str(data), "--max-new-tokens", "4", "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result.keys() == {"metrics", "rows", "intervals", "notes", "sets"}
    assert result["metrics"].keys() == {"loss", "perplexity", "tokens", "exact_match"}
    assert result["rows"] == 4


def test_eval_vs_base(capsys, tiny_llama: Path, data: Path, adapter: Path) -> None:
    common = ["eval", str(tiny_llama), "--data", str(data), "--metrics", "loss", "--json"]
    _, out, _ = invoke(capsys, *common)
    plain = json.loads(out.splitlines()[-1])["metrics"]
    _, out, _ = invoke(capsys, *common, "--adapter", str(adapter))
    tuned = json.loads(out.splitlines()[-1])["metrics"]
    code, out, err = invoke(capsys, *common, "--adapter", str(adapter), "--vs-base", "--rows", "4")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["base"], result["tuned"], result["rows"]) == (plain, tuned, 4)
    assert result["difference"]["loss"]["value"] == pytest.approx(tuned["loss"] - plain["loss"])
    assert plain["loss"] != tuned["loss"]


def test_eval_of_a_full_run_loads_its_base(capsys, tmp_path: Path, tiny_llama: Path, data: Path) -> None:
    out_dir = tmp_path / "run"
    luthier.train(
        luthier.RunConfig(
            data=str(data), model=str(tiny_llama), method="full", steps=2, batch_size=2, learning_rate=0.01, out=str(out_dir)
        )
    )
    common = ["--data", str(data), "--metrics", "loss", "--json"]
    _, out, _ = invoke(capsys, "eval", str(tiny_llama), *common)
    base = json.loads(out.splitlines()[-1])["metrics"]
    code, out, err = invoke(capsys, "eval", str(out_dir), *common, "--vs-base")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["base"] == base
    assert result["tuned"]["loss"] < base["loss"]


def test_eval_of_a_run_takes_its_length_and_loss(capsys, tmp_path: Path, tiny_llama: Path, data: Path) -> None:
    out_dir = tmp_path / "run"
    luthier.train(
        luthier.RunConfig(
            data=str(data), model=str(tiny_llama), steps=1, batch_size=2, out=str(out_dir), max_length=64, loss_on="all"
        )
    )
    common = ["--data", str(data), "--metrics", "loss", "--json"]
    code, out, err = invoke(capsys, "eval", str(out_dir), *common)
    assert code == 0, err
    manifest = json.loads((out_dir / "data_manifest.json").read_text())["train"]
    assert json.loads(out.splitlines()[-1])["metrics"]["tokens"] == manifest["supervised_tokens"]
    data.write_text(json.dumps({"prompt": "word " * 60, "completion": "yes"}) + "\n")
    code, _, err = invoke(capsys, "eval", str(out_dir), *common)
    assert code == 4
    assert "rows must have at most 64 tokens" in err
    code, _, err = invoke(capsys, "eval", str(out_dir), *common, "--max-length", "400")
    assert code == 0, err


def test_eval_offline_opens_no_data_set_of_the_hub(capsys, tiny_llama: Path) -> None:
    code, out, err = invoke(capsys, "eval", str(tiny_llama), "--data", "some/name", "--offline")
    assert (code, out) == (4, "")
    assert "--offline opens no connection, and some/name is no file here" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--vs-base"], 2, "error: --vs-base compares a tuned model with its base;"),
        (
            ["--metrics", "blue"],
            2,
            "--metrics takes loss, exact, json, label, bleu, chrf, rouge, choice; got 'blue'. Did you mean 'bleu'?",
        ),
        (["--metrics", ","], 2, "error: --metrics takes loss, exact, json, label, bleu, chrf, rouge, choice; got none."),
        (["--on-long", "cut"], 2, "error: --on-long takes error, drop, truncate; got 'cut'."),
        (["--base", "f23"], 2, "got 'f23'. Did you mean 'f32'?"),
        (["--max-length", "8"], 4, "error: "),
    ],
)
def test_eval_says_what_is_wrong(capsys, tiny_llama: Path, data: Path, arguments, code, message) -> None:
    got, out, err = invoke(capsys, "eval", str(tiny_llama), "--data", str(data), *arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_chat_prompt_prints_one_answer(capsys, tiny_llama: Path, adapter: Path) -> None:
    options = ["--max-new-tokens", "6"]
    code, out, err = invoke(capsys, "chat", str(tiny_llama), "--prompt", "hello", *options)
    assert code == 0, err
    assert out.endswith("\n")
    _, tuned, _ = invoke(capsys, "chat", str(tiny_llama), "--adapter", str(adapter), "--prompt", "hello", *options)
    assert tuned != out


def test_notes_of_model_and_adapter_are_shown_beside_the_result(
    capsys, tmp_path: Path, tiny_llama: Path, data: Path, adapter: Path
) -> None:
    """On stderr, so that the answer or the JSON stays alone on stdout."""
    (adapter / "luthier_base.json").unlink()
    path = tmp_path / "untied"
    path.mkdir()
    for file in tiny_llama.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    wanted = [
        "note: The configuration ties head and embedding, the weights differ: both were loaded, untied.\n",
        "note: The adapter brings no luthier_base.json: names and shapes fit; that this is the base it was trained on, ",
    ]
    options = ["--adapter", str(adapter), "--max-new-tokens", "3"]
    code, out, err = invoke(capsys, "eval", str(path), "--data", str(data), "--metrics", "loss", "--json", *options)
    assert code == 0, err
    assert len(out.splitlines()) == 1
    assert all(note in err for note in wanted), err
    code, out, err = invoke(capsys, "chat", str(path), "--prompt", "hello", *options)
    assert code == 0, err
    assert all(note in err for note in wanted), err
    assert "note" not in out
    code, out, err = invoke(capsys, "quantize", str(path), "--to", "nf4", "--out", str(tmp_path / "nf4"), "--json")
    assert code == 0, err
    assert wanted[0] in err
    assert json.loads(out)["notes"] == [wanted[0].removeprefix("note: ").strip()]


def test_chat_reads_messages_until_the_end(capsys, monkeypatch, tiny_llama: Path) -> None:
    options = ["--max-new-tokens", "6"]
    _, alone, _ = invoke(capsys, "chat", str(tiny_llama), "--prompt", "hello", *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/reset\nhello\n/exit\nnever read\n"))
    code, out, err = invoke(capsys, "chat", str(tiny_llama), *options)
    assert code == 0, err
    assert out == alone * 2


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(capsys, monkeypatch, tiny_llama: Path) -> None:
    from luthier.evaluation.conversation import Conversation

    asked = []

    def ask(self, text: str) -> Iterator[str]:
        asked.append(text)
        yield "so"
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield " on"

    monkeypatch.setattr(Conversation, "ask", ask)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n"))
    code, out, err = invoke(capsys, "chat", str(tiny_llama))
    assert (code, out) == (0, "so\nso on\n"), err
    assert "stopped" in err
    asked.clear()
    code, out, _ = invoke(capsys, "chat", str(tiny_llama), "--prompt", "first")
    assert (code, out) == (130, "so\n")


def test_what_a_model_says_cannot_steer_the_terminal(capsys, monkeypatch, tiny_llama: Path) -> None:
    from luthier.evaluation.conversation import Conversation

    monkeypatch.setattr(Conversation, "ask", lambda self, text: iter(["a\x1b[2J", "\n👩‍🎻"]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = invoke(capsys, "chat", str(tiny_llama), "--prompt", "hello")
    assert code == 0
    assert "\x1b" not in out
    assert out.startswith("a")
    assert out.endswith("[2J\n👩‍🎻\n")


def test_a_message_that_cannot_be_one_does_not_end_the_conversation(capsys, monkeypatch, tiny_llama: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 2000 + "\n/reset\nhello\n"))
    code, out, err = invoke(capsys, "chat", str(tiny_llama), "--max-new-tokens", "3")
    assert code == 0, err
    assert "error: a conversation must stay below the model's 512 positions" in err
    assert out.count("\n") >= 1
    code, _, err = invoke(capsys, "chat", str(tiny_llama), "--prompt", "word " * 2000)
    assert code == 4
    assert "error: a conversation must stay below" in err


def test_bytes_that_are_no_text_do_not_end_the_conversation(capsys, monkeypatch, tiny_llama: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n"), encoding="utf-8"))
    code, out, err = invoke(capsys, "chat", str(tiny_llama), "--max-tokens", "2")
    assert code == 0, err
    assert "error: the message: text must be valid Unicode" in err
    assert len(out.splitlines()) >= 1


def test_a_model_without_a_template_says_that_it_forgets(capsys, monkeypatch, tmp_path: Path) -> None:
    from tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    code, _, err = invoke(capsys, "chat", str(tmp_path / "base"), "--max-new-tokens", "3")
    assert code == 0, err
    assert "no chat template: each message is answered by itself" in err
