"""Files as people have them, whole and damaged; the wording of every error is pinned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_tokenizer

from luthier.data import Dataset, Renderer, RowCache, load_examples
from luthier.data.problems import Problems
from luthier.data.read import open_source, read_rows
from luthier.errors import DataError

ROW = {"prompt": "q", "completion": "a"}
LINE = json.dumps(ROW)


def rows_of(path: Path) -> list:
    problems = Problems()
    values = [value for _, value in read_rows(open_source(str(path)), problems)]
    assert problems.kept == []
    return values


def errors_of(path: Path) -> list[str]:
    """The problems or the one error of reading `path`, the folder's name left out."""
    problems = Problems()
    try:
        list(read_rows(open_source(str(path)), problems))
    except DataError as error:
        problems.add("", str(error))
    return [problem.replace(f"{path.parent}/", "") for problem in problems.kept]


def written(folder: Path, content: str | bytes, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        f"{LINE}\n{LINE}\n",
        f"{LINE}\n{LINE}",
        f"\ufeff{LINE}\n{LINE}\n",
        f"{LINE}\r\n{LINE}\r\n",
        f"\n\n{LINE}\n  \n\t{LINE} \n\n",
        f"[{LINE},\n {LINE}]",
        f"\ufeff \n[\r\n{LINE}\r\n,{LINE}\r\n]\r\n",
        json.dumps([ROW, ROW], indent=2),
    ],
)
def test_blank_lines_line_ends_byte_order_marks_and_lists(tmp_path: Path, content: str) -> None:
    for name in ("d.jsonl", "d.json", "data"):
        assert rows_of(written(tmp_path, content, name)) == [ROW, ROW]


def test_rows_know_their_line(tmp_path: Path) -> None:
    for content in (f"\n{LINE}\n\n{LINE}\n", f"[\n{LINE},\n\n{LINE}]"):
        path = written(tmp_path, content)
        assert [where for where, _ in read_rows(open_source(str(path)), Problems())] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text" "b"}\n', "d.jsonl:2:9: not valid JSON: Expecting ':' delimiter. Near: '{\"text\" \"b\"}'."),
        ('{"text": "a"}\n  {"text": }\n', "d.jsonl:2:12: not valid JSON: Expecting value. Near: '{\"text\": }'."),
        ('{"text": "a"}\n{"text": "b', 'd.jsonl:2:10: the last line is cut short. Near: \'{"text": "b\'.'),
        ('{"text": "a"}\n{"text":', "d.jsonl:2:9: the last line is cut short. Near: '{\"text\":'."),
        ('{"text": "a"} {"text": "b"}\n', 'd.jsonl:1:15: not valid JSON: Extra data. Near: \'{"text": "a"} {"text": "b"}\'.'),
        ('{"text": "a\x01b"}\n', 'd.jsonl:1:12: not valid JSON: Invalid control character at. Near: \'{"text": "a\\x01b"}\'.'),
        ('{"text": "a", "text": "b"}\n', "d.jsonl:1: a key may stand once in an object; 'text' stands 2 times."),
        ('{"text": NaN}\n', "d.jsonl:1: JSON has no NaN. Write null, or leave the key out."),
        ("[" * 100_000 + "\n", "d.jsonl:1: the row is nested too deeply to read."),
        (
            '[{"text": "a"},\n {"text": b}]',
            'd.jsonl:2:11: not valid JSON: Expecting value. Near: \'t": "a"},\\n {"text": b}]\'.',
        ),
        ('[{"text": "a"},\n {"text": "b"', 'd.jsonl:2:14: the file is cut short. Near: \' "a"},\\n {"text": "b"\'.'),
        ('[{"text": "a"}', 'd.jsonl:1:15: the file is cut short. Near: \'[{"text": "a"}\'.'),
        (
            '[{"text": "a"}\n{"text": "b"}]',
            'd.jsonl:2:1: expected \',\' or \']\' after an element. Near: \'[{"text": "a"}\\n{"text": "b"}]\'.',
        ),
        ('[{"text": "a"}]\n{}', 'd.jsonl:2:1: a JSON file holds one list; more follows it. Near: \'[{"text": "a"}]\\n{}\'.'),
    ],
)
def test_damaged_json(tmp_path: Path, content: str, expected: str) -> None:
    assert errors_of(written(tmp_path, content))[-1:] == [expected]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "".join(f"{LINE}\nbad\n" for _ in range(30)).replace("bad", "{bad", 30))
    problems = errors_of(path)
    assert len(problems) == 30
    assert problems[1].startswith("d.jsonl:4:2: not valid JSON: Expecting property name enclosed in double quotes.")
    with pytest.raises(DataError) as caught:
        load_examples(str(path), Renderer(tiny_tokenizer(), max_length=50))
    message = str(caught.value)
    assert message.startswith(f"{path} has 30 problems:\n  - {path}:2:2: not valid JSON")
    assert message.endswith("\n  ... and 10 more")
    assert len(message.splitlines()) == 22
    assert caught.value.exit_code == 4


