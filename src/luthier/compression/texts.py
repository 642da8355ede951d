"""The texts of a compression: what it is calibrated on, what choices are made by, and what the result is measured on.

None of the three holds a part of another (overlap.py), whatever files they come from. Within one plain text they are stretches
of it one after another, with a window between them left out; of rows each goes whole to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.compression.overlap import RUN, holding_parts
from luthier.compression.reading import Read, read_file
from luthier.compression.settings import CompressSettings
from luthier.compression.tasks import TASK_ROWS, Task, task_of
from luthier.data import Example
from luthier.data.packing import Pack
from luthier.errors import DataError
from luthier.generation.generator import Generator
from luthier.generation.sampling import Sampling
from luthier.progress import Progress
from luthier.units import count_text

VALIDATION_SHARE, EVALUATION_SHARE = 6, 5  # one window in so many
LEAST_WINDOWS = 4
# How much is read of a long file, so that windows may be spread over it: so many times what is calibrated on.
READ_TIMES = 16


@dataclass(frozen=True)
class Texts:
    """Packs of one window each. calibration: what layers are fitted to; validation: what decides between ways to compress;
    evaluation: what is reported; healing: what is left of the calibration text, for training. origin, measured_on: where they
    come from, in words. task: rows with answers, or None."""

    calibration: list[Pack]
    validation: list[Pack]
    evaluation: list[Pack]
    origin: str
    measured_on: str = ""
    task: Task | None = None
    notes: list[str] = field(default_factory=list)
    healing: list[Pack] = field(default_factory=list)

    @property
    def calibration_tokens(self) -> int:
        return sum(pack.tokens for pack in self.calibration)


@dataclass(frozen=True)
class _Window:
    """ids: at least two tokens; rows: those that it is made of, none for plain text."""

    ids: list[int]
    rows: tuple[Example, ...] = ()

    def pack(self) -> Pack:
        ids: Tensor = torch.tensor(self.ids, dtype=torch.int64)
        return Pack.of_texts(ids, torch.tensor([0, len(ids)]), torch.arange(len(ids) - 1))


@dataclass(frozen=True)
class _Source:
    """Windows of one origin. in_order: each continues the one before it."""

    name: str
    windows: list[_Window]
    in_order: bool


@dataclass(frozen=True)
class _Measured:
    """windows: what is reported on; where: they come from, in words; path: their file; rows: those that can be a task;
    in_order: each window continues the one before it."""

    windows: list[_Window]
    where: str
    path: str
    rows: list[Example]
    in_order: bool

    @property
    def texts(self) -> list[list[int]]:
        """No part of these may be calibrated on."""
        return [*_texts_of(self.windows, self.in_order), *(one.ids for one in self.windows)]


def read_texts(
    settings: CompressSettings,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress | None = None,
) -> Texts:
    """The texts that the settings name, cut into windows.

    Without data the model writes its own: sampled from its beginning token at temperature 1 (LLM-QAT, arXiv:2305.17888), which
    says how near the result stays to the model, and nothing of how good either is at a task. model: None where there is data.
    Raises DataError for files that cannot be read, or texts too short to be divided.
    """
    wanted = settings.windows + settings.windows // VALIDATION_SHARE
    notes: list[str] = []
    source = _calibration_source(settings, model, tokenizer, wanted, notes, progress)
    if settings.eval_data is not None:
        measured = _read_measured(settings, settings.eval_data, tokenizer, notes)
    else:
        source, measured = _kept_out(settings, source)
    rows, path = measured.rows, measured.path
    task, asked = task_of(path, rows, tokenizer, settings.window, offline=settings.offline) if rows else (None, [])
    source = _without(source, [*measured.texts, *(row.ids for row in asked)], settings.window, measured.where, notes)
    calibration, validation, left = _divided(source, wanted)
    _check(len(calibration) + len(validation), bool(calibration and validation and measured.windows), settings)
    return Texts(
        [one.pack() for one in calibration],
        [one.pack() for one in validation],
        [one.pack() for one in measured.windows],
        source.name,
        measured.where,
        task,
        [*notes, *([task.note] if task else [])],
        [one.pack() for one in left],
    )


def _read_measured(settings: CompressSettings, path: str, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> _Measured:
    """The first windows of a file of their own; a task may take rows that stand behind them too."""
    tokens = settings.eval_windows * settings.window
    read = read_file(path, tokenizer, window=settings.window, enough=tokens, rows=TASK_ROWS, offline=settings.offline)
    notes += read.notes
    windows = _windows(read, settings.window)
    rows = [row for window in windows for row in window.rows]
    return _Measured(windows[: settings.eval_windows], read.name, path, rows, read.is_plain)


def _kept_out(settings: CompressSettings, source: _Source) -> tuple[_Source, _Measured]:
    """What is left of the calibration text, and a part of it to measure on."""
    left, windows = _parted(source, EVALUATION_SHARE, settings.eval_windows)
    rows = [row for window in windows for row in window.rows]
    where = f"a part of {source.name} that was kept out of calibration"
    return _Source(source.name, left, source.in_order), _Measured(windows, where, settings.data or "", rows, source.in_order)


def _calibration_source(
    settings: CompressSettings,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    notes: list[str],
    progress: Progress | None,
) -> _Source:
    count = wanted + (0 if settings.eval_data else settings.eval_windows)
    if settings.data is None:
        assert model is not None
        notes.append(
            "No --data: calibrated on text that the model wrote itself. With text of the kind it will be used for, the result "
            "is better where it counts."
        )
        windows = _own_windows(model, tokenizer, count, settings.window, settings.seed, progress)
        return _Source("text that the model wrote itself", windows, False)
    enough = READ_TIMES * count * settings.window
    read = read_file(settings.data, tokenizer, window=settings.window, enough=enough, offline=settings.offline)
    notes += read.notes
    return _Source(read.name, _windows(read, settings.window), read.is_plain)


def _windows(read: Read, length: int) -> list[_Window]:
    """Plain text cut into windows; whole rows, several to a window."""
    if not read.is_plain:
        return _filled(read.examples, length)
    (ids,) = read.texts
    cut = [ids[first : first + length] for first in range(0, len(ids), length)]
    return [_Window(one) for one in cut if len(one) == length or len(one) == len(ids) > 1]


def _filled(rows: Sequence[Example], length: int) -> list[_Window]:
    groups: list[list[Example]] = []
    tokens = length
    for row in rows:
        if tokens + len(row.ids) > length:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += len(row.ids)
    windows = [_Window([token for row in group for token in row.ids], tuple(group)) for group in groups]
    return [window for window in windows if len(window.ids) > 1]


def _without(source: _Source, held: list[list[int]], length: int, where: str, notes: list[str]) -> _Source:
    """The source without the rows, or of other texts the windows, that hold a part of `held`; a note counts them."""
    rows = [row for window in source.windows for row in window.rows]
    texts = [row.ids for row in rows] if rows else [window.ids for window in source.windows]
    taken = holding_parts(texts, held)
    if not rows:  # a window that is one of them whole, or through whose edge a part of them runs
        taken |= holding_parts(_with_neighbours(source), held)
    if not taken.any():
        return source
    what = "rows" if rows else "windows"
    notes.append(
        f"{count_text(int(taken.sum()))} of {count_text(len(texts))} {what} of {source.name} hold text that is in {where} too "
        "and were left out of calibration."
    )
    if rows:
        kept = [row for row, is_taken in zip(rows, taken, strict=True) if not is_taken]
        return _Source(source.name, _filled(kept, length), False)
    windows = [window for window, is_taken in zip(source.windows, taken, strict=True) if not is_taken]
    return _Source(source.name, windows, source.in_order)


def _texts_of(windows: Sequence[_Window], goes_on: bool) -> list[list[int]]:
    """The texts of windows as they were before they were cut or put together: rows, or one that goes on."""
    if goes_on:
        return [[token for window in windows for token in window.ids]]
    return [ids for window in windows for ids in ([row.ids for row in window.rows] or [window.ids])]


def _with_neighbours(source: _Source) -> list[list[int]]:
    """Each window's tokens; of a text that goes on with those around it that a run through its edge can have."""
    ids, around = [window.ids for window in source.windows], RUN - 1
    if not source.in_order:
        return ids
    before, after = [[], *ids][: len(ids)], [*ids, []][1:]
    return [[*one[-around:], *own, *other[:around]] for one, own, other in zip(before, ids, after, strict=True)]


