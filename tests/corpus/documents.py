"""Whole documents, and schemas composed at random of what the other families have."""

import json
import random
from collections.abc import Iterator

from tests.corpus.combined import intersections, unions
from tests.corpus.keywords import arrays, bounds, formats, objects, patterns, values
from tests.corpus.making import (
    BOOL,
    INT,
    LINE,
    NULL,
    NUM,
    TEXT,
    Case,
    any_of,
    arr,
    obj,
    one_of,
)
from tests.corpus.usual import labels


def documents() -> Iterator[Case]:
    """Formats of the world: GeoJSON, OpenAPI, settings, logs, feeds."""
    position = {
        "type": "array",
        "prefixItems": [
            NUM | {"minimum": -180, "maximum": 180},
            NUM | {"minimum": -90, "maximum": 90},
        ],
        "items": False,
        "minItems": 2,
    }
    point = obj({"type": {"const": "Point"}, "coordinates": position})
    line = obj({"type": {"const": "LineString"}, "coordinates": arr(position, 2, 4)})
    polygon = obj({"type": {"const": "Polygon"}, "coordinates": arr(arr(position, 4, 5), 1, 1)})
    yield (
        point,
        [{"type": "Point", "coordinates": [1.5, 2]}],
        [{"type": "Point", "coordinates": [1]}],
    )
    yield (
        line,
        [{"type": "LineString", "coordinates": [[1, 2], [3, 4]]}],
        [{"type": "LineString", "coordinates": [[1, 2]]}],
    )
    yield (
        polygon,
        [{"type": "Polygon", "coordinates": [[[1, 2]] * 4]}],
        [{"type": "Polygon", "coordinates": [[[1, 2]] * 3]}],
    )
    yield one_of(point, line, polygon), [{"type": "Point", "coordinates": [1, 2]}], [{"type": "X"}]
    yield (
        obj(
            {
                "type": {"const": "Feature"},
                "geometry": any_of(point, NULL),
                "properties": obj({"name": LINE}),
            }
        ),
        [{"type": "Feature", "geometry": None, "properties": {"name": "x"}}],
        [{"type": "Feature"}],
    )
    yield (
        obj(
            {
                "type": {"const": "FeatureCollection"},
                "features": arr(obj({"type": {"const": "Feature"}, "geometry": point}), 0, 2),
            }
        ),
        [{"type": "FeatureCollection", "features": []}],
        [{"type": "FeatureCollection", "features": [1]}],
    )
    yield (
        obj(
            {
                "server": obj(
                    {
                        "host": TEXT | {"format": "hostname"},
                        "port": INT | {"minimum": 1, "maximum": 65535},
                        "tls": BOOL,
                    }
                ),
                "log": obj({"level": {"enum": ["debug", "info", "error"]}}),
            }
        ),
        [{"server": {"host": "a.b", "port": 80, "tls": True}, "log": {"level": "info"}}],
        [{"server": {"host": "a.b", "port": 0, "tls": True}, "log": {"level": "info"}}],
    )
    yield (
        obj(
            {
                "services": {
                    "type": "object",
                    "patternProperties": {
                        "^[a-z]{1,8}$": obj(
                            {
                                "image": LINE,
                                "ports": arr(TEXT | {"pattern": r"^\d{2,5}:\d{2,5}$"}, 0, 2),
                            }
                        )
                    },
                    "additionalProperties": False,
                    "minProperties": 1,
                    "maxProperties": 2,
                }
            }
        ),
        [{"services": {"web": {"image": "x", "ports": ["80:80"]}}}],
        [{"services": {"Web": {"image": "x", "ports": []}}}],
    )
    yield (
        obj(
            {
                "openapi": {"const": "3.1.0"},
                "path": TEXT | {"pattern": "^/[a-z/]{0,12}$"},
                "method": {"enum": ["get", "post", "put"]},
                "responses": {
                    "type": "object",
                    "patternProperties": {"^[1-5]\\d{2}$": obj({"description": LINE})},
                    "additionalProperties": False,
                    "maxProperties": 3,
                },
            }
        ),
        [
            {
                "openapi": "3.1.0",
                "path": "/a",
                "method": "get",
                "responses": {"200": {"description": "ok"}},
            }
        ],
        [{"openapi": "3.0.0"}],
    )
    yield (
        obj(
            {
                "ts": TEXT | {"format": "date-time"},
                "level": {"enum": ["INFO", "WARN"]},
                "event": LINE,
                "ms": INT | {"minimum": 0, "maximum": 60000},
            }
        ),
        [{"ts": "2026-01-01T00:00:00Z", "level": "INFO", "event": "x", "ms": 1}],
        [{"ts": "yesterday", "level": "INFO", "event": "x", "ms": 1}],
    )
    events = [
        obj({"event": {"const": "login"}, "user": LINE, "ip": TEXT | {"format": "ipv4"}}),
        obj(
            {
                "event": {"const": "purchase"},
                "user": LINE,
                "cents": INT | {"minimum": 1, "maximum": 99999},
            }
        ),
        obj({"event": {"const": "logout"}, "user": LINE}),
    ]
    yield (
        obj({"events": arr(one_of(*events), 1, 3)}),
        [{"events": [{"event": "logout", "user": "a"}]}],
        [{"events": [{"event": "login", "user": "a"}]}],
    )
    yield (
        obj(
            {
                "jsonrpc": {"const": "2.0"},
                "id": any_of(INT | {"minimum": 0, "maximum": 999}, NULL),
                "method": TEXT | {"pattern": "^[a-z]{1,10}$"},
            }
        ),
        [{"jsonrpc": "2.0", "id": None, "method": "x"}],
        [{"jsonrpc": "1.0", "id": None, "method": "x"}],
    )
    yield (
        obj(
            {
                "op": {"enum": ["add", "remove"]},
                "path": TEXT | {"pattern": "^(/[a-z0-9]{1,6}){1,3}$"},
                "value": {"type": ["string", "boolean"], "maxLength": 9},
            },
            "value",
        ),
        [{"op": "remove", "path": "/a/0"}],
        [{"op": "remove", "path": "a"}],
    )
    yield (
        obj(
            {
                "cron": TEXT
                | {"pattern": r"^(\*|[0-5]?\d) (\*|1?\d|2[0-3]) (\*|[1-9]) (\*|[1-9]) (\*|[0-6])$"}
            }
        ),
        [{"cron": "0 12 * * 1"}],
        [{"cron": "hourly"}],
    )
    yield (
        obj({"palette": arr(TEXT | {"pattern": "^#[0-9a-f]{6}$"}, 2, 5), "dark": BOOL}),
        [{"palette": ["#000000", "#ffffff"], "dark": True}],
        [{"palette": ["#000"], "dark": True}],
    )
    yield (
        obj(
            {
                "a11y": obj({"role": {"enum": ["button", "link"]}, "label": LINE}),
                "children": arr({"$ref": "#"}, 0, 2),
            },
            "children",
        ),
        [{"a11y": {"role": "link", "label": "x"}}],
        [{"a11y": {}}],
    )
    yield (
        obj(
            {
                "week": obj(
                    {
                        day: arr(TEXT | {"pattern": r"^\d{2}:00$"}, 0, 1)
                        for day in ("mon", "tue", "wed")
                    }
                )
            }
        ),
        [{"week": {"mon": ["08:00"], "tue": [], "wed": []}}],
        [{"week": {"mon": []}}],
    )
    yield (
        obj(
            {"board": arr(arr({"enum": ["X", "O", ""]}, 3, 3), 3, 3), "turn": {"enum": ["X", "O"]}}
        ),
        [{"board": [["X", "O", ""]] * 3, "turn": "X"}],
        [{"board": [], "turn": "X"}],
    )
    yield (
        obj(
            {
                "html": one_of(
                    obj({"tag": {"const": "br"}}), obj({"tag": {"enum": ["b", "i"]}, "text": LINE})
                )
            }
        ),
        [{"html": {"tag": "br"}}],
        [{"html": {"tag": "b"}}],
    )
    yield (
        obj(
            {
                "bibtex": obj(
                    {
                        "key": TEXT | {"pattern": "^[a-z]+[0-9]{4}$", "maxLength": 12},
                        "year": INT | {"minimum": 1900, "maximum": 2100},
                    }
                )
            }
        ),
        [{"bibtex": {"key": "knuth1984", "year": 1984}}],
        [{"bibtex": {"key": "1984", "year": 1984}}],
    )


_NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def compose(seed: int, leaves: list[Case]) -> Case:
    """Return an object of a few fields that each come from another family."""
    rng = random.Random(seed)
    chosen = rng.sample(leaves, rng.randint(2, 5))
    names = rng.sample(_NAMES, 5)
    fields = dict(zip(names, chosen, strict=False))
    optional = [name for name in fields if rng.random() < 0.25]
    schema = obj({name: case[0] for name, case in fields.items()}, *optional)
    good = [{name: rng.choice(case[1]) for name, case in fields.items()} for _ in range(2)]
    broken = next(name for name in fields if fields[name][2])
    bad = [good[0] | {broken: rng.choice(fields[broken][2])}]
    wrapping = rng.randrange(4)
    if wrapping == 0:
        return arr(schema, 1, 2), [[value] for value in good], [[value] for value in bad]
    if wrapping == 1:
        return any_of(schema, NULL), [*good, None], bad
    if wrapping == 2:
        return (
            obj({"status": {"enum": ["ok", "no"]}, "data": schema}),
            [{"status": "ok", "data": value} for value in good],
            [{"status": "ok", "data": value} for value in bad],
        )
    return schema, good, bad


def composed() -> Iterator[Case]:
    sources = (bounds, patterns, formats, values, arrays, unions, intersections, objects, labels)
    leaves = [
        case
        for source in sources
        for case in source()
        if isinstance(case[0], dict)
        and case[1]
        and case[2]
        and "#" not in json.dumps(case[0]).replace("^#", "")
        and len(json.dumps(case[0])) < 400
    ]
    for seed in range(90):
        yield compose(seed, leaves)