def test_a_pretty_printed_object_is_told_what_json_files_are(tmp_path: Path) -> None:
    problems = errors_of(written(tmp_path, json.dumps({"data": [ROW]}, indent=2), "d.json"))
    assert problems[0].endswith("A JSON file that is not one object a line must be one list of objects.")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            f'{LINE}\n{{"text": "caf\u00e9"}}\n'.encode("latin-1"),
            "d.jsonl:2: the file must be UTF-8; byte 0xe9 at offset 48 is not, and looks like Latin-1 (Windows-1252). "
            "Convert it: iconv -f WINDOWS-1252 -t UTF-8.",
        ),
        (
            b"\xef\xbb\xbf" + '[\n{"text": "caf\u00e9"}]'.encode("latin-1"),
            "d.jsonl:2: the file must be UTF-8; byte 0xe9 at offset 18 is not, and looks like Latin-1 (Windows-1252). "
            "Convert it: iconv -f WINDOWS-1252 -t UTF-8.",
        ),
        (
            f"{LINE}\n".encode("utf-16"),
            "d.jsonl:1: the file must be UTF-8; at byte offset 0 it looks like UTF-16. Convert it: iconv -f UTF-16 -t UTF-8.",
        ),
        (
            f"{LINE}\n".encode("utf-16-le"),
            "d.jsonl:1: the file must be UTF-8; at byte offset 1 it looks like UTF-16. Convert it: iconv -f UTF-16 -t UTF-8.",
        ),
        (
            f"{LINE}\n".encode("utf-32"),
            "d.jsonl:1: the file must be UTF-8; at byte offset 0 it looks like UTF-32. Convert it: iconv -f UTF-32 -t UTF-8.",
        ),
    ],
)
def test_other_encodings_are_named_with_the_byte(tmp_path: Path, content: bytes, expected: str) -> None:
    assert errors_of(written(tmp_path, content)) == [expected]


