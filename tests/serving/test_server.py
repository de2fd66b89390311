"""fastpeft serve over loopback: many requests for many adapters at once, refusals, hang-ups, metrics, shutdown."""

import asyncio
import json
import re
import socket
import threading
import time

import httpx
import pytest

from fastpeft.serving.app import make_app
from fastpeft.serving.engine import Engine, Limits
from fastpeft.training.predict import TrainedAdapter
from tests.serving.tiny_server import listening, lora, save_adapter
from tests.training import tiny

PROMPTS = ["say w1", "say w2 w3 w4 w5 w6", "w7", "lovely w8 dull", "is w9 w10"]
NAMES = ("a", "b", "__base__")
LIMITS = Limits(max_batch=8, max_wait_ms=20, max_new_tokens=16, max_queue=100)
NEW = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model = tiny.llama(folder / "llama")
    return model, {name: save_adapter(folder / name, model, lora(seed), seed) for seed, name in enumerate("ab", 1)}


def load(folders, limits=LIMITS):
    return Engine.load(str(folders[0]), folders[1], limits, use_cpu=True)


@pytest.fixture(scope="module")
def expected(folders):
    """What each adapter says to each prompt by itself, one prompt at a time, without any of this server's code."""
    said = {}
    for name in NAMES:
        alone = TrainedAdapter.load(folders[1]["a" if name == "__base__" else name], use_cpu=True)
        model = alone.model.unload() if name == "__base__" else alone.model
        for prompt in PROMPTS:
            ids = alone.tokenizer(prompt + "\n", return_tensors="pt")
            new = model.eval().generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
            said[name, prompt] = alone.tokenizer.decode(new, skip_special_tokens=True).strip()
    return said


@pytest.fixture(scope="module")
def served(folders):
    engine = load(folders)
    with listening(make_app(engine, max_body=4096)) as url, httpx.Client(base_url=url, timeout=90) as client:
        yield engine, client


def ask(client, adapter="a", prompt=PROMPTS[0], **more):
    return client.post("/generate", json={"adapter": adapter, "prompt": prompt, "max_new_tokens": NEW} | more)


def metric(client, name, **labels) -> float:
    found = 0.0
    for line in client.get("/metrics").text.splitlines():
        if re.match(rf"{name}(\{{| )", line) and all(f'{key}="{value}"' in line for key, value in labels.items()):
            found += float(line.rpartition(" ")[2])
    return found


def healthy(client, expected):
    assert client.get("/health").json()["status"] == "ok"
    answer = ask(client, "b")
    assert (answer.status_code, answer.json()["text"]) == (200, expected["b", PROMPTS[0]])


def test_fifty_concurrent_requests_each_get_their_adapter(served, expected):
    _, client = served
    assert len({expected[name, PROMPTS[1]] for name in NAMES}) == 3, "the adapters say the same; content shows nothing"
    before = metric(client, "fastpeft_batch_size_sum"), metric(client, "fastpeft_batch_size_count")

    async def one(session, index):
        name, prompt = NAMES[index % 3], PROMPTS[index % 5]
        answer = await session.post("/generate", json={"adapter": name, "prompt": prompt, "max_new_tokens": NEW})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["adapter"] == name
        assert found["text"] == expected[name, prompt], (name, prompt)
        return found

    async def all_at_once():
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as session:
            return await asyncio.gather(*(one(session, index) for index in range(50)))

    found = asyncio.run(all_at_once())
    assert all(answer["generated_tokens"] <= NEW and answer["finish_reason"] in ("stop", "length") for answer in found)
    rows = metric(client, "fastpeft_batch_size_sum") - before[0]
    batches = metric(client, "fastpeft_batch_size_count") - before[1]
    assert rows == 50
    assert batches <= 25, "requests for different adapters did not share batches"


