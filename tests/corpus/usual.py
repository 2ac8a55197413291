"""What people ask for: fields of a text, labels, calls of functions."""

from collections.abc import Iterator

from tests.corpus.making import (
    BOOL,
    INT,
    LINE,
    NULL,
    NUM,
    TEXT,
    Case,
    Schema,
    any_of,
    arr,
    obj,
    one_of,
    ref,
)

MONEY = NUM | {"minimum": 0, "maximum": 100000}
DATE = TEXT | {"format": "date"}
WORDS = arr(LINE, 0, 4)
PERCENT = NUM | {"minimum": 0, "maximum": 1}


def extraction() -> Iterator[Case]:
    """What people ask of documents: invoices, CVs, addresses, notes, findings."""
    address = obj({"street": LINE, "city": LINE, "postcode": TEXT | {"pattern": r"^\d{5}$"}})
    yield (
        obj({"address": address}),
        [{"address": {"street": "Elm 1", "city": "Ulm", "postcode": "12345"}}],
        [{"address": {"street": "Elm 1"}}],
    )
    line = obj({"text": LINE, "quantity": INT | {"minimum": 1, "maximum": 99}, "price": MONEY})
    yield (
        obj(
            {
                "number": TEXT | {"pattern": r"^INV-\d{4,6}$"},
                "date": DATE,
                "currency": {"enum": ["EUR", "USD", "CHF"]},
                "lines": arr(line, 1, 3),
                "total": MONEY,
            }
        ),
        [
            {
                "number": "INV-0001",
                "date": "2026-01-31",
                "currency": "EUR",
                "lines": [{"text": "Nails", "quantity": 2, "price": 1.5}],
                "total": 3,
            }
        ],
        [{"number": "INV-1"}],
    )
    job = obj(
        {
            "title": LINE,
            "from": INT | {"minimum": 1950, "maximum": 2030},
            "to": any_of(INT | {"minimum": 1950, "maximum": 2030}, NULL),
        }
    )
    yield (
        obj(
            {
                "name": LINE,
                "email": any_of(TEXT | {"format": "email"}, NULL),
                "skills": WORDS,
                "jobs": arr(job, 0, 3),
            }
        ),
        [
            {
                "name": "A",
                "email": None,
                "skills": ["x"],
                "jobs": [{"title": "t", "from": 2000, "to": None}],
            }
        ],
        [{"name": "A", "email": "no", "skills": [], "jobs": []}],
    )
    yield (
        obj(
            {
                "title": LINE,
                "authors": arr(LINE, 1, 3),
                "year": INT | {"minimum": 1900, "maximum": 2030},
                "doi": TEXT | {"pattern": r"^10\.\d{4}/[a-z0-9.]{1,12}$"},
            }
        ),
        [{"title": "T", "authors": ["A"], "year": 2020, "doi": "10.1234/abc.1"}],
        [{"title": "T", "authors": [], "year": 2020, "doi": "10.1234/abc"}],
    )
    yield (
        obj(
            {
                "diagnosis": TEXT | {"pattern": r"^[A-TV-Z]\d{2}(\.\d{1,2})?$"},
                "side": {"enum": ["left", "right", "both", None]},
                "certain": BOOL,
            }
        ),
        [{"diagnosis": "J45.9", "side": None, "certain": True}],
        [{"diagnosis": "U07", "side": "left", "certain": True}],
    )
    yield (
        obj(
            {
                "medication": LINE,
                "dose_mg": NUM | {"exclusiveMinimum": 0, "maximum": 5000},
                "times": arr(TEXT | {"pattern": r"^([01]\d|2[0-3]):[0-5]\d$"}, 1, 4),
                "atc": TEXT | {"pattern": r"^[A-Z]\d{2}[A-Z]{2}\d{2}$"},
            }
        ),
        [{"medication": "x", "dose_mg": 5, "times": ["08:00"], "atc": "N02BE01"}],
        [{"medication": "x", "dose_mg": 0, "times": ["08:00"], "atc": "N02BE01"}],
    )
    yield (
        obj(
            {
                "systolic": INT | {"minimum": 50, "maximum": 250},
                "diastolic": INT | {"minimum": 30, "maximum": 150},
                "pulse": INT | {"minimum": 20, "maximum": 250},
            }
        ),
        [{"systolic": 120, "diastolic": 80, "pulse": 60}],
        [{"systolic": 20, "diastolic": 80, "pulse": 60}],
    )
    yield (
        obj(
            {
                "entities": arr(
                    obj(
                        {
                            "text": LINE,
                            "label": {"enum": ["PER", "ORG", "LOC", "MISC"]},
                            "start": INT | {"minimum": 0, "maximum": 999},
                        }
                    ),
                    0,
                    4,
                )
            }
        ),
        [{"entities": [{"text": "x", "label": "PER", "start": 0}]}],
        [{"entities": [{"text": "x", "label": "DATE", "start": 0}]}],
    )
    yield (
        obj(
            {
                "subject": LINE,
                "relation": {"enum": ["owns", "knows", "works_for"]},
                "object": LINE,
                "confidence": PERCENT,
            }
        ),
        [{"subject": "a", "relation": "owns", "object": "b", "confidence": 0.5}],
        [{"subject": "a", "relation": "owns", "object": "b", "confidence": 1.5}],
    )
    yield (
        obj(
            {
                "recipe": LINE,
                "servings": INT | {"minimum": 1, "maximum": 12},
                "ingredients": arr(
                    obj(
                        {
                            "name": LINE,
                            "amount": NUM | {"minimum": 0, "maximum": 999},
                            "unit": {"enum": ["g", "ml", "piece"]},
                        }
                    ),
                    1,
                    4,
                ),
                "steps": arr(LINE, 1, 4),
            }
        ),
        [
            {
                "recipe": "r",
                "servings": 2,
                "ingredients": [{"name": "n", "amount": 1, "unit": "g"}],
                "steps": ["s"],
            }
        ],
        [{"recipe": "r", "servings": 0, "ingredients": [], "steps": []}],
    )
    yield (
        obj(
            {
                "flight": TEXT | {"pattern": "^[A-Z]{2}[0-9]{2,4}$"},
                "from": TEXT | {"pattern": "^[A-Z]{3}$"},
                "to": TEXT | {"pattern": "^[A-Z]{3}$"},
                "departs": TEXT | {"format": "date-time"},
            }
        ),
        [{"flight": "LH123", "from": "FRA", "to": "JFK", "departs": "2026-01-01T10:00:00Z"}],
        [{"flight": "LH123", "from": "fra", "to": "JFK", "departs": "2026-01-01T10:00:00Z"}],
    )
    yield (
        obj(
            {
                "iban": TEXT | {"pattern": r"^[A-Z]{2}\d{2}[A-Z0-9]{10,16}$"},
                "amount": NUM | {"multipleOf": 0.01, "minimum": 0.01, "maximum": 9999},
                "reference": LINE,
            }
        ),
        [{"iban": "DE0212030000000020", "amount": 12.5, "reference": "r"}],
        [{"iban": "DE", "amount": 1, "reference": "r"}],
    )
    yield (
        obj(
            {
                "plaintiff": LINE,
                "defendant": LINE,
                "court": LINE,
                "articles": arr(TEXT | {"pattern": r"^§ ?\d{1,3}[a-z]?$"}, 0, 3),
                "outcome": {"enum": ["granted", "denied", "settled"]},
            }
        ),
        [
            {
                "plaintiff": "a",
                "defendant": "b",
                "court": "c",
                "articles": ["§ 12a"],
                "outcome": "denied",
            }
        ],
        [
            {
                "plaintiff": "a",
                "defendant": "b",
                "court": "c",
                "articles": ["12"],
                "outcome": "denied",
            }
        ],
    )
    yield (
        obj(
            {
                "姓名": LINE,
                "年齢": INT | {"minimum": 0, "maximum": 120},
                "都道府県": {"enum": ["東京都", "大阪府", "北海道"]},
            }
        ),
        [{"姓名": "山田", "年齢": 30, "都道府県": "東京都"}],
        [{"姓名": "山田", "年齢": 30, "都道府県": "京都"}],
    )
    yield (
        obj({"имя": LINE, "город": {"enum": ["Москва", "Казань"]}, "дата": DATE}),
        [{"имя": "Анна", "город": "Казань", "дата": "2026-01-01"}],
        [{"имя": "Анна", "город": "Киев", "дата": "2026-01-01"}],
    )
    yield (
        obj({"الاسم": LINE, "العمر": INT | {"minimum": 0, "maximum": 120}}),
        [{"الاسم": "ل", "العمر": 5}],
        [{}],
    )
    for language in ("en", "de", "fr", "es"):
        yield (
            obj(
                {
                    f"title_{language}": LINE,
                    f"summary_{language}": TEXT | {"maxLength": 60},
                    "language": {"const": language},
                }
            ),
            [{f"title_{language}": "t", f"summary_{language}": "s", "language": language}],
            [{"language": "xx"}],
        )
    yield obj({"summary": TEXT, "keywords": arr(TEXT)}), [{"summary": "s", "keywords": ["k"]}], [{}]
    yield (
        obj({"question": TEXT, "answer": TEXT, "sources": arr(TEXT | {"format": "uri"})}),
        [{"question": "q", "answer": "a", "sources": []}],
        [{"question": "q"}],
    )
    yield (
        obj({"steps": arr(obj({"thought": TEXT, "output": TEXT})), "final_answer": TEXT}),
        [{"steps": [], "final_answer": "x"}],
        [{"steps": [{}], "final_answer": "x"}],
    )


