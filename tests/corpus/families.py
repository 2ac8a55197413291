"""Some six hundred schemas written for the purpose: every keyword, and what people really ask for.

Each comes with answers that keep it and answers that break it. `tests.corpus.table` writes them to
`schemas.jsonl` and measures them.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.corpus import combined, documents, keywords, refused, usual
from tests.corpus.making import Case

FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    make.__name__: make
    for make in (
        keywords.types,
        keywords.bounds,
        keywords.patterns,
        keywords.formats,
        keywords.values,
        keywords.objects,
        keywords.arrays,
        keywords.nested,
        combined.references,
        combined.unions,
        combined.intersections,
        combined.conditionals,
        combined.negations,
        combined.collections,
        usual.extraction,
        usual.labels,
        usual.calls,
        documents.documents,
        documents.composed,
        refused.unsatisfiable,
        refused.invalid,
        refused.elsewhere,
        refused.unsupported,
        refused.bombs,
        refused.heavy,
    )
}


def entries() -> Iterator[dict[str, Any]]:
    """Yield every schema once, under a name of its own."""
    seen: set[str] = set()
    for name, make in FAMILIES.items():
        number = 0
        for schema, good, bad in make():
            spelled = json.dumps(schema, sort_keys=True)
            if spelled in seen:
                continue
            seen.add(spelled)
            number += 1
            yield {"id": f"{name}-{number:03}", "schema": schema, "good": good, "bad": bad}
