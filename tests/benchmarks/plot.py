"""Draws build/bench.json as SVG and writes its table into docs/performance.md.

    python -m tests.benchmarks.plot [--json build/bench.json]

In a plot, right of the line is what a row must reach: its figure over that bound, or that bound
over its figure where less is better. The whisker is the range, the diamond the goal.
"""

import argparse
import html
import json
import math
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.measuring import ROOT
from tests.benchmarks.reasons import explained
from tests.benchmarks.suite import OUTPUT, Summary, bound, misses_goal, verdict

PAGE = ROOT / "docs" / "performance.md"
FOLDER = ROOT / "docs" / "performance"
BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
_LEFT, _WIDTH, _RIGHT = 600, 420, 80
_ROW, _TOP = 26, 34
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.value{fill:#111;font-weight:600}"
    ".axis{stroke:#999}.must{stroke:#111;stroke-width:1.5}.range{stroke:#333;stroke-width:1.5}"
    ".id{fill:#111;font-weight:600}.goal{fill:#fff;stroke:#111}.met{fill:#5b8c5a}.missed{fill:#c65f4b}.some{fill:#d9a441}"
)
_LEGEND = (("met", "goal met"), ("some", "must met"), ("missed", "missed"))
_COLOURS = {"goal met": "met", "must met": "some", "goal missed": "some", "MISSED": "missed"}


def ratio(row: Summary, name: str) -> float:
    """Return a figure of a row over what it must reach, so that more is better."""
    base = row["must"] if row["must"] is not None else row["goal"]
    value = max(row[name], 1e-9)
    return float(base / value if row["less"] else value / base)


def draw(rows: list[Summary]) -> str:
    """Return an SVG with a bar for each row."""
    shown = [ratio(row, name) for row in rows for name in ("low", "high", "median")]
    shown += [ratio(row, "goal") for row in rows if row["goal"] is not None]
    low, high = min([0.5, *shown]) / 1.1, max([2.0, *shown]) * 1.1

    def x(value: float) -> float:
        return _LEFT + _WIDTH * math.log(value / low) / math.log(high / low)

    bottom = _TOP + _ROW * len(rows)
    height = bottom + _ROW + 8
    width = _LEFT + _WIDTH + _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8):
        if low < tick < high:
            kind = "must" if tick == 1 else "axis"
            parts.append(
                f'<line class="{kind}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP - 8}" '
                f'y2="{bottom}" stroke-opacity="{1 if tick == 1 else 0.4}"/>'
                f'<text x="{x(tick):.1f}" y="{_TOP - 14}" text-anchor="middle">'
                f"{'must' if tick == 1 else f'x {tick:g}'}</text>"
            )
    for place, row in enumerate(rows):
        y = _TOP + _ROW * place + 8
        start, end = sorted((x(1), x(ratio(row, "median"))))
        length = max(1.5, end - start)
        kind = _COLOURS[verdict(row)]
        ends = sorted((x(ratio(row, "low")), x(ratio(row, "high"))))
        # What follows the number of a row is in its text as well.
        label = f'<tspan class="id">{html.escape(row["id"].split(" ")[0])}</tspan>'
        label += f"  {html.escape(row['what'])}"
        parts += [
            f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{label}</text>',
            f'<rect class="{kind}" x="{start:.1f}" y="{y - 7}" width="{length:.1f}" height="14"/>',
            f'<line class="range" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}"/>',
            f'<text class="value" x="{_LEFT + _WIDTH + 8}" y="{y + 4}">{row["median"]:.3g}</text>',
        ]
        if row["goal"] is not None:
            at = x(ratio(row, "goal"))
            parts.append(
                f'<path class="goal" d="M{at:.1f} {y - 6}l5 6l-5 6l-5 -6z">'
                f"<title>goal {row['goal']:g}</title></path>"
            )
    return "\n".join([*parts, *_legend(bottom + _ROW // 2 + 4), "</svg>", ""])


def _legend(y: int) -> Iterator[str]:
    at = _LEFT
    for kind, said in _LEGEND:
        yield f'<rect class="{kind}" x="{at}" y="{y - 6}" width="12" height="12"/>'
        yield f'<text x="{at + 18}" y="{y + 4}">{said}</text>'
        at += 90
    yield f'<path class="goal" d="M{at + 6} {y - 6}l5 6l-5 6l-5 -6z"/>'
    yield f'<text x="{at + 18}" y="{y + 4}">goal</text>'
    at += 66
    yield f'<line class="range" x1="{at}" x2="{at + 18}" y1="{y}" y2="{y}"/>'
    yield f'<text x="{at + 24}" y="{y + 4}">range of pairs</text>'


def table(rows: list[Summary]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| row | what | median (range) | must | goal | | load of others | how |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        unit = "" if row["unit"] in {"ratio", "share"} else f" {row['unit']}"
        values = f"{row['median']:.4g}{unit}"
        if row["num_values"] > 1:
            values += f" ({row['low']:.4g} to {row['high']:.4g})"
        cells = (
            row["id"],
            row["what"],
            values,
            bound(row, "must"),
            bound(row, "goal"),
            verdict(row).lower(),
            f"{row['load']:.1f}" + (" (a count)" if row["exact"] else ""),
            f"{row['note']} ({row['at']})",
        )
        lines.append("| " + " | ".join(cells) + " |")
    missed = explained([row for row in rows if misses_goal(row)])
    lines += ["", "What misses its goal, why, and the next idea:", ""] if missed else []
    lines += [f"- **{names}** {reason}" for names, reason in missed]
    return "\n".join(lines)


def replace_between(text: str, name: str, content: str) -> str:
    """Put content between two marks of a page."""
    begin, end = BEGIN.format(name), END.format(name)
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=OUTPUT)
    rows: list[Summary] = json.loads(parser.parse_args().json.read_text())
    FOLDER.mkdir(exist_ok=True)
    text = PAGE.read_text()
    for name, of_peers in (("rows", False), ("peers", True)):
        chosen = [row for row in rows if row["id"].startswith("P") is of_peers]
        if not chosen:
            continue
        drawn = [row for row in chosen if row["must"] is not None or row["goal"] is not None]
        (FOLDER / f"{name}.svg").write_text(draw(drawn))
        image = f"![each row against what it must reach](performance/{name}.svg)"
        text = replace_between(text, name, f"{image}\n\n{table(chosen)}")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