def test_csv(tmp_path: Path) -> None:
    content = '\ufeffprompt,completion,id\r\n"a, ""b""\nc",d,1\r\n\r\ne,f,2\r\n'
    path = written(tmp_path, content, "d.csv")
    assert rows_of(path) == [
        {"prompt": 'a, "b"\nc', "completion": "d", "id": "1"},
        {"prompt": "e", "completion": "f", "id": "2"},
    ]
    places = [where.removeprefix(f"{path}: ") for where, _ in read_rows(open_source(str(path)), Problems())]
    assert places == ["row 1 (line 2)", "row 2 (line 5)"]
    assert rows_of(written(tmp_path, "prompt\tcompletion\na,b\tc\n", "d.tsv")) == [{"prompt": "a,b", "completion": "c"}]
    assert len(rows_of(written(tmp_path, f"text\n{'x' * 300_000}\n", "long.csv"))[0]["text"]) == 300_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "prompt;completion\na;b\n",
            "d.csv: row 0 (line 1): fields must be separated by commas; the header has semicolons. "
            "Save the file with commas, or as JSONL.",
        ),
        (
            "question,reply\na,b\n",
            "d.csv: row 0 (line 1): the first row must name the columns, among them prompt and completion, "
            "instruction and output, or text; got 'question, reply'.",
        ),
        (
            "prompt,completion\na,b\nc,d,e\n",
            "d.csv: row 2 (line 3): a row must have the 2 fields of the header; got 3. "
            "A field that holds the delimiter or a line break must be in double quotes.",
        ),
        ("prompt,completion\nabc\n", "d.csv: row 1 (line 2): a row must have the 2 fields of the header; got 1."),
        (
            'prompt,completion\na,b\n"c,d\ne,f\n',
            "d.csv: row 2 (line 3): not valid CSV: unexpected end of data. "
            "Check for a quote that is not closed; a quote inside a field is doubled.",
        ),
        ("text,text\na,b\n", "d.csv: row 0 (line 1): a column name may stand once; 'text' stands 2 times."),
    ],
)
def test_damaged_csv(tmp_path: Path, content: str, expected: str) -> None:
    assert errors_of(written(tmp_path, content, "d.csv")) == [expected]


@pytest.mark.parametrize("first", ["\n", "\ufeff\r\n  \n", ",,\n"])
def test_csv_may_begin_with_blank_lines(tmp_path: Path, first: str) -> None:
    path = written(tmp_path, first + "prompt,completion\na,b\n", "d.csv")
    assert rows_of(path) == [{"prompt": "a", "completion": "b"}]
    line = first.count("\n") + 1
    assert [where for where, _ in read_rows(open_source(str(path)), Problems())] == [f"{path}: row 1 (line {line + 1})"]
    (problem,) = errors_of(written(tmp_path, first + "question,reply\n", "d.csv"))
    assert problem.startswith(f"d.csv: row 0 (line {line}): the first row must name the columns")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    rows = [
        {"messages": [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": None}]}
    ] * 100
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert rows_of(path) == rows
    assert rows_of(path.rename(tmp_path / "renamed.bin")) == rows
    dataset = load_examples(str(tmp_path / "renamed.bin"), Renderer(tiny_tokenizer(), max_length=50))
    assert (len(dataset.examples), dataset.manifest["form"], dataset.manifest["notes"]) == (100, "messages", [])
    assert dataset.examples[2].where == f"{tmp_path / 'renamed.bin'}: row 3"


def test_parquet_with_a_date_that_python_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    table = pyarrow.table({"text": ["a"], "day": pyarrow.array([10**13], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(table, path)
    (problem,) = errors_of(path)
    assert problem.startswith("d.parquet: after row 0: the file must be a whole Parquet file; date value out of range.")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * 1000), path)
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:100], b"PAR1", b"not parquet at all", whole[:4] + bytes(200) + whole[204:]):
        (problem,) = errors_of(written(tmp_path, damaged, "d.parquet"))
        assert re.match(
            r"d\.parquet: after row \d+: the file must be a whole Parquet file; .+\. Write or download it again\.$", problem
        )


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("", "d.jsonl", "d.jsonl: the file is empty. Give a file with at least one row."),
        (" \n\n", "d.jsonl", "d.jsonl: the file holds only white space. Give a file with at least one row."),
        (
            b"\x1f\x8b\x08\x00rest",
            "d.jsonl.gz",
            "data must be JSONL, JSON, CSV or Parquet; d.jsonl.gz is packed with gzip. Unpack it first.",
        ),
        (
            "Once upon a time\n",
            "d.txt",
            "data must be JSONL, JSON, CSV or Parquet; d.txt is none of these. "
            'Plain text goes into rows such as {"text": "..."}.',
        ),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, content: str | bytes, name: str, expected: str) -> None:
    assert errors_of(written(tmp_path, content, name)) == [expected]


