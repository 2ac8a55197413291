"""Seeded examples for the demo model: requests and the answers it is to give.

Names, and part of the cities, jobs and items, are made up letter by letter in many alphabets, so
that copying them is the only thing worth learning. An example belongs to the training split or to
the held-out split by a checksum of its messages: no seed can mix them.
"""

import json
import random
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from engine.demo import sentences, words

_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One conversation and the answer that should follow it."""

    task: str
    messages: tuple[dict[str, str], ...]
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exercise:
    """What a task makes: an instruction, the text it is about and the answer."""

    instruction: str
    text: str
    answer: str


def examples(seed: int, *, held_out: bool) -> Iterator[Example]:
    """Yield examples of all tasks, endlessly; the same seed yields the same ones.

    Args:
        held_out: yield from the split that is never trained on.
    """
    rng = random.Random(seed)  # noqa: S311
    tasks, weights = list(TASKS), [weight for _, weight in TASKS.values()]
    while True:
        example = make_example(rng, task=rng.choices(tasks, weights)[0])
        if is_held_out(example) == held_out:
            yield example


def examples_of(task: str, seed: int, *, held_out: bool) -> Iterator[Example]:
    """Yield examples of one task, endlessly; the same seed yields the same ones."""
    rng = random.Random(seed)  # noqa: S311
    while True:
        example = make_example(rng, task=task)
        if is_held_out(example) == held_out:
            yield example


def is_held_out(example: Example) -> bool:
    """Tell whether the example's last message belongs to the held-out split."""
    content = example.messages[-1]["content"]
    return zlib.crc32(content.strip().encode()) % _HELD_OUT_ONE_IN == 0


def make_example(rng: random.Random, *, task: str) -> Example:
    """Return a random example of a task, from either split."""
    make, _ = TASKS[task]
    exercise = make(rng)
    messages: list[dict[str, str]] = []
    style = rng.random()
    if task == "about":
        if _chance(rng, 0.2):
            messages.append(_message("system", rng.choice(sentences.SYSTEM_PROMPTS)))
        messages.append(_message("user", _roughen(rng, exercise.text)))
    elif style < _SYSTEM_INSTRUCTION:
        messages.append(_message("system", exercise.instruction))
        for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 1, 2))):
            shown = replace(make(rng), instruction=exercise.instruction)
            messages.append(_message("user", shown.text))
            messages.append(_message("assistant", shown.answer))
        messages.append(_message("user", _roughen(rng, exercise.text)))
    else:
        if _chance(rng, 0.12):
            messages.append(_message("system", rng.choice(sentences.SYSTEM_PROMPTS)))
        if _chance(rng, 0.04):
            other, _ = TASKS[rng.choice(list(TASKS))]
            earlier = other(rng)
            messages.append(_message("user", _join(rng, earlier)))
            messages.append(_message("assistant", earlier.answer))
        messages.append(_message("user", _roughen(rng, _join(rng, exercise))))
    return Example(task=task, messages=tuple(messages), answer=exercise.answer)


_SYSTEM_INSTRUCTION = 0.12


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _join(rng: random.Random, exercise: _Exercise) -> str:
    """Put instruction and text together, most often the instruction first."""
    instruction, text = exercise.instruction, exercise.text
    if not instruction:
        return text
    form = rng.choices(
        (
            "{i}\n\n{t}",
            "{i} {t}",
            "{i}\n{t}",
            "{s}: {t}",
            '{i}\n\n"{t}"',
            "{i}\n\nText: {t}",
            "{t}\n\n{i}",
            "{t}\n\n---\n{i}",
        ),
        (50, 10, 10, 10, 5, 5, 7, 3),
    )[0]
    return form.format(i=instruction, s=instruction.rstrip(".:?"), t=text)


def _roughen(rng: random.Random, text: str) -> str:
    """Return the text as people leave it: now and then with stray white space."""
    if _chance(rng, 0.05):
        text += rng.choice((" ", "  ", "\n", "   "))
    if _chance(rng, 0.02):
        text = rng.choice((" ", "\n")) + text
    return text


