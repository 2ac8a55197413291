import json
import re
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs import metrics
from jobs.api.metrics import SystemCollector
from jobs.domain.result import Usage
from storage.database import open_database

ROOT = Path(__file__).parents[3]
NO_USAGE = Usage()


def value(name: str, **labels: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0.0


def count_segment(model: str, **outcomes: int) -> None:
    metrics.count_segment(
        model, outcomes=outcomes, usage=NO_USAGE, failed_usage=NO_USAGE, num_bytes=10, seconds=0.1
    )


def test_a_segment_counts_its_requests_by_outcome() -> None:
    count_segment("m-outcomes", completed=3, truncated=1, schema_mismatch=0)
    count_segment("m-outcomes", completed=2)
    name = "batchctl_requests_total"
    assert value(name, model="m-outcomes", outcome="completed") == 5
    assert value(name, model="m-outcomes", outcome="truncated") == 1
    assert value(name, model="m-outcomes", outcome="schema_mismatch") == 0


def test_tokens_of_failed_requests_are_not_those_of_completed_ones() -> None:
    metrics.count_segment(
        "m-tokens",
        outcomes={"completed": 1, "truncated": 1},
        usage=Usage(prompt_tokens=100, completion_tokens=50, cached_tokens=30),
        failed_usage=Usage(prompt_tokens=40, completion_tokens=45, cached_tokens=10),
        num_bytes=10,
        seconds=0.1,
    )
    found = {
        (kind, outcome): value(
            "batchctl_tokens_total", model="m-tokens", kind=kind, outcome=outcome
        )
        for kind in ("prompt", "completion", "cached")
        for outcome in ("completed", "failed")
    }
    assert found == {
        ("prompt", "completed"): 60,
        ("completion", "completed"): 5,
        ("cached", "completed"): 20,
        ("prompt", "failed"): 40,
        ("completion", "failed"): 45,
        ("cached", "failed"): 10,
    }


def test_codes_that_a_server_makes_up_become_one_series() -> None:
    for number in range(2 * metrics.MAX_OUTCOMES):
        count_segment("m-many", **{f"invented_{number}": 1})
    count_segment("m-many", **{"a prompt, perhaps": 1})
    outcomes = {
        sample.labels["outcome"]
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == "batchctl_requests_total" and sample.labels["model"] == "m-many"
    }
    assert 1 < len(outcomes) <= metrics.MAX_OUTCOMES + 1
    assert "other" in outcomes
    assert "a prompt, perhaps" not in outcomes


def test_a_unit_is_timed_by_kind_model_and_how_it_ended() -> None:
    metrics.count_unit("shard", "m-unit", outcome="done", seconds=42)
    labels = {"kind": "shard", "model": "m-unit", "outcome": "done"}
    assert value("batchctl_unit_seconds_sum", **labels) == 42
    assert value("batchctl_unit_seconds_bucket", **labels, le="30.0") == 0
    assert value("batchctl_unit_seconds_bucket", **labels, le="60.0") == 1


def test_an_engine_that_does_not_start_has_no_loading_time() -> None:
    with metrics.engine_start("m-engine"):
        pass
    with pytest.raises(OSError, match="no device"), metrics.engine_start("m-engine"):
        raise OSError("no device")
    assert value("batchctl_engine_starts_total", model="m-engine") == 2
    assert value("batchctl_engine_loading_seconds_count", model="m-engine") == 1


def test_every_metric_of_ours_has_our_prefix_and_a_description() -> None:
    ours = [
        family
        for family in text_string_to_metric_families(metrics.render().decode())
        # stamina counts its retries as soon as there has been one.
        if not family.name.startswith(("python_", "process_", "stamina_"))
    ]
    assert ours
    assert all(family.name.startswith("batchctl_") for family in ours)
    assert all(family.documentation.endswith(".") for family in ours)


def names_of_metrics(url: str) -> set[str]:
    with open_database(url) as db:
        text = metrics.render(SystemCollector(db)).decode()
    # A metric with labels has no series before its first use, but a line that says its type.
    return {
        f"{name}_bucket" if kind == "histogram" else name
        for name, kind in re.findall(r"# TYPE (batchctl_\S+) (\S+)", text)
    }


def test_the_dashboard_asks_for_every_metric_and_for_no_other(sqlite_url: str) -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana" / "batchctl.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"batchctl_[a-z_]+", target["expr"])
    }
    there = names_of_metrics(sqlite_url)
    assert asked == there - {"batchctl_segment_bytes_total"}


def test_alerts_ask_for_metrics_that_exist_and_the_guide_explains_each(sqlite_url: str) -> None:
    rules = (ROOT / "docs" / "prometheus" / "alerts.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    expressions = re.findall(r"expr: (.*)", rules)
    assert len(alerts) == len(expressions) > 5
    asked = {name for one in expressions for name in re.findall(r"batchctl_[a-z_]+", one)}
    assert asked <= names_of_metrics(sqlite_url)
    guide = (ROOT / "docs" / "operating.md").read_text()
    assert re.findall(r"^\| (Batchctl\w+) \|", guide, re.MULTILINE) == alerts
