"""The texts of a compression: what it is calibrated on, what choices are made by, and what the result is measured on.

No window of tokens is in two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.compression.settings import CompressSettings
from luthier.data import Renderer, load_examples
from luthier.data.packing import Pack
from luthier.errors import DataError
from luthier.generation.generator import Generator
from luthier.generation.sampling import Sampling
from luthier.progress import Progress

PLAIN_SUFFIXES = (".txt", ".raw", ".md")
MAX_TEXT_BYTES = 64 << 20
VALIDATION_SHARE, EVALUATION_SHARE = 6, 5  # one window in so many
LEAST_WINDOWS = 4


@dataclass(frozen=True)
class Texts:
    """Packs of one window each. calibration: what layers are fitted to; validation: what decides between ways to compress;
    evaluation: what is reported; healing: what is left of the calibration text, for training. origin: where they come from, in
    words."""

    calibration: list[Pack]
    validation: list[Pack]
    evaluation: list[Pack]
    origin: str
    notes: list[str] = field(default_factory=list)
    healing: list[Pack] = field(default_factory=list)

    @property
    def calibration_tokens(self) -> int:
        return sum(pack.tokens for pack in self.calibration)


@dataclass(frozen=True)
class _Window:
    """ids: (T,); predict: the positions whose next token is supervised."""

    ids: Tensor
    predict: Tensor

    def pack(self) -> Pack:
        return Pack.of_texts(self.ids, torch.tensor([0, len(self.ids)]), self.predict)


def read_texts(
    settings: CompressSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Texts:
    """The texts that the settings name, cut into windows.

    Without data the model writes its own: sampled from its beginning token at temperature 1 (LLM-QAT, arXiv:2305.17888), which
    says how near the result stays to the model, and nothing of how good either is at a task.
    Raises DataError for files that cannot be read, or texts too short to be divided.
    """
    wanted = settings.windows + settings.windows // VALIDATION_SHARE
    notes: list[str] = []
    if settings.data is None:
        extra = 0 if settings.eval_data else settings.eval_windows
        windows = _own_windows(model, tokenizer, wanted + extra, settings.window, settings.seed, progress)
        origin = "text that the model wrote itself"
        notes.append(
            "No --data: calibrated on text that the model wrote itself. With text of the kind it will be used for, the result "
            "is better where it counts."
        )
    else:
        windows = _file_windows(settings.data, tokenizer, settings, notes, settings.eval_data)
        origin = Path(settings.data).name
    if settings.eval_data is not None:
        evaluation = _file_windows(settings.eval_data, tokenizer, settings, notes)[: settings.eval_windows]
        before = len(windows)
        windows = _without(windows, evaluation)
        if len(windows) < before:
            notes.append(f"{before - len(windows)} windows of the calibration text are in --eval-data too and were left out.")
    else:
        windows, evaluation = _kept_out(windows, EVALUATION_SHARE, settings.eval_windows)
        notes.append(f"Measured on {len(evaluation)} windows of the same text that were kept out of calibration.")
    every, windows = windows, _spread(windows, wanted)
    rest = _without(every, [*windows, *evaluation])
    calibration, validation = _kept_out(windows, VALIDATION_SHARE, len(windows))
    if len(windows) < LEAST_WINDOWS or not validation or not evaluation:
        raise DataError(
            f"compression needs at least {LEAST_WINDOWS} windows of {settings.window} tokens beside those it is measured on; "
            f"got {len(windows)}. Give more --data."
        )
    return Texts(
        [one.pack() for one in calibration],
        [one.pack() for one in validation],
        [one.pack() for one in evaluation],
        origin,
        notes,
        [one.pack() for one in rest],
    )


def _file_windows(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: CompressSettings,
    notes: list[str],
    without_rows_of: str | None = None,
) -> list[_Window]:
    """Plain text cut into windows; rows of any other form rendered as for training, several to a window.

    without_rows_of: another file whose rows are left out, with a note.
    """
    if _is_plain(path):
        return _text_windows(_read_plain(path), tokenizer, settings.window)
    rows = _rows(path, tokenizer, settings)
    if without_rows_of is not None and not _is_plain(without_rows_of):
        taken = {tuple(row) for row in _rows(without_rows_of, tokenizer, settings)}
        kept = [row for row in rows if tuple(row) not in taken]
        if len(kept) < len(rows):
            notes.append(f"{len(rows) - len(kept)} rows of --data are in --eval-data too and were left out of calibration.")
        rows = kept
    windows, ids = [], list[int]()
    for row in rows:
        if ids and len(ids) + len(row) > settings.window:
            windows.append(_whole(torch.tensor(ids)))
            ids = []
        ids += row
    if len(ids) > 1:
        windows.append(_whole(torch.tensor(ids)))
    return windows


def _is_plain(path: str) -> bool:
    return Path(path).suffix.lower() in PLAIN_SUFFIXES


def _rows(path: str, tokenizer: PreTrainedTokenizerBase, settings: CompressSettings) -> list[list[int]]:
    renderer = Renderer(tokenizer, max_length=settings.window, loss_on="all")
    examples = load_examples(path, renderer, on_long="truncate", offline=settings.offline).examples
    return [list(example.ids) for example in examples]


def _read_plain(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_TEXT_BYTES)
        return content.decode("utf-8", errors="strict" if len(content) < MAX_TEXT_BYTES else "ignore")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a text file must be readable UTF-8; {path}: {error}.") from error


def _text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[_Window]:
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)
    return [_whole(window) for window in ids.split(length) if len(window) == length or len(window) == len(ids) > 1]


def _own_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int, progress: Progress | None
) -> list[_Window]:
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise DataError("a model without a beginning token cannot write its own calibration text. Give --data.")
    done = 0

    def ended(_number: int, _answer: list[int]) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("writing calibration text", done, count)

    sampling = Sampling(temperature=1.0, seed=seed)
    answers = Generator(model).generate([[begin]] * count, length - 1, sampling=sampling, done=ended)
    return [_whole(torch.tensor([begin, *answer])) for answer in answers if len(answer) > 1]


def _whole(ids: Tensor) -> _Window:
    return _Window(ids, torch.arange(len(ids) - 1))


def _without(windows: Sequence[_Window], others: Sequence[_Window]) -> list[_Window]:
    taken = {tuple(window.ids.tolist()) for window in others}
    return [window for window in windows if tuple(window.ids.tolist()) not in taken]


def _kept_out(windows: Sequence[_Window], every: int, most: int) -> tuple[list[_Window], list[_Window]]:
    """(the rest, one window in `every`, at most `most` of them), evenly spread."""
    chosen = set(range(every - 1, len(windows), every))
    chosen = set(sorted(chosen)[:: max(1, -(-len(chosen) // most))]) if chosen else chosen
    rest = [window for number, window in enumerate(windows) if number not in chosen]
    return rest, [windows[number] for number in sorted(chosen)]


def _spread(windows: Sequence[_Window], count: int) -> list[_Window]:
    """`count` of the windows, evenly spread, or all."""
    if len(windows) <= count:
        return list(windows)
    return [windows[number * len(windows) // count] for number in range(count)]