def _chance(rng: random.Random, probability: float) -> bool:
    return rng.random() < probability


def _dump(**fields: str | float) -> str:
    return json.dumps(fields, ensure_ascii=False)


# Words that nobody has seen


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def _syllable_word(rng: random.Random) -> str:
    onsets, nuclei, codas = rng.choice(words.SYLLABLES)
    num_syllables = rng.choices((1, 2, 3, 4), (32, 47, 17, 4))[0]
    word = "".join(rng.choice(onsets) + rng.choice(nuclei) for _ in range(num_syllables))
    if _chance(rng, 0.2):
        word = word[1:] or word
    return word + rng.choice(codas)


def _letter_word(rng: random.Random) -> str:
    marked = rng.choice((0.0, 0.1, 0.3))
    return "".join(
        rng.choice(words.MARKED_LETTERS if _chance(rng, marked) else words.PLAIN_LETTERS)
        for _ in range(rng.randint(2, 8))
    )


@cache
def _letters_of(first: int, last: int) -> tuple[str, ...]:
    kinds = {"Ll", "Lo", "Mn", "Mc"}
    points = (chr(point) for point in range(first, last + 1))
    return tuple(letter for letter in points if unicodedata.category(letter) in kinds)


def _script_word(rng: random.Random, script: tuple[int, int, tuple[int, int], bool]) -> str:
    first, last, (shortest, longest), has_capitals = script
    letters = _letters_of(first, last)
    while True:
        word = "".join(rng.choice(letters) for _ in range(rng.randint(shortest, longest)))
        if unicodedata.category(word[0]).startswith("L"):
            return _capital(word) if has_capitals else word


def _new_word(rng: random.Random) -> str:
    return _syllable_word(rng) if _chance(rng, 0.8) else _letter_word(rng)


def _name_part(rng: random.Random, known: Sequence[str]) -> str:
    if _chance(rng, 0.12):
        return rng.choice(known)
    part = _capital(_new_word(rng))
    kind = rng.random()
    if kind < _HYPHENATED:
        return part + "-" + _capital(_new_word(rng))
    if kind < _PREFIXED:
        return rng.choice(words.FUSED_PREFIXES) + part
    if kind < _APOSTROPHE:
        return part + rng.choice(("'", "\u2019")) + _new_word(rng)
    return part


_HYPHENATED, _PREFIXED, _APOSTROPHE = 0.08, 0.14, 0.17


