"""fastpeft serve as a process, and what it refuses before it listens."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from fastpeft.cli import main
from fastpeft.cli.serve import ServeConfig
from tests.serving.tiny_server import lora, save_adapter
from tests.training import tiny
from tests.training.commands import fails

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    save_adapter(folder / "a", tiny.llama(folder / "llama"), lora(1), 1)
    return folder


def test_a_server_listens_on_loopback_answers_and_ends_with_its_results(files):
    command = ["serve", "--model", files / "llama", "--adapter", f"a={files / 'a'}", "--port", 0, "--use-cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastpeft", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    try:
        line = next(line for line in process.stderr if line.startswith("serving"))
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        answer = httpx.post(f"{url}/generate", json={"adapter": "a", "prompt": "w1", "max_new_tokens": 3}, timeout=60)
        assert (answer.status_code, answer.json()["adapter"]) == (200, "a")
        assert httpx.get(f"{url}/nothing").status_code == 404
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 0, err
    done = json.loads(out.splitlines()[-1])
    assert done["answers"] == {"200": 1, "404": 1}
    assert done["served"] == ["__base__", "a"]
    assert f"http://{done['address']}" == url


def test_it_listens_on_this_machine_alone_unless_told_otherwise(files, capsys, monkeypatch):
    assert ServeConfig(model="m").host == "127.0.0.1"
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    command = ["serve", "--model", files / "llama", "--port", 0, "--use-cpu"]
    assert main([str(part) for part in command]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([str(part) for part in [*command, "--host", "0.0.0.0"]]) == 0
    assert "no authentication" in capsys.readouterr().err


def test_refusals(files, capsys, monkeypatch):
    command = ["serve", "--model", files / "llama", "--use-cpu", "--port"]
    fails(capsys, [*command, 0, "--adapter", "a"], "expected NAME=FOLDER")
    fails(capsys, [*command, 0, "--adapter", "a=x", "a=y"], "with different names")
    fails(capsys, [*command, 0, "--adapter", f"a={files / 'nothing'}"], "nothing")
    fails(capsys, [*command, 0, "--max-batch", 0], "max_batch: expected at least 1")
    fails(capsys, [*command, 70000], "port of 0 to 65535")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fails(capsys, [*command, port], f"cannot listen on 127.0.0.1:{port}")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    fails(capsys, [*command, 0], "pip install 'fastpeft[serve]'")
