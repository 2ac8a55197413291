"""C3: what the control plane costs for a request, in CPU, without the engine and the servers."""

from typing import Any

from tests.benchmarks import control_plane, measuring
from tests.benchmarks.measuring import Row


def measure(size: float) -> list[Row]:
    """Run batches of two sizes, here and on a fleet; what a request costs is the slope."""
    num_lines = measuring.scaled(60_000, size, least=6000)
    found: dict[str, Any] = control_plane.measure_cpu(num_lines, measuring.num_pairs_at(5, size))
    return [
        Row(
            id=f"C3 {place}",
            what=f"control-plane CPU per request, {place}",
            values=[control_plane.all_in(parts["us_per_request"])],
            must=control_plane.TARGETS_US["next"],
            goal=control_plane.TARGETS_US["goal"],
            unit="us",
            less=True,
            note=f"slope between {num_lines // 6} and {num_lines} requests, medians",
        )
        for place, parts in found.items()
    ]


if __name__ == "__main__":
    measuring.main(measure)
