"""A real `vllm serve` of the demo model, from `.venv-vllm`; one start is shared by all tests."""

import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.demo import model_path
from tests.conftest import free_port

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = REPOSITORY / ".venv-vllm"
START_SECONDS = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_there = (ENVIRONMENT / ".stamp").exists()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.slow)
        if not is_there:
            item.add_marker(
                pytest.mark.skip(reason="there is no .venv-vllm: sh scripts/vllm_env.sh")
            )


class VllmServer:
    """One server process at a time, always on the same port."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it; `await_ready` says when it answers."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("BATCHCTL_", "VLLM_", "PYTHON"))
        }
        template = self._log.with_name("template.jinja")
        own = (model_path() / "chat_template.jinja").read_text()
        template.write_text("{%- if tools %}{{ tools | tojson }}{%- endif %}" + own)
        command = [
            *(str(ENVIRONMENT / "bin" / "vllm"), "serve", str(model_path())),
            *("--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"),
            *("--max-num-seqs", "16", "--host", "127.0.0.1", "--port", str(self._port)),
            *("--chat-template", str(template)),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment
                | {
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_NO_USAGE_STATS": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        pause = threading.Event()
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vllm serve did not start: {self._log.read_text()[-3000:]}")
            pause.wait(0.2)

    def answers(self) -> bool:
        url = f"{self.url}/v1/models"
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - our own server
        except (OSError, urllib.error.URLError):
            return False
        return True

    def kill(self) -> None:
        """End it and everything it started, at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    server = VllmServer(tmp_path_factory.mktemp("vllm-serve") / "log")
    try:
        server.start()
        server.await_ready()
        yield server
    finally:
        server.kill()