def labels() -> Iterator[Case]:
    """Classification, moderation, scores and rubrics."""
    yield (
        obj({"sentiment": {"enum": ["positive", "neutral", "negative"]}}),
        [{"sentiment": "neutral"}],
        [{"sentiment": "mixed"}],
    )
    yield (
        obj({"sentiment": {"enum": ["positive", "negative"]}, "score": PERCENT}),
        [{"sentiment": "positive", "score": 0.9}],
        [{"sentiment": "positive", "score": 2}],
    )
    harms = ("hate", "violence", "self_harm", "sexual", "spam")
    yield obj(dict.fromkeys(harms, BOOL)), [dict.fromkeys(harms, False)], [{"hate": True}]
    yield (
        obj(dict.fromkeys(harms, PERCENT)),
        [dict.fromkeys(harms, 0.5)],
        [dict.fromkeys(harms, 5)],
    )
    yield (
        obj(
            {
                "flagged": BOOL,
                "categories": arr({"enum": list(harms)}, 0, 3),
                "reason": TEXT | {"maxLength": 80},
            }
        ),
        [{"flagged": False, "categories": [], "reason": ""}],
        [{"flagged": False, "categories": ["x"], "reason": ""}],
    )
    yield (
        obj({"flagged": BOOL, "action": {"enum": ["allow", "hide", "ban"]}})
        | {
            "if": {"properties": {"flagged": {"const": False}}},
            "then": {"properties": {"action": {"const": "allow"}}},
        },
        [{"flagged": False, "action": "allow"}],
        [{"flagged": False, "action": "ban"}],
    )
    yield (
        obj({"stars": INT | {"minimum": 1, "maximum": 5}}),
        [{"stars": 5}],
        [{"stars": 0}, {"stars": 55}],
    )
    yield (
        obj(
            {
                "topic": {"enum": [f"topic-{n}" for n in range(40)]},
                "subtopic": any_of({"enum": [f"sub-{n}" for n in range(60)]}, NULL),
            }
        ),
        [{"topic": "topic-7", "subtopic": None}],
        [{"topic": "topic-77", "subtopic": None}],
    )
    criteria = ("accuracy", "clarity", "tone")
    rubric = {
        name: obj({"score": INT | {"minimum": 1, "maximum": 10}, "why": LINE}) for name in criteria
    }
    yield (
        obj(rubric),
        [{name: {"score": 5, "why": "x"} for name in criteria}],
        [{name: {"score": 11, "why": "x"} for name in criteria}],
    )
    yield (
        obj({"winner": {"enum": ["A", "B", "tie"]}, "margin": INT | {"minimum": 0, "maximum": 3}}),
        [{"winner": "tie", "margin": 0}],
        [{"winner": "C", "margin": 0}],
    )
    yield {"enum": ["SPAM", "HAM"]}, ["HAM"], ["spam"]
    yield arr({"enum": ["a", "b", "c"]}, 10, 10), [list("abcabcabca")], [list("abc")]
    yield obj({"label": INT | {"enum": [0, 1]}}), [{"label": 1}], [{"label": 2}]
    yield (
        obj({"probabilities": arr(PERCENT, 4, 4)}),
        [{"probabilities": [0, 0.5, 0.25, 1]}],
        [{"probabilities": [0.5]}],
    )
    yield (
        obj({"language": TEXT | {"pattern": "^[a-z]{2}(-[A-Z]{2})?$"}, "confidence": PERCENT}),
        [{"language": "de-CH", "confidence": 1}],
        [{"language": "german", "confidence": 1}],
    )
    yield (
        obj(
            {
                "is_question": BOOL,
                "urgency": {"enum": [1, 2, 3]},
                "team": {"enum": ["billing", "tech", None]},
            }
        ),
        [{"is_question": True, "urgency": 2, "team": None}],
        [{"is_question": True, "urgency": 4, "team": None}],
    )


