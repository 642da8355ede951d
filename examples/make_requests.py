"""Write examples/requests/{train,valid,other}.jsonl: everyday requests and the JSON a device would act on.

    python examples/make_requests.py [--out DIR]

The same files every time. Training and held-out rows share no phrasing and no name, number, place or text; only the
few fixed values of requests_pools.CATEGORIES stand in both. `other.jsonl` is short plain questions, to see what
training does to everything else.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from requests_pools import CAPITALS, CATEGORIES, KEYS, OPPOSITES, ORDER, POOLS, TEMPLATES, UNITS

SYSTEM = "Turn the request into JSON."
TRAIN_ROWS, VALID_ROWS, OTHER_ROWS = 1000, 200, 100
TRAIN, HELD_OUT = 0, 1


def make_values(slots: list[str], side: int, random_: random.Random) -> dict[str, str]:
    """A value for every slot, from the pools of `side`; the two units of a conversion measure the same thing."""
    values = {slot: random_.choice(CATEGORIES.get(slot) or POOLS[slot][side]) for slot in slots if not slot.startswith("unit")}
    if "unit" in slots:
        pair = list(random_.choice(UNITS))
        random_.shuffle(pair)
        values |= {"unit": pair[0], "unit2": pair[1]}
    return values


def make_request(intent: str, side: int, random_: random.Random) -> tuple[str, str]:
    """One request and its answer."""
    template = random_.choice(TEMPLATES[intent][side])
    values = make_values(re.findall(r"\{(\w+)\}", template), side, random_)
    if "on {day}" in template:
        values["day"] = random_.choice([day for day in CATEGORIES["day"] if day not in ("today", "tomorrow")])
    answer = {"intent": intent} | {KEYS.get(slot, slot): values[slot] for slot in ORDER[intent] if slot in values}
    return template.format(**values), json.dumps(answer)


def make_rows(count: int, side: int, random_: random.Random) -> Iterator[dict]:
    """`count` different requests, the intents in equal shares and shuffled."""
    seen: set[str] = set()
    intents = [intent for _ in range(count // len(TEMPLATES) + 1) for intent in TEMPLATES][:count]
    random_.shuffle(intents)
    for intent in intents:
        request, answer = make_request(intent, side, random_)
        while request in seen:
            request, answer = make_request(intent, side, random_)
        seen.add(request)
        yield dialogue(request, answer, SYSTEM)


def make_questions(count: int, random_: random.Random) -> Iterator[dict]:
    """`count` short questions with one right answer in plain words."""
    questions = [
        (f"What is the capital of {country}?", f"The capital of {country} is {city}.") for country, city in CAPITALS.items()
    ]
    questions += [
        (f'What is the opposite of "{word}"?', f'The opposite of "{word}" is "{other}".') for word, other in OPPOSITES.items()
    ]
    sums = [(a, b) for a in range(2, 12) for b in range(2, 12)]
    random_.shuffle(sums)
    questions += [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a, b in sums[: count - len(questions)]]
    random_.shuffle(questions)
    for question, answer in questions[:count]:
        yield dialogue(question, answer)


def dialogue(user: str, assistant: str, system: str | None = None) -> dict:
    """A row of the `messages` form."""
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def write_all(folder: Path) -> None:
    """Write the three files into `folder`, each from a seed of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train.jsonl": make_rows(TRAIN_ROWS, TRAIN, random.Random(1)),
        "valid.jsonl": make_rows(VALID_ROWS, HELD_OUT, random.Random(2)),
        "other.jsonl": make_questions(OTHER_ROWS, random.Random(3)),
    }
    for name, rows in files.items():
        with (folder / name).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "requests")
    write_all(parser.parse_args().out)