def test_seeds_repeat_a_text_whatever_else_is_in_the_batch(served):
    _, client = served
    drawn = {"temperature": 1.5, "top_p": 0.95, "max_new_tokens": 10}
    alone = ask(client, seed=7, **drawn).json()
    answers: dict[int, dict] = {}
    seeds = [7, 8, 9, 10]
    threads = [
        threading.Thread(target=lambda s=s: answers.update({s: ask(client, seed=s, **drawn).json()})) for s in seeds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[7] == alone
    assert alone["seed"] == 7
    assert "tokens" not in alone
    assert len(ask(client, seed=7, return_tokens=True, **drawn).json()["tokens"]) == alone["generated_tokens"]
    assert len({answer["text"] for answer in answers.values()}) > 1


REFUSED = [
    ({"adapter": "c", "prompt": "w1"}, 404, "expected one of ['__base__', 'a', 'b'], got 'c'"),
    ({"adapter": "a", "prompt": "w1 " * 80}, 422, "expected at most 48 tokens"),
    ({"adapter": "a", "prompt": "x" * 5000}, 413, "expected at most 4096 bytes"),
    ({"adapter": "a"}, 422, "either prompt or messages"),
    ({"adapter": "a", "prompt": ""}, 422, "expected at least one token"),
    ({"prompt": "w1"}, 422, "body.adapter"),
    ({"adapter": "a", "prompt": "w1", "max_new_tokens": 17}, 422, "at most 16, got 17"),
    ({"adapter": "a", "prompt": "w1", "temperature": -1}, 422, "temperature"),
    ({"adapter": "a", "prompt": "w1", "top_p": 0}, 422, "top_p"),
    ({"adapter": "a", "prompt": "w1", "tempreature": 1}, 422, "tempreature"),
    ({"adapter": "a", "messages": [{"role": "user", "content": "w1"}]}, 422, "no chat template"),
    ({"adapter": "a", "messages": []}, 422, "messages"),
    ([], 422, "body"),
]


@pytest.mark.parametrize(("body", "code", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_bad_requests_are_refused_with_a_reason(served, expected, body, code, reason):
    _, client = served
    before = metric(client, "fastpeft_errors_total", path="/generate", code=code)
    answer = client.post("/generate", json=body)
    assert (answer.status_code, reason in answer.json()["error"]) == (code, True), answer.text
    assert metric(client, "fastpeft_errors_total", path="/generate", code=code) == before + 1
    healthy(client, expected)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"nonsense", b'{"adapter": "a", "prompt": "w1"'])
def test_malformed_json_is_a_400(served, expected, content):
    _, client = served
    answer = client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert "error" in answer.json()
    healthy(client, expected)


def test_other_paths_and_the_other_task_are_404(served):
    _, client = served
    assert client.post("/classify", json={"adapter": "a", "text": "w1"}).status_code == 404
    assert client.get("/nothing").status_code == 404
    assert client.get("/generate").status_code == 405
    assert metric(client, "fastpeft_requests_total", path="other", code=404) == 1


def test_a_body_without_length_is_limited_too(served, expected):
    _, client = served
    answer = client.post("/generate", content=(b"x" * 1000 for _ in range(10)))
    assert answer.status_code == 413
    healthy(client, expected)


def _send(client, body: dict) -> socket.socket:
    data = json.dumps(body).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection((client.base_url.host, client.base_url.port))
    connection.sendall(head.encode() + data)
    return connection


def _until(condition, seconds=60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_client_that_hangs_up_is_let_go_and_the_server_goes_on(folders, expected, monkeypatch):
    """Its row ends at the next token, and requests that waited beside it are answered."""
    engine = load(folders, Limits(max_batch=4, max_wait_ms=1, max_new_tokens=50))
    slow = threading.Event()
    run = engine.batcher._run
    monkeypatch.setattr(engine.batcher, "_run", lambda jobs: (slow.wait(60), run(jobs)))
    taken, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: (submit(request), taken.append(request)))
    with listening(make_app(engine)) as url, httpx.Client(base_url=url, timeout=90) as client:
        for count in range(1, 4):  # the first is in its batch, the others wait
            with _send(client, {"adapter": "a", "prompt": "w1", "max_new_tokens": 50}):
                assert _until(lambda count=count: len(taken) == count and taken[0].future.running())
        assert _until(lambda: metric(client, "fastpeft_abandoned_total") == 3)
        assert metric(client, "fastpeft_requests_total", code=499) == 3
        slow.set()
        healthy(client, expected)
        assert metric(client, "fastpeft_rows_total", adapter="a") == 1, "those that waited never reached the model"
        assert metric(client, "fastpeft_tokens_total", kind="generated") <= 1 + NEW
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")  # and no more
        healthy(client, expected)


def test_a_full_queue_is_429_and_a_closing_server_finishes_what_waits(folders, expected, monkeypatch):
    engine = load(folders, Limits(max_batch=1, max_wait_ms=0, max_queue=2, max_new_tokens=16))
    go, computing = threading.Event(), threading.Event()
    run = engine.batcher._run
    monkeypatch.setattr(engine.batcher, "_run", lambda jobs: (computing.set(), go.wait(60), run(jobs)))
    answers: list[httpx.Response] = []
    with listening(make_app(engine)) as url, httpx.Client(base_url=url, timeout=90) as client:
        body = {"adapter": "b", "prompt": PROMPTS[0], "max_new_tokens": NEW}
        post = lambda: answers.append(httpx.post(f"{url}/generate", json=body, timeout=90))  # noqa: E731
        threads = [threading.Thread(target=post) for _ in range(3)]
        threads[0].start()
        assert computing.wait(60)
        for thread in threads[1:]:
            thread.start()
        assert _until(lambda: engine.batcher.depth == 2)
        refused = ask(client, "b")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "at most 2 waiting" in refused.json()["error"]
        assert metric(client, "fastpeft_queue_depth") == 2
        threading.Timer(0.3, go.set).start()
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert {answer.json()["text"] for answer in answers} == {expected["b", PROMPTS[0]]}
    assert not engine.batcher.alive


def test_a_failing_batch_is_500_for_the_one_at_fault_only(served, expected, monkeypatch):
    engine, client = served
    write = engine._write

    def fails_on_a(requests, names):
        if any(request.adapter == "a" for request in requests):
            raise RuntimeError("planted")
        write(requests, names)

    monkeypatch.setattr(engine, "_write", fails_on_a)
    answers: dict[str, httpx.Response] = {}
    threads = [threading.Thread(target=lambda n=n: answers.update({n: ask(client, n)})) for n in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: answer.status_code for name, answer in answers.items()} == {"a": 500, "b": 200, "__base__": 200}
    assert answers["b"].json()["text"] == expected["b", PROMPTS[0]]
    monkeypatch.undo()
    healthy(client, expected)


def test_adapters_are_described(served, folders):
    _, client = served
    described = client.get("/adapters").json()
    assert (described["task"], described["model"]) == ("causal_lm", str(folders[0]))
    assert [(row["name"], row["method"], row["mixed"]) for row in described["adapters"]] == [
        ("__base__", None, True),
        ("a", "LORA", True),
        ("b", "LORA", True),
    ]
