"""Servers under test, started as people start them, and inputs for them."""

import json
import os
import selectors
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
START_SECONDS = 120.0


class Server:
    """Where a server is, and what to ask it for."""

    def __init__(self, url: str, *, model: str, api_key: str | None) -> None:
        self.url = url
        self.model = model
        self.api_key = api_key

    def line(self, number: int, content: str = "hello", **body: object) -> str:
        return json.dumps(
            {
                "custom_id": f"r{number}",
                "method": "POST",
                "url": CHAT,
                "body": {
                    "model": self.model,
                    "messages": [{"role": "user", "content": f"{content} {number}"}],
                    "max_tokens": 16,
                    **body,
                },
            }
        )

    def write_lines(self, path: Path, num_lines: int, content: str = "hello", **body: Any) -> Path:
        lines = [self.line(number, content, **body) + "\n" for number in range(num_lines)]
        path.write_text("".join(lines))
        return path

    def call(self, path: str, *, method: str = "GET") -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}/v1/{path}", headers=headers, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found

    def batch(self, batch_id: str) -> dict[str, Any]:
        return self.call(f"batches/{batch_id}")

    def batch_ids(self) -> list[str]:
        return [one["id"] for one in self.call("batches?limit=100")["data"]]


class OwnServer(Server):
    """`batchctl serve` over a folder, with a simulated model; can be stopped and started again."""

    def __init__(self, folder: Path, *, api_key: str | None = None) -> None:
        super().__init__("", model="simulated", api_key=api_key)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self) -> Iterator["OwnServer"]:
        try:
            self.start()
            yield self
        finally:
            self.stop()

    def start(self) -> None:
        """Start it; a second time on the port that it had."""
        port = urlsplit(self.url).port if self.url else 0
        models = {"simulated": {"engine": "simulated", "options": {"step_seconds": 0.01}}}
        environment = {
            # Neither what is set for these tests, nor what somebody set for a server of theirs.
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("AIRFLOW_", "BATCHCTL_"))
            },
            "BATCHCTL_MODELS": json.dumps(models),
            "BATCHCTL_DATA": str(self._folder / "data"),
        }
        if self.api_key is not None:
            environment["BATCHCTL_API_KEY"] = self.api_key
        log = self._folder / "log"
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [str(ROOT / ".venv/bin/batchctl"), "serve", "--port", str(port), "--json"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        stdout = self._process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            ready = selector.select(START_SECONDS)
        said = stdout.readline() if ready else b""
        assert said, f"the server did not start: {log.read_text()[-2000:]}"
        self.url = json.loads(said)["url"]

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def named_server() -> Server | None:
    """Return the server that the environment names."""
    url = os.environ.get("BATCHCTL_TEST_URL", "").rstrip("/").removesuffix("/v1")
    if not url:
        return None
    return Server(
        url,
        model=os.environ.get("BATCHCTL_TEST_MODEL", "simulated"),
        api_key=os.environ.get("BATCHCTL_TEST_API_KEY") or None,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def custom_ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]
