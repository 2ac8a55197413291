"""The server as a process: its port, its readiness, its end, its memory, its log."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from jobs.api.server import open_listener
from jobs.domain.errors import Conflict, InvalidInput
from tests.integration.api.servers import lines, wait_for

ROOT = Path(__file__).parents[3]
_PROGRAM = """
import sys
from pathlib import Path
from jobs.api.server import serve
from jobs.app import open_app
from jobs.settings import Settings
from jobs.telemetry import configure_logging

configure_logging(level="DEBUG", form="json")
with open_app(Settings(engine="simulated"), folder=Path(sys.argv[1])) as app:
    serve(app, "127.0.0.1", 0, on_ready=lambda host, port: print(port, flush=True))
print("ended", flush=True)
"""


def test_port_in_use_is_one_clear_line() -> None:
    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"Port {port} on 127.0.0.1 is in use"):
            open_listener("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 300, ""])
def test_host_that_is_not_this_machine_is_one_clear_line(host: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_listener(host, 0)
    assert "\n" not in caught.value.message
    assert caught.value.param == "host"


@contextmanager
def run_server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], httpx2.Client]]:
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(folder / "data")],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                yield process, http
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_in_order_while_somebody_downloads(
    tmp_path: Path, number: signal.Signals
) -> None:
    content = os.urandom(1 << 20) * 20
    with run_server(tmp_path) as (process, http):
        file_id = http.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("a", content)}
        ).json()["id"]
        with http.stream("GET", f"/v1/files/{file_id}/content") as response:
            pieces = response.iter_raw()
            first = next(pieces)
            process.send_signal(number)
            time.sleep(0.3)
            assert first + b"".join(pieces) == content
        assert process.wait(10) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "ended\n"
        port = http.base_url.port
    assert port is not None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_log_has_no_body_and_no_request(tmp_path: Path) -> None:
    canary = "c4n4ry"
    with run_server(tmp_path) as (process, http):
        content = lines(3, messages=[{"role": "user", "content": canary}])
        form = {"purpose": "batch"}
        file_id = http.post("/v1/files", data=form, files={"file": (canary, content)}).json()["id"]
        body = {
            "input_file_id": file_id,
            "endpoint": canary,
            "completion_window": "24h",
            "metadata": {"a": canary},
        }
        assert http.post("/v1/batches", json=body).status_code == 400
        assert http.post("/v1/batches", json=body | {"endpoint": 3}).status_code == 400
        assert http.post("/v1/files", content=canary.encode()).status_code == 400
        boundary = {"content-type": "multipart/form-data; boundary=x"}
        broken = f"--x{canary}\r\n".encode()
        assert http.post("/v1/files", content=broken, headers=boundary).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    log = (tmp_path / "log").read_text()
    assert canary not in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_large_upload_and_download_stay_out_of_memory(tmp_path: Path) -> None:
    piece = os.urandom(1 << 20)
    num_pieces = 200

    def form() -> Iterator[bytes]:
        yield (b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n')
        for _ in range(num_pieces):
            yield piece
        yield b'\r\n--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'

    with run_server(tmp_path) as (process, http):
        http.get("/ready")
        idle = psutil.Process(process.pid).memory_info().rss
        began = time.monotonic()
        headers = {"content-type": "multipart/form-data; boundary=x"}
        file = http.post("/v1/files", content=form(), headers=headers).json()
        uploaded = time.monotonic()
        assert file["bytes"] == num_pieces << 20
        received = 0
        with http.stream("GET", f"/v1/files/{file['id']}/content") as response:
            for part in response.iter_raw(1 << 20):
                received += len(part)
        downloaded = time.monotonic()
        assert received == num_pieces << 20
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
        print(
            f"idle {idle >> 20} MiB, peak +{(peak - idle) >> 20} MiB, "
            f"up {uploaded - began:.1f} s, down {downloaded - uploaded:.1f} s"
        )
        assert peak - idle < 60 << 20
        wait_for(lambda: http.get("/health").status_code == 200)