def _divided(source: _Source, wanted: int) -> tuple[list[_Window], list[_Window], list[_Window]]:
    """(calibration, validation, the rest): the first two out of `wanted` windows, spread over the source; only validation holds
    a part of itself."""
    spread = _spread(source.windows, wanted)
    chosen = {id(one) for one in spread}
    few = _Source(source.name, spread, source.in_order and len(spread) == len(source.windows))
    calibration, validation = _parted(few, VALIDATION_SHARE, len(spread))
    texts = [*_texts_of(validation, few.in_order), *(one.ids for one in validation)]
    taken = holding_parts([one.ids for one in calibration], texts)
    taken |= holding_parts(_with_neighbours(_Source(source.name, calibration, few.in_order)), texts)
    around = holding_parts(_with_neighbours(source), texts) | holding_parts([one.ids for one in source.windows], texts)
    rest = [one for one, held in zip(source.windows, around, strict=True) if not held and id(one) not in chosen]
    return [one for one, held in zip(calibration, taken, strict=True) if not held], validation, rest


def _parted(source: _Source, every: int, most: int) -> tuple[list[_Window], list[_Window]]:
    """(the rest, one window in `every`, at most `most` of them): the end of a text that goes on, without the window before it;
    else evenly spread."""
    windows = source.windows
    if source.in_order:
        count = min(most, len(windows) // every)
        return windows[: max(0, len(windows) - count - 1)], windows[len(windows) - count :]
    chosen = set(range(every - 1, len(windows), every))
    chosen = set(sorted(chosen)[:: max(1, -(-len(chosen) // most))]) if chosen else chosen
    rest = [window for number, window in enumerate(windows) if number not in chosen]
    return rest, [windows[number] for number in sorted(chosen)]


def _spread(windows: Sequence[_Window], count: int) -> list[_Window]:
    """`count` of the windows, evenly spread, or all."""
    if len(windows) <= count:
        return list(windows)
    return [windows[number * len(windows) // count] for number in range(count)]


def _check(left: int, is_divided: bool, settings: CompressSettings) -> None:
    if left < LEAST_WINDOWS or not is_divided:
        raise DataError(
            f"compression needs at least {LEAST_WINDOWS} windows of {settings.window} tokens beside those it is measured on; "
            f"got {left}. Give more --data, or --eval-data that is none of it."
        )


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
    different = dict.fromkeys((begin, *answer) for answer in answers if answer)
    return [_Window(list(ids)) for ids in different]
