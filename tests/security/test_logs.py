"""Where prompts, answers and secrets may never turn up: rows 26, 27 and 35 of the security table.

The same over Postgres and S3, with an engine that dies: tests/integration/cli/test_serve_alone.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from jobs.client import Client, Upload
from tests.builders import make_line
from tests.integration.api.servers import wait_for
from tests.integration.cli.test_serve_alone import environment, serving
from tests.security.measuring import REPOSITORY

KEY = "sk-CANARY-key-55c0"
CHAT = "/v1/chat/completions"
ANSWER, PROMPT, SECRET = "CANARY-answer-92ab", "CANARY-prompt-7d1f", "CANARY-secret-e1a4"

SHOUTED = f"{PROMPT} [[reply={ANSWER}]]"
SCHEMA = {"type": "object", "required": ["a"], "title": PROMPT}
GOOD = [
    *(make_line(f"ok-{number}", SHOUTED) for number in range(20)),
    make_line("invalid", f"{PROMPT} [[fault=invalid]]", guided_json=SCHEMA),
    make_line("error", f"{PROMPT} [[fault=error]]"),
    make_line("regex", SHOUTED, guided_regex=f"x|{PROMPT}"),
    make_line("long", PROMPT * 20_000),
    make_line("stop", SHOUTED, stop=[PROMPT]),
]
BAD = [
    make_line("a", PROMPT)[:-20],
    make_line("b", PROMPT, best_of=2),
    make_line("c", PROMPT, temperature=9),
    make_line("d", PROMPT, guided_json={"type": PROMPT}),
    make_line("e", PROMPT, guided_json={"$ref": f"#/{PROMPT}"}),
    make_line("f", PROMPT, guided_regex=f"({PROMPT}"),
    make_line("g", PROMPT, guided_regex=f"{PROMPT}{{9999}}{{9999}}"),
    make_line("h", PROMPT, guided_grammar=f"start: {PROMPT}"),
    make_line("i", PROMPT, guided_choice=[PROMPT] * 5_001),
    make_line("j", messages=[{"role": "user", "content": {"text": PROMPT}}]),
    make_line("k", messages=[{"role": "user", "content": [{"type": "text", "text": [PROMPT]}]}]),
    make_line("l", messages=PROMPT),
    make_line("m", PROMPT, stop=[PROMPT] * 17),
    make_line("n", PROMPT, seed=PROMPT),
    make_line("o", PROMPT, guided_json={"properties": {PROMPT: {"pattern": f"({PROMPT}"}}}),
    make_line("p", PROMPT).replace(b'"POST"', json.dumps(PROMPT).encode()),
    make_line("q", PROMPT).replace(CHAT.encode(), PROMPT.encode()),
    PROMPT.encode(),
    json.dumps(PROMPT).encode(),
    json.dumps([PROMPT]).encode(),
    b'{"' + PROMPT.encode() + b'": "' + b"\xff" * 3,
]


def run_batch(client: Client, folder: Path, lines: list[bytes]) -> str:
    path = folder / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    file = client.upload(Upload.from_path(path))
    batch_id = client.create_batch(input_file_id=file.id, endpoint=CHAT).id
    wait_for(lambda: client.get_batch(batch_id).is_terminal, seconds=240)
    return batch_id


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_row_26_what_people_write_and_models_answer_is_in_files_of_results_and_nowhere_else(
    tmp_path: Path,
) -> None:
    env = environment(tmp_path, BATCHCTL_LOG__LEVEL="debug", BATCHCTL_API_KEY=KEY)
    log = tmp_path / "log"
    with serving(env=env, log=log) as url, Client(url, api_key=KEY) as client:
        good = client.get_batch(run_batch(client, tmp_path, GOOD))
        bad = run_batch(client, tmp_path, BAD)
        headers = {"authorization": f"Bearer {KEY}"}
        told = [httpx2.get(f"{url}/metrics", headers=headers).text]
        told += [
            httpx2.get(f"{url}/v1/{one}", headers=headers).text for one in ("batches", "files")
        ]
        told.append(httpx2.get(f"{url}/v1/batches/{bad}", headers=headers).text)
        told += [
            httpx2.post(
                f"{url}/v1/batches", content=content, headers=headers | {"content-type": kind}
            ).text
            for content in (PROMPT, f'{{"{"x" * 300}": "{PROMPT}"}}', f'["{PROMPT}"')
            for kind in ("application/json", "text/plain")
        ]
        wrong = httpx2.get(f"{url}/v1/files", headers={"authorization": f"Bearer {SECRET}"})
        assert wrong.status_code == 401
        told.append(wrong.text)
        assert json.loads(told[3])["errors"]["num_errors"] >= len(BAD) - 1
        assert good.request_counts.completed >= 20
        assert good.request_counts.failed >= 2
        assert good.output_file_id is not None
        assert ANSWER in b"".join(client.download(good.output_file_id)).decode()
    data = tmp_path / "data"
    results = data / "server" / "blobs"
    kept = [one for one in data.rglob("*") if one.is_file() and results not in one.parents]
    assert any(one.suffix == ".sqlite3" for one in kept)
    for path in (log, *kept):
        assert b"CANARY" not in path.read_bytes(), path.name
    for text in told:
        assert "CANARY" not in text


@pytest.mark.parametrize(
    "arguments",
    [("models",), ("config", "show"), ("serve", "--port", "0"), ("db", "upgrade")],
    ids=" ".join,
)
@pytest.mark.slow
def test_row_27_no_command_shows_a_secret_even_when_it_fails(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    env = environment(
        tmp_path,
        BATCHCTL_LOG__LEVEL="debug",
        BATCHCTL_DATABASE__URL=f"postgresql://user:{SECRET}@127.0.0.1:1/db",
        BATCHCTL_BROKER__URL=f"redis://user:{SECRET}@127.0.0.1:1/0",
        BATCHCTL_API_KEY=SECRET,
        BATCHCTL_HF__TOKEN=SECRET,
        BATCHCTL_BLOBS__KIND="s3",
        BATCHCTL_BLOBS__BUCKET="b",
        BATCHCTL_BLOBS__ENDPOINT_URL="http://127.0.0.1:1",
        BATCHCTL_BLOBS__ACCESS_KEY=f"{SECRET}-id",
        BATCHCTL_BLOBS__SECRET_KEY=SECRET,
        BATCHCTL_BLOBS__SESSION_TOKEN=SECRET,
        BATCHCTL_BLOBS__MAX_ATTEMPTS="1",
    )
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", *arguments],
        cwd=REPOSITORY,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert SECRET not in done.stdout + done.stderr
    assert done.stdout + done.stderr