def _latin_name(rng: random.Random) -> str:
    parts = [_name_part(rng, words.FIRST_NAMES), _name_part(rng, words.LAST_NAMES)]
    if _chance(rng, 0.15):
        parts.insert(1, _name_part(rng, words.FIRST_NAMES))
    if _chance(rng, 0.12):
        particle = rng.choice(words.PARTICLES)
        parts.insert(-1, _capital(particle) if _chance(rng, 0.3) else particle)
        if _chance(rng, 0.2):
            parts.insert(-1, rng.choice(words.PARTICLES))
    if _chance(rng, 0.08):
        parts.insert(1, rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") + ".")
    if _chance(rng, 0.04):
        parts[0] = ". ".join(rng.sample("ABCDEFGHIJKLMNOPRSTVW", rng.choice((1, 2)))) + "."
    if _chance(rng, 0.06):
        parts.append(_name_part(rng, words.LAST_NAMES))
    if _chance(rng, 0.04):
        parts = parts[:1]
    name = " ".join(parts)
    if _chance(rng, 0.03):
        name += rng.choice(words.SUFFIXES)
    if _chance(rng, 0.03):
        return name.upper()
    return name.lower() if _chance(rng, 0.03) else name


def _person_name(rng: random.Random) -> str:
    if not _chance(rng, 0.1):
        return _latin_name(rng)
    script = rng.choice(words.SCRIPTS)
    num_words = rng.choices((1, 2, 3), (30, 60, 10))[0]
    space = "\u30fb" if script[0] == _KATAKANA and _chance(rng, 0.5) else " "
    return space.join(_script_word(rng, script) for _ in range(num_words))


_KATAKANA = 0x30A1


def _city(rng: random.Random) -> str:
    if _chance(rng, 0.25):
        return rng.choice(words.CITIES)
    if _chance(rng, 0.05):
        return _script_word(rng, rng.choice(words.SCRIPTS))
    city = _capital(_new_word(rng))
    kind = rng.random()
    if kind < _CITY_PREFIXED:
        return rng.choice(words.CITY_PREFIXES) + " " + city
    if kind < _CITY_LINKED:
        return city + rng.choice(words.CITY_LINKS) + _capital(_new_word(rng))
    return city


_CITY_PREFIXED, _CITY_LINKED = 0.12, 0.2


def _job(rng: random.Random) -> str:
    kind = rng.random()
    if kind < _NEW_JOB:
        job = _syllable_word(rng)
        return f"{job} {rng.choice(words.JOB_HEADS)}" if _chance(rng, 0.4) else job
    if kind < _MODIFIED_JOB:
        heads = words.JOB_HEADS if _chance(rng, 0.6) else words.JOBS
        modifiers = rng.sample(words.JOB_MODIFIERS, rng.choice((1, 1, 1, 2)))
        return " ".join([*modifiers, rng.choice(heads)])
    return rng.choice(words.JOBS)


_NEW_JOB, _MODIFIED_JOB = 0.2, 0.45


def _with_article(noun: str) -> str:
    plain = unicodedata.normalize("NFD", noun[:1])
    return ("an " if plain[:1] in "aeiou" else "a ") + noun


def _ordinal_suffix(number: int) -> str:
    if number // 10 % 10 == 1:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _spell(number: int) -> str:
    if number < len(words.UNITS):
        return words.UNITS[number]
    ten, unit = words.TENS[number // 10 - 2], number % 10
    return f"{ten}-{words.UNITS[unit]}" if unit else ten


def _number(rng: random.Random) -> int:
    return rng.choice((rng.randint(2, 12), rng.randint(2, 60), rng.randint(13, 999)))


# The tasks


def _person(rng: random.Random) -> _Exercise:
    age = rng.randint(18, 90) if _chance(rng, 0.85) else rng.randint(1, 104)
    name, city, job = _person_name(rng), _city(rng), _job(rng)
    style = rng.random()
    if style < _LOWER:
        name, city = name.lower(), city.lower()
    elif style < _UPPER:
        name, city, job = name.upper(), city.upper(), job.upper()
    pronoun, possessive = rng.choice((("She", "her"), ("He", "his"), ("They", "their")))
    other_name = _latin_name(rng)
    hobby, other_hobby = rng.sample(words.HOBBIES, 2)
    slots = {
        "n": name,
        "a": str(age) if not _chance(rng, 0.06) else _spell(min(age, 99)),
        "c": city,
        "j": job,
        "aj": _with_article(job),
        "P": pronoun,
        "P2": pronoun.lower(),
        "P3": {"She": "her", "He": "him", "They": "them"}[pronoun],
        "p": possessive,
        "k": str(_number(rng)),
        "k2": str(_number(rng)),
        "o": _city(rng),
        "y": str(rng.randint(1960, 2030)),
        "w": other_name.split()[0] if _chance(rng, 0.5) else other_name,
        "h": hobby,
        "h2": other_hobby,
        "s": rng.choice(words.ASIDE_WORDS),
        "wd": rng.choice(words.WEEKDAYS),
        "h24": str(rng.randint(1, 23)),
        "mm": f"{rng.randrange(0, 60, 5):02}",
        "x": rng.choice(sentences.OTHER_CLAUSES),
    }
    slots["th"] = _ordinal_suffix(age) if slots["a"] == str(age) else "th"
    if slots["a"] != str(age):
        age = min(age, 99)
    template = rng.choice(sentences.PERSON_TEMPLATES) if _chance(rng, 0.6) else _compose(rng)
    text = _lay_out(rng, template, slots, style=style)
    if _chance(rng, 0.25):
        text = _surround(rng, text, slots, style=style)
    answer = _dump(name=name, age=age, city=city, job=job)
    return _Exercise(
        instruction=rng.choice(sentences.PERSON_INSTRUCTIONS), text=text, answer=answer
    )


_LOWER, _UPPER = 0.06, 0.08


def _lay_out(rng: random.Random, template: str, slots: dict[str, str], *, style: float) -> str:
    text = template.format(**slots)
    if style < _LOWER:
        text = text.lower()
    elif style < _UPPER:
        text = text.upper()
    else:
        starts_with_name = text.startswith((slots["n"], slots["c"]))
        text = _capital(text) if _chance(rng, 0.9) and not starts_with_name else text
    if text.endswith(".") and _chance(rng, 0.12):
        text = text[:-1] + rng.choice(("", "!", ""))
    return text


def _compose(rng: random.Random) -> str:
    """Return a template made of one clause each for age, city and job, in any order."""
    age, city, job = (
        rng.choice(clauses)
        for clauses in (sentences.AGE_CLAUSES, sentences.CITY_CLAUSES, sentences.JOB_CLAUSES)
    )
    subject = rng.choice(sentences.PERSON_SUBJECTS)
    if _chance(rng, 0.35):
        aside = rng.choice(sentences.AGE_ASIDES)
        head, clauses = f"{subject}, {aside},", [city, job]
        if _chance(rng, 0.2):
            head = subject + " ({a})"
    else:
        head, clauses = subject, [age, city, job]
    if _chance(rng, 0.3):
        clauses.insert(rng.randint(0, len(clauses)), "{x}")
    first, *rest = rng.sample(clauses, len(clauses))
    text = f"{head} {first}"
    for clause in rest:
        text += rng.choice((" and ", ", ", ". {P} ", ". {P} ", "; {P2} ", " and {P2} ", ". {n} "))
        text += clause
    return text.replace("{x}", rng.choice(sentences.OTHER_CLAUSES)) + "."


def _surround(rng: random.Random, text: str, slots: dict[str, str], *, style: float) -> str:
    """Put sentences that say nothing about the person before or after the text."""
    before, after = rng.choice(((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 2), (3, 1)))
    asides = [
        _lay_out(
            rng,
            rng.choice(sentences.ASIDES).replace("{x}", slots["x"]),
            slots | {"k": str(_number(rng)), "k2": str(_number(rng)), "o": _city(rng)},
            style=style if style < _UPPER else 1.0,
        )
        for _ in range(before + after)
    ]
    space = rng.choices((" ", "\n", "\n\n"), (85, 10, 5))[0]
    if text[-1] not in '.!?"':
        text += "."
    return space.join([*asides[:before], text, *asides[before:]])


def _sentiment(rng: random.Random) -> _Exercise:
    label = rng.choice(tuple(sentences.SENTIMENT_TEMPLATES))
    num_sentences = rng.choices((1, 2, 3), (60, 30, 10))[0]
    said = []
    for template in rng.sample(sentences.SENTIMENT_TEMPLATES[label], num_sentences):
        thing, other_thing = rng.sample(words.THINGS, 2)
        if _chance(rng, 0.08):
            thing = _syllable_word(rng)
        adjective = rng.choice(words.SENTIMENT_WORDS[label])
        said.append(
            template.format(
                t=thing,
                t2=other_thing,
                d=adjective,
                D=_capital(adjective),
                ad=_with_article(adjective),
                g=rng.choice(words.SENTIMENT_WORDS["positive"]),
                b=rng.choice(words.SENTIMENT_WORDS["negative"]),
                k=rng.randint(2, 30),
                wd=rng.choice(words.WEEKDAYS),
                m=rng.choice(words.MONTHS),
            )
        )
    text = " ".join(said)
    if _chance(rng, 0.12):
        text = text.lower()
    if _chance(rng, 0.15):
        text = text.rstrip(".") + rng.choice(("", "!", " :)" if label == "positive" else ""))
    instruction = rng.choice(sentences.SENTIMENT_INSTRUCTIONS)
    return _Exercise(instruction=instruction, text=text, answer=label)


def _order(rng: random.Random) -> _Exercise:
    item = rng.choice(words.ORDER_NOUNS) if _chance(rng, 0.75) else _syllable_word(rng) + "s"
    for _ in range(rng.choice((0, 1, 1, 2))):
        adjective = rng.choice(words.ORDER_ADJECTIVES)
        item = f"{adjective if _chance(rng, 0.8) else _new_word(rng)} {item}"
    quantity = rng.choice((rng.randint(2, 20), rng.randint(2, 100), rng.randint(100, 5000)))
    price: float
    if _chance(rng, 0.3):
        price = rng.choice((rng.randint(1, 30), rng.randint(30, 2000)))
        written = str(price)
    else:
        cents = rng.choice((rng.randint(10, 2000), rng.randint(100, 200_000)))
        cents += 1 if cents % 100 == 0 else 0
        price, written = cents / 100, f"{cents / 100:.2f}"
    before, after = rng.choice(words.CURRENCIES)
    text = rng.choice(sentences.ORDER_TEMPLATES).format(
        i=item,
        q=quantity,
        r=before + written + after,
        n=_latin_name(rng),
        c=_city(rng),
        wd=rng.choice(words.WEEKDAYS),
        k3=rng.randint(100, 99_999),
    )
    return _Exercise(
        instruction=rng.choice(sentences.ORDER_INSTRUCTIONS),
        text=_capital(text) if _chance(rng, 0.3) and not text.startswith(item) else text,
        answer=_dump(item=item, quantity=quantity, price=price),
    )


def _event(rng: random.Random) -> _Exercise:
    topic = rng.choice(words.EVENT_TOPICS) if _chance(rng, 0.7) else _capital(_new_word(rng))
    event = f"{topic} {rng.choice(words.EVENT_KINDS)}"
    place = _city(rng)
    if _chance(rng, 0.7):
        place = f"{_capital(_new_word(rng))} {rng.choice(words.PLACE_KINDS)}"
    year, month, day = rng.randint(2019, 2039), rng.randint(1, 12), rng.randint(1, 28)
    name = words.MONTHS[month - 1]
    iso = f"{year}-{month:02}-{day:02}"
    written = rng.choice(
        (
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
            f"{day} {name[:3]} {year}",
            f"{name[:3]} {day}, {year}",
            f"the {day}{_ordinal_suffix(day)} of {name} {year}",
            f"{name} {day}{_ordinal_suffix(day)}, {year}",
            f"{rng.choice(words.WEEKDAYS)}, {day} {name} {year}",
            iso,
        )
    )
    text = rng.choice(sentences.EVENT_TEMPLATES).format(
        e=event, t=written, l=place, n=_latin_name(rng), k=rng.randint(5, 60)
    )
    answer = _dump(event=event, date=iso, place=place)
    return _Exercise(instruction=rng.choice(sentences.EVENT_INSTRUCTIONS), text=text, answer=answer)


def _about(rng: random.Random) -> _Exercise:
    text = rng.choice(sentences.ABOUT_PROMPTS).format(
        t=rng.choice(words.THINGS) if _chance(rng, 0.6) else _new_word(rng),
        c=_city(rng),
        n=_latin_name(rng),
        k=rng.randint(2, 99),
        k2=rng.randint(2, 99),
        h=rng.choice(words.HOBBIES),
    )
    if _chance(rng, 0.1):
        text = text.lower()
    return _Exercise(instruction="", text=text, answer=sentences.ABOUT_ANSWER)


TASKS: dict[str, tuple[Callable[[random.Random], _Exercise], float]] = {
    "person": (_person, 0.62),
    "sentiment": (_sentiment, 0.12),
    "order": (_order, 0.11),
    "event": (_event, 0.11),
    "about": (_about, 0.04),
}
