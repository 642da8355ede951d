"""The pure parts of benchmarks/training.py: what has to be computed, the figures made of records, tables and pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import race_data
    import race_figures
    import race_peers
    import race_plots
    import race_prepare
    import race_record
    import race_table
    from race_data import Needed, Row, Weights, needed
finally:
    # kernels.py there must not pass for the package of that name.
    sys.path.remove(str(BENCHMARKS))


def row(ids: str, supervised: str) -> Row:
    """Letters as tokens; a capital X marks a target."""
    return Row([ord(letter) for letter in ids], [mark == "X" for mark in supervised])


def test_labels_and_json_keep_what_is_supervised() -> None:
    one = row("abcdef", "..XX.X")
    assert one.labels == [-100, -100, ord("c"), ord("d"), -100, ord("f")]
    assert one.to_json()["spans"] == [[2, 4], [5, 6]]
    assert Row.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Row.from_json(row("ab", "..").to_json()) == row("ab", "..")


def test_needed_counts_a_shared_prefix_once_and_nothing_behind_the_last_target() -> None:
    batch = [row("abcd", "...X"), row("abce!", "...X."), row("abx", "..X")]
    # Distinct: a b c d e ! x. Reached: a b c, since d, e, ! and x are only targets or follow the last. Predicting: c (for
    # d and e at once) and b (for x).
    assert needed(batch) == Needed(tokens=12, supervised=3, distinct=7, reached=3, predicting=2)


def test_needed_of_rows_without_anything_in_common_is_their_sum() -> None:
    rows = [row("abc", ".XX"), row("xyz", ".XX")]
    assert needed(rows) == needed(rows[:1]) + needed(rows[1:]) == Needed(6, 4, 6, 4, 4)


def test_an_unsupervised_row_needs_nothing() -> None:
    assert needed([row("abc", "...")]) == Needed(3, 0, 3, 0, 0)


def test_equal_tokens_at_other_places_are_not_shared() -> None:
    assert needed([row("abab", "XXXX")]).distinct == 4


def test_useful_flops_is_four_a_weight_and_token_that_must_meet() -> None:
    assert race_data.useful_flops(Weights(everywhere=100, last=10, head=50), Needed(9, 2, 8, 7, 3)) == 4 * (700 + 60 * 3)


def test_attention_flops_match_a_count_of_pairs() -> None:
    pairs = sum(t + 1 for t in range(5))
    products = 2 + 4  # scores and values forward; dP, dV, dQ, dK backward
    assert race_data.attention_flops(5, 3, 8, 2) == products * 2 * pairs * 8 * 3 * 2


def test_random_rows_are_the_same_each_time_and_all_supervised_but_the_first_token() -> None:
    rows = race_data.random_rows(3, (4, 6), 50, seed=1)
    assert rows == race_data.random_rows(3, (4, 6), 50, seed=1) != race_data.random_rows(3, (4, 6), 50, seed=2)
    assert [len(one.ids) for one in rows] == [4, 6, 4]
    assert rows[0].supervised == [False, True, True, True]
    assert all(3 <= token < 50 for one in rows for token in one.ids)


def test_every_label_stands_in_every_instruction() -> None:
    rows = [{"instruction": "Which? ", "input": "a", "output": label} for label in ("pear", "apple", "pear")]
    made = race_data.with_all_labels(rows)
    expected = "Which? Answer with one of these 2 labels and nothing else: apple, pear."
    assert [one["instruction"] for one in made] == [expected] * 3
    assert [one["output"] for one in made] == ["pear", "apple", "pear"]
    with pytest.raises(SystemExit, match="row 2 has not"):
        race_data.with_all_labels([rows[0], {"prompt": "a"}])


def test_grouping_keeps_the_rows_and_pads_least() -> None:
    rows = [row("a" * length, "X" * length) for length in (9, 1, 8, 2, 7, 3)]
    batches = race_data.batches_of(rows, 2)
    sorted_batches = race_data.grouped(batches)
    assert [[len(one.ids) for one in batch] for batch in sorted_batches] == [[9, 8], [7, 3], [2, 1]]
    assert race_data.padded_tokens(batches) == 48
    assert race_data.padded_tokens(sorted_batches) == 36
    assert race_data.padding_share(batches) == pytest.approx(1 - 30 / 48)
    assert race_data.batches_of(rows, 4) == [rows[:4]]


def test_batches_survive_their_file(tmp_path: Path) -> None:
    batches = [[row("abc", "..X"), row("de", ".X")], [row("f", ".")]]
    race_data.write_batches(tmp_path / "rows.json", batches)
    assert race_data.read_batches(tmp_path / "rows.json") == batches


def test_padding_of_the_peers_collator() -> None:
    made = race_peers.padded(race_peers.rows_of([[row("abc", "..X"), row("d", ".")]]))
    assert made["input_ids"].tolist() == [[97, 98, 99], [100, 0, 0]]
    assert made["labels"].tolist() == [[-100, -100, 99], [-100, -100, -100]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_weights_are_those_of_the_layers(tiny_llama: Path) -> None:
    from luthier.models.load import load

    model = load(str(tiny_llama)).model
    config = model.config
    hidden, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    keys = 2 * hidden * size * config.num_key_value_heads
    rest = 2 * hidden * hidden + 3 * hidden * config.intermediate_size
    layers = config.num_hidden_layers
    expected = Weights(everywhere=layers * keys + (layers - 1) * rest, last=rest, head=config.vocab_size * hidden)
    assert race_prepare.weights_of(model) == expected


def run(contender: str, seconds: list[float], memory: int, number: int = 1, **extra: Any) -> dict[str, Any]:
    """A record as a process leaves it: one warm-up step, then one pass a value of `seconds` over one batch."""
    steps = [
        {"pass": n, "batch": 1, "seconds": s, "fma_peak": 1.5e11, "loss": 2.0, "computed_tokens": 90, "overhead_seconds": 0.02}
        for n, s in enumerate(seconds)
    ]
    warm = [{"batch": 0, "seconds": 9.0, "fma_peak": 1.5e11, "loss": 3.0}]
    base = {"contender": contender, "task": "snips", "round": number, "warmup": warm, "steps": steps, "peak_rss_bytes": memory}
    return base | extra


def a_state() -> dict[str, Any]:
    batches = [asdict(Needed(100, 10, 80, 70, 10)), asdict(Needed(120, 12, 60, 50, 12))]
    tasks = {
        "snips": {"batches": batches, "batch_size": 8, "longest": 30},
        "length-128": {"batches": [asdict(Needed(256, 254, 256, 254, 254))] * 2, "batch_size": 2, "longest": 128},
    }
    runs = {
        "a": run("luthier-lora", [1.0, 2.0, 3.0], 300),
        "b": run("luthier-qlora", [2.0, 2.0, 2.0], 200),
        "c": run("trainer-lora", [20.0], 900, collator="flat"),
        "d": run("trainer-lora", [10.0], 1000, number=2, collator="flat"),
        "e": run("trl-qlora", [24.0], 800, collator="grouped"),
        "f": {"contender": "trl-lora", "task": "snips", "failed": "exit code 1", "message": "no"},
    }
    machine = {
        "processor": "A processor", "memory_bytes": 8e9, "fma_flops_per_second": 2e11, "read_bytes_per_second": 2e10,
        "packages": {"torch": "2.13", "transformers": "5.0"}, "peers": {"peft": "1", "trl": "1", "bitsandbytes": None},
    }  # fmt: skip
    losses = [[{"pass": 0, "seconds": 1.0, "loss": loss} for loss in way] for way in ((2.0, 1.00001), (2.0, 1.0))]
    exact = {name: {"steps": s, "held_out_loss": h} for name, s, h in zip(("fast", "plain"), losses, (0.5, 0.501), strict=True)}
    point = run("luthier-lora", [0.5, 0.7, 0.6], 300, task="length-128", attention_seconds=0.1)
    return {
        "started": "2026-01-02T03:04:05+0000",
        "options": {"model": "smollm2-135m", "threads": 2, "rounds": 2, "warmup": 1},
        "facts": {
            "weights": asdict(Weights(5, 1, 2)),
            "shape": {"layers": 2, "heads": 4, "key_heads": 2, "head_size": 16},
            "tasks": tasks,
        },
        "machine": machine,
        "runs": runs,
        "trials": {},
        "collators": {"snips": {"trainer": {"collator": "flat", "why": "The HF Trainer on trial: grouped 3.0 s, flat 2.0 s."}}},
        "exactness": exact,
        "lengths": {"length-128/luthier-lora": point, "length-256/luthier-lora": {"failed": "exit code 1"}},
    }


def test_figures_are_medians_over_passes_of_all_rounds() -> None:
    found = race_figures.figures_of(a_state())["snips"]
    assert list(found["contenders"]) == ["luthier-lora", "luthier-qlora", "trainer-lora", "trl-qlora"]
    ours, peer = found["contenders"]["luthier-lora"], found["contenders"]["trainer-lora"]
    assert (ours["seconds"], ours["tokens_per_second"], ours["passes"]) == (2.0, 60.0, 3)
    assert ours["computed_share"] == 0.75
    assert ours["share"] == pytest.approx(4 * (5 * 50 + 3 * 12) / (2 * 1.5e11), abs=0)
    assert (peer["seconds"], peer["tokens_per_second"], peer["peak_rss_bytes"]) == (15.0, 8.0, 1000)
    between = found["compared"]
    assert (between["best_peer"], between["leanest_peer"]) == ("trainer-lora", "trl-qlora")
    assert between["speed"] == {"luthier-lora": 7.5, "luthier-qlora": 7.5}
    assert between["memory"] == {"luthier-lora": 0.375, "luthier-qlora": 0.25}
    assert between["qlora_over_lora"] == 1.0
    assert between["first_loss_apart"] == {"trainer-lora": 0.0, "trl-qlora": 0.0}


def test_exactness_takes_the_largest_difference() -> None:
    exact = race_figures.exactness_of(a_state())
    assert exact is not None
    assert exact["largest"] == pytest.approx(1e-5)
    assert exact["held_out_apart"] == pytest.approx(1 - 0.5 / 0.501)
    assert race_figures.exactness_of({"exactness": {"fast": {}}}) is None


def test_length_points_take_attention_off() -> None:
    (point,) = race_figures.length_points(a_state())["luthier-lora"]
    assert point["length"] == 128
    assert point["seconds"] == pytest.approx(0.6 / 256)
    assert race_figures.without_attention([point]) == [pytest.approx(0.5 / 256)]
    assert point["attention_limit"] == pytest.approx(6 * 129 * 4 * 16 * 2 / 1.5e11, abs=0)


def test_verdicts_name_what_is_not_met() -> None:
    state = a_state()
    lines = race_table.verdicts(state, race_figures.figures_of(state))
    assert "snips, Luthier LoRA: speed over the best peer: 7.50, target at least 5.00: met" in lines
    assert "snips, Luthier LoRA: memory: 0.375, target at most 0.333: NOT met" in lines
    assert "snips, Luthier LoRA: packing, clipping and update: 1.00%, target at most 3.00%: met" in lines
    assert "loss by step, 2 steps: 1.0e-05, target at most 1.0e-04: met" in lines


def test_tables_and_the_readme_section(tmp_path: Path) -> None:
    state = a_state()
    figures = race_figures.figures_of(state)
    table = race_table.summary_table(state, figures)
    assert "| 8 (PEFT + Trainer, LoRA) | 60 (**7.5x**) | 60 (**7.5x**) |" in table
    assert "| snips | PEFT + TRL, LoRA | failed: exit code 1 |" in race_table.full_table(state, figures)
    widths = {line.count("|") for line in race_table.full_table(state, figures).splitlines()}
    assert len(widths) == 1
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{race_table.BEGIN}\nold\n{race_table.END}\nafter\n", encoding="utf-8")
    section = race_table.readme_section(state, figures, [("Bars", "docs/bars.svg")])
    for _ in range(2):
        race_table.insert_section(readme, section)
    text = readme.read_text(encoding="utf-8")
    assert text == f"before\n{race_table.BEGIN}\n{section}\n{race_table.END}\nafter\n"
    assert "![Bars](docs/bars.svg)" in text
    assert "2026-01-02" in text
    assert "snips 75.0%" in text
    assert "packing, clipping and the optimiser: snips 1.0%" in text
    assert "multiply-add peak 150 GFLOP/s" in text
    (tmp_path / "other.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit, match="must hold the lines"):
        race_table.insert_section(tmp_path / "other.md", section)


def test_pictures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = (race_plots.write_pictures(a_state(), tmp_path / name) for name in ("one", "two"))
    assert [path.name for _, path in first] == [race_plots.BARS, race_plots.LENGTHS]
    for (_, one), (_, two) in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert b"<svg" in one.read_bytes()


OPTIONS = {"model": "m", "threads": 2, "seed": 0, "warmup": 1, "passes": 3, "rounds": 1}


def test_a_record_goes_on_with_what_is_done_and_runs_again_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    record = race_record.Record(path, dict(OPTIONS), resume=False)
    facts = {"weights": {}, "tasks": {"snips": {"file": "snips.jsonl", "batches": [1]}}}
    record.accept_facts(json.loads(json.dumps(facts)))
    record.put("runs", "good", {"steps": []})
    record.put("runs", "bad", {"failed": "exit code 1"})
    again = race_record.Record(path, {**OPTIONS, "rounds": 2}, resume=True)
    again.accept_facts(json.loads(json.dumps(facts)))
    assert again.has("runs", "good")
    assert not again.has("runs", "bad")
    assert not again.has("runs", "new")
    assert "snips.jsonl" not in path.read_text(encoding="utf-8")
    facts["tasks"]["snips"]["batches"] = [2]
    with pytest.raises(SystemExit, match="keeps its rows and steps; snips differ"):
        again.accept_facts(facts)


def test_a_record_is_not_resumed_with_other_options_or_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    race_record.Record(path, dict(OPTIONS), resume=False).write()
    with pytest.raises(SystemExit, match="threads differ"):
        race_record.Record(path, {**OPTIONS, "threads": 1}, resume=True)
    with pytest.raises(SystemExit, match="there is none"):
        race_record.Record(tmp_path / "none.json", dict(OPTIONS), resume=True)


def test_a_job_gives_its_last_line_or_says_how_it_ended(tmp_path: Path) -> None:
    script = tmp_path / "part.py"
    script.write_text(
        "import json, sys\njob = json.load(open(sys.argv[2]))\nprint('noise')\n"
        "if job['fail']: print('why', file=sys.stderr); sys.exit(3)\nprint(json.dumps({'found': job['x']}))\n",
        encoding="utf-8",
    )
    done = race_record.run_job(script, tmp_path, {"fail": False, "x": 5}, 1)
    assert done["found"] == 5
    assert done["process_seconds"] > 0
    failed = race_record.run_job(script, tmp_path, {"fail": True}, 1)
    assert (failed["failed"], failed["message"]) == ("exit code 3", "why")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--snips, --banking77, --e2e needed"),
        (["--works", "random", "--steps", "snips"], "must be WORK=K"),
        (["--works", "random", "--warmup", "0"], "must be at least 1"),
        (["--works", "--exactness"], "--snips needed"),
        (["--works", "random", "--readme", "README.md"], "give --plots too"),
    ],
)
def test_options_that_cannot_work_are_refused(arguments: list[str], message: str) -> None:
    script = [sys.executable, str(BENCHMARKS / "training.py"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