def calls() -> Iterator[Case]:
    """Arguments of functions, and calls of one out of several."""
    yield (
        obj({"location": LINE, "unit": {"enum": ["celsius", "fahrenheit"]}}, "unit"),
        [
            {"location": "Rome"},
            {"location": "Rome", "unit": "celsius"},
        ],
        [{"unit": "celsius"}],
    )
    tools: dict[str, Schema] = {
        "get_weather": obj({"city": LINE}),
        "send_mail": obj({"to": TEXT | {"format": "email"}, "body": TEXT | {"maxLength": 60}}),
        "add": obj(
            {"a": NUM | {"minimum": 0, "maximum": 999}, "b": NUM | {"minimum": 0, "maximum": 999}}
        ),
        "noop": obj({}),
    }
    calls = {
        name: obj({"name": {"const": name}, "arguments": arguments})
        for name, arguments in tools.items()
    }
    for name, schema in calls.items():
        yield schema, [], [{"name": "other", "arguments": {}}, {"name": name}]
    yield (
        any_of(*calls.values()),
        [{"name": "noop", "arguments": {}}],
        [{"name": "get_weather", "arguments": {}}],
    )
    yield (
        one_of(*calls.values()),
        [{"name": "add", "arguments": {"a": 1, "b": 2}}],
        [{"name": "add", "arguments": {"a": 1}}],
    )
    yield arr(any_of(*calls.values()), 1, 2), [[{"name": "noop", "arguments": {}}]], [[]]
    yield (
        obj(
            {
                "tool_calls": arr(
                    obj(
                        {
                            "id": TEXT | {"pattern": "^call_[a-z0-9]{6}$"},
                            "function": any_of(*calls.values()),
                        }
                    ),
                    1,
                    2,
                )
            }
        ),
        [{"tool_calls": [{"id": "call_abc123", "function": {"name": "noop", "arguments": {}}}]}],
        [{"tool_calls": []}],
    )
    yield (
        obj({"sql": TEXT | {"pattern": r"^SELECT [a-z_, ]{1,20} FROM [a-z_]{1,12}$"}}),
        [{"sql": "SELECT a, b FROM t"}],
        [{"sql": "DROP TABLE t"}],
    )
    yield (
        obj(
            {
                "filter": obj(
                    {
                        "field": {"enum": ["price", "date"]},
                        "op": {"enum": ["<", ">", "=", "<="]},
                        "value": {
                            "type": ["number", "string"],
                            "maxLength": 8,
                            "maximum": 999,
                            "minimum": 0,
                        },
                    }
                )
            }
        ),
        [{"filter": {"field": "price", "op": "<", "value": 5}}],
        [{"filter": {"field": "price", "op": "~", "value": 5}}],
    )
    condition = any_of(
        obj({"field": {"enum": ["a", "b"]}, "equals": INT | {"minimum": 0, "maximum": 9}}),
        obj({"and": arr(ref("c"), 1, 2)}),
        obj({"not": ref("c")}),
    )
    yield (
        {"$defs": {"c": condition}, **ref("c")},
        [{"and": [{"field": "a", "equals": 1}, {"not": {"field": "b", "equals": 2}}]}],
        [{"and": []}],
    )
    for count in (1, 3, 8):
        names = [f"arg{n}" for n in range(count)]
        yield obj({name: any_of(LINE, NULL) for name in names}), [dict.fromkeys(names)], [{}]
