"""What Airflow sees of the provider: its description, its connection, its hook."""

import importlib
import json
import subprocess
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path
from typing import Any

import pytest
from airflow.models import Connection
from airflow.providers_manager import ProvidersManager

from batchctl_provider import __version__
from batchctl_provider.exceptions import BatchctlError
from batchctl_provider.get_provider_info import get_provider_info
from batchctl_provider.hooks.batchctl import BatchctlHook, open_target, read_connection
from tests.airflow.servers import OwnServer

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "airflow_provider" / "batchctl_provider"


def test_the_description_is_of_the_distribution_and_what_it_names_exists() -> None:
    found = [
        one for one in entry_points(group="apache_airflow_provider") if "batchctl" in one.value
    ]
    described = found[0].load()()
    assert found[0].dist is not None
    assert described["package-name"] == found[0].dist.name == "airflow-provider-batchctl"
    assert described["versions"][0] == found[0].dist.version == __version__
    for kind in ("hooks", "operators", "sensors", "triggers"):
        for integration in described[kind]:
            for module in integration["python-modules"]:
                importlib.import_module(module)
    (connection,) = described["connection-types"]
    module, _, name = connection["hook-class-name"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is BatchctlHook
    assert connection["connection-type"] == BatchctlHook.conn_type


def test_it_asks_for_airflow_and_an_http_client_and_never_for_the_server() -> None:
    wanted = distribution("airflow-provider-batchctl").requires
    assert wanted is not None
    assert sorted(one.partition(">")[0] for one in wanted) == ["apache-airflow", "httpx2"]


def test_airflow_finds_it_and_its_connection_form() -> None:
    manager = ProvidersManager()
    assert manager.providers["airflow-provider-batchctl"].version == __version__
    hook = manager.hooks["batchctl"]
    assert hook is not None
    assert hook.hook_class_name == "batchctl_provider.hooks.batchctl.BatchctlHook"
    assert hook.connection_id_attribute_name == "batchctl_conn_id"
    fields = {name for name in manager.connection_form_widgets if "batchctl__" in name}
    assert fields == {
        f"extra__batchctl__{name}" for name in ("timeout_seconds", "patience_seconds", "ca_file")
    }
    assert manager.field_behaviours["batchctl"]["relabeling"] == {
        "host": "Base URL",
        "password": "API key",
    }


def test_the_form_of_older_airflows_is_the_declared_one() -> None:
    (connection,) = get_provider_info()["connection-types"]
    declared = connection["ui-field-behaviour"]
    assert BatchctlHook.get_ui_field_behaviour() == {
        name.replace("-", "_"): value for name, value in declared.items()
    }


@pytest.mark.slow
def test_the_command_line_lists_it() -> None:
    ran = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("airflow")), "providers", "get", "--full"),
            *("airflow-provider-batchctl", "--output", "json"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "batchctl_provider.hooks.batchctl.BatchctlHook" in ran.stdout


def test_nothing_of_the_server_is_imported() -> None:
    modules = [
        path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and "example_dags" not in path.parts
    ]
    assert len(modules) >= 8
    program = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
ours = {{"jobs", "engine", "storage", "migrations"}}
print(sorted(name for name in sys.modules if name.partition(".")[0] in ours))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,  # where the server's packages could be found
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


@pytest.mark.slow
def test_the_test_button_says_whether_server_and_key_are_right(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(**fields: Any) -> tuple[bool, str]:
        connection = Connection(  # noqa: AIR311  the one that the button has
            conn_id="tried", **{"conn_type": "batchctl", "password": own_server.api_key} | fields
        )
        # As the API server does.
        monkeypatch.setenv("AIRFLOW_CONN_TRIED", connection.as_json())
        good, said = connection.test_connection()
        return good, said

    host, _, port = own_server.url.removeprefix("http://").partition(":")
    for address in (own_server.url, f"{own_server.url}/v1", f"{own_server.url}/v1/"):
        good, said = press(host=address)
        assert good, said
    assert press(host=host, port=int(port)) == (good, said)
    good, said = press(host=own_server.url, password="wrong-key")  # noqa: S106  not a secret
    assert not good
    assert "API key is not the right one" in said
    nobody = json.dumps({"patience_seconds": 0.1})
    good, said = press(host="http://127.0.0.1:1", extra=nobody)
    assert not good
    assert "is away" in said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "it has no host"),
        ({"host": "ftp://somewhere"}, "is not a URL"),
        ({"host": "http://h", "password": "schlüssel"}, "characters that no key has"),
        ({"host": "http://h", "extra": '{"timeout_seconds": "long"}'}, "timeout_seconds"),
        ({"host": "http://h", "extra": '{"ca_file": "/nowhere.pem"}'}, "nowhere|No such file"),
    ],
)
def test_a_connection_that_cannot_work_says_why(
    fields: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "AIRFLOW_CONN_BATCHCTL_DEFAULT", json.dumps({"conn_type": "batchctl", **fields})
    )
    with pytest.raises(BatchctlError, match=said) as caught:
        BatchctlHook().get_conn()
    assert "batchctl_default" in str(caught.value)


def test_the_key_is_not_in_what_is_printed() -> None:
    from airflow.sdk import Connection as SdkConnection  # noqa: PLC0415  two of one name

    server = read_connection(
        SdkConnection(conn_id="c", conn_type="batchctl", host="h", password="secret-key")  # noqa: S106
    )
    assert server.api_key == "secret-key"
    assert server.base_url == "http://h"
    assert "secret-key" not in repr(server)


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    place = tmp_path / "out.jsonl"
    place.write_text("before")

    def write_half() -> None:
        with open_target(place) as target:
            target.write(b"half")
            raise EOFError

    with pytest.raises(EOFError):
        write_half()
    assert place.read_text() == "before"
    assert list(tmp_path.iterdir()) == [place]