def test_files_without_rows(tmp_path: Path) -> None:
    renderer = Renderer(tiny_tokenizer(), max_length=50)
    for content, name in (("[]", "d.json"), ("prompt,completion\n", "d.csv")):
        path = written(tmp_path, content, name)
        with pytest.raises(
            DataError, match="^" + re.escape(f"{path}: the file holds no rows. Give a file with at least one.") + "$"
        ):
            load_examples(str(path), renderer)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^data must be one file; {tmp_path} is a folder\\. Give the file inside it\\.$"):
        open_source(str(tmp_path))
    missing = str(tmp_path / "no.jsonl")
    expected = f"the data must be a file or a data set of the hub; there is no file {missing}. Check the path."
    with pytest.raises(DataError, match="^" + re.escape(expected) + "$"):
        open_source(missing)
    expected = (
        "--offline opens no connection, and some/name is no file here. Check the path, or download the data set as a file."
    )
    with pytest.raises(DataError, match="^" + re.escape(expected) + "$"):
        open_source("some/name", offline=True)


def test_a_hub_name_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    source = open_source("some/name")
    expected = (
        "'some/name' is no file here, and data sets of the hub need the `hub` extra. "
        "Check the path, or pip install 'luthier[hub]'."
    )
    with pytest.raises(DataError, match="^" + re.escape(expected) + "$"):
        list(read_rows(source, Problems()))


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict]:
            if name == "some/missing":
                raise FileNotFoundError("no such data set")
            return [{"text": f"{name} {split} {number}"} for number in range(2)]

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    assert list(read_rows(open_source("some/name:test"), Problems())) == [
        ("some/name:test: row 1", {"text": "some/name test 0"}),
        ("some/name:test: row 2", {"text": "some/name test 1"}),
    ]
    dataset = load_examples("some/name", Renderer(tiny_tokenizer(), max_length=50))
    assert len(dataset.manifest["sha256"]) == 64
    expected = (
        "'some/missing' is no file here and could not be loaded from the hub: no such data set. Check the name or the path."
    )
    with pytest.raises(DataError, match="^" + re.escape(expected) + "$"):
        list(read_rows(open_source("some/missing"), Problems()))


def test_a_hub_data_set_is_walked_no_more_often_than_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    walks = []

    class Rows(list):
        def __iter__(self) -> Iterator[dict]:
            walks.append(1)
            return super().__iter__()

    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> Rows:
            return Rows({"text": f"{name} {split} {number}"} for number in range(3))

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)

    def load(cache: RowCache | None) -> tuple[int, Dataset]:
        walks.clear()
        dataset = load_examples("some/name", Renderer(tiny_tokenizer(), max_length=50), cache=cache)
        return len(walks), dataset

    # Rendered as it is hashed; hashed for the cache's key, then rendered; hashed alone.
    found = [load(None), load(RowCache([].append)), load(RowCache([].append))]
    assert [(count, dataset.manifest["cache"]) for count, dataset in found] == [(1, "off"), (2, "made"), (1, "used")]
    assert len({dataset.manifest["sha256"] for _, dataset in found}) == 1


@pytest.mark.parametrize("split", ["train[:10%]", "train[10:20]+test[-5%:]"])
def test_a_hub_split_may_be_a_slice(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict]:
            asked.append((name, split))
            return []

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    assert list(read_rows(open_source(f"some/name:{split}"), Problems())) == []
    assert asked == [("some/name", split)]


def test_a_list_on_one_long_line_is_no_row_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.lines.MAX_ROW_BYTES", 2**10)
    path = written(tmp_path, " " * 3000 + json.dumps([ROW] * 100), "d.json")
    assert open_source(str(path)).kind == "json"
    assert rows_of(path) == [ROW] * 100


def test_a_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.lines.MAX_ROW_BYTES", 2**20)
    (problem,) = errors_of(written(tmp_path, '{"text": "' + "x" * 2**20 + '"}'))
    assert (
        problem
        == "d.jsonl:1: a row holds at most 1 MB; this one is longer. Split it, or check that rows end with a line break."
    )
