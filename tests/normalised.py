"""The lines of two result files, without what two runs of the same requests may differ in.

Left out of each line, and of nothing else:

    id, response.request_id, response.body.id   made for this batch
    response.body.created                       when it was
    ...usage.prompt_tokens_details              what the cache held when the line had its turn
    ...message.tool_calls[].id                  made from the request's
    ...batchctl.same_as                         the equal line that ran for this one

A line with `same_as` shows a usage of 0, since nothing was computed for it: it is given that of the
line it names. What is left of `batchctl` goes where it says no more than that there was one attempt
without a constraint. The rest is kept as it stands, in its order, byte for byte.

    python -m tests.normalised FIRST SECOND     says whether two output files are the same
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_NOTHING_TOLD = {"constraint": None, "attempts": 1}


def normalised(lines: Iterable[bytes]) -> list[bytes]:
    """Return the lines of an output or error file as another run of the same input has them."""
    return [
        json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode()
        for line in _without_this_run([json.loads(one) for one in lines])
    ]


def _without_this_run(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    used: dict[str, Any] = {}
    for line in lines:
        line.pop("id", None)
        if line["response"] is None:
            continue
        line["response"].pop("request_id", None)
        body = line["response"]["body"]
        for name in ("id", "created"):
            body.pop(name, None)
        for call in _calls_of(body):
            call.pop("id", None)
        if "usage" in body:
            body["usage"].pop("prompt_tokens_details", None)
            used[line["custom_id"]] = body["usage"]
    for line in lines:
        body = (line["response"] or {"body": {}})["body"]
        if "batchctl" in body:
            leader = body["batchctl"].pop("same_as", None)
            if leader is not None and "usage" in body:
                body["usage"] = used[leader]
            if body["batchctl"] == _NOTHING_TOLD:
                del body["batchctl"]
        yield line


def _calls_of(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for choice in body.get("choices", ()):
        yield from choice.get("message", {}).get("tool_calls", ())


def main(names: list[str]) -> int:
    """Return 0 where two files are the same, else 1."""
    first, second = (normalised(Path(name).read_bytes().splitlines()) for name in names)
    if first == second:
        print(f"the same: {len(first)} lines")
        return 0
    differing = sum(one != other for one, other in zip(first, second, strict=False))
    print(f"{differing} lines differ; there are {len(first)} and {len(second)}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
