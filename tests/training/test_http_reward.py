"""A reward behind HTTP: what is sent, what may come back, and what a slow, flaky or hostile server can do."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest
import torch

from minirlhf.data.records import Message, Prompt
from minirlhf.runs import InputError
from minirlhf.training import http_reward
from minirlhf.training.http_reward import RemoteConfig, ask, http_scorer, shown
from minirlhf.training.reward_sources import open_reward
from tests.training.test_rewards import INDEX, Letters, rollout

Reply = Callable[[dict[str, Any], int], tuple[int, Any]]
"""(request, number of the request) -> status and answer; an answer that is not bytes is sent as JSON."""
QUICK = RemoteConfig(reward_timeout=5.0, reward_retries=2, reward_backoff=0.01)
CHAT = (Message("user", "hi"),)
PROMPTS = [
    Prompt("zero", {"n": 0}, 1),
    Prompt("one", None, 2),
    Prompt("\n\nHuman: hi\n\nAssistant:", {"n": 2}, 3, CHAT),
]


class Server(ThreadingHTTPServer):
    """Answers as it is told; `requests` is what it was asked."""

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.types = reply, list[dict[str, Any]](), set[str | None]()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silence: some tests hang up on it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = cast(Server, self.server)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.requests.append(body)
        server.types.add(self.headers["content-type"])
        status, answer = server.reply(body, len(server.requests))
        if status == 0:  # hang up in the middle
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        sent = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Server]]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    running: list[tuple[Server, threading.Thread]] = []

    def start(reply: Reply) -> Server:
        server = Server(reply)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def lengths(body: dict[str, Any], number: int) -> tuple[int, Any]:
    return 200, {"rewards": [len(text) + 0.5 for text in body["responses"]], "extra": "is ignored"}


def score(server: Server, said: list[object] | None = None, config: RemoteConfig = QUICK) -> torch.Tensor:
    say = (lambda line: None) if said is None else said.append
    return http_scorer(server.url, Letters(), PROMPTS, config=config, say=say)(rollout(), INDEX)


def test_the_endpoint_gets_texts_facts_messages_and_queries_and_its_rewards_keep_their_order(
    serve: Callable[[Reply], Server],
) -> None:
    server, said = serve(lengths), list[object]()
    assert score(server, said).tolist() == [2.5, 1.5, 0.5, 3.5]
    probe, request = server.requests
    assert probe == {
        "prompts": ["zero"],
        "responses": [""],
        "facts": [{"n": 0}],
        "messages": None,
        "query": ["zero"],
    }
    chat, talk = "\n\nHuman: hi\n\nAssistant:", [{"role": "user", "content": "hi"}]
    assert request == {
        "prompts": [chat, "zero", "one", chat],
        "responses": ["bc", "h", "", "efg"],
        "facts": [{"n": 2}, {"n": 0}, None, {"n": 2}],
        "messages": [talk, None, None, talk],
        "query": [f"{chat}bc", "zeroh", "one", f"{chat}efg"],
    }
    assert server.types == {"application/json"} and not said


def test_batches_are_small_and_come_back_in_order(serve: Callable[[Reply], Server]) -> None:
    server = serve(lengths)
    config = RemoteConfig(reward_batch=3, reward_timeout=5.0)
    assert score(server, config=config).tolist() == [2.5, 1.5, 0.5, 3.5]
    assert [len(request["responses"]) for request in server.requests] == [1, 3, 1]


def test_text_that_is_not_ascii_arrives_as_it_is(serve: Callable[[Reply], Server]) -> None:
    server = serve(lengths)
    ask(server.url, [PROMPTS[0]], ['日本 "\\\u2028'], config=QUICK, say=print)
    assert server.requests[0]["responses"] == ['日本 "\\\u2028']


@pytest.mark.parametrize("failure", [503, 500, 429, 0])
def test_a_passing_failure_is_tried_again_and_said(serve: Callable[[Reply], Server], failure: int) -> None:
    def flaky(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return lengths(body, number) if number in (1, 4) else (failure, b"come back later")

    server, said = serve(flaky), list[object]()
    assert score(server, said).tolist() == [2.5, 1.5, 0.5, 3.5]
    assert len(server.requests) == 4 and len(said) == 1
    assert f"reward {server.url}: answered after 2 more tries (" in str(said[0])
    assert ("status" in str(said[0]) and "come back later" in str(said[0])) == bool(failure)


def test_the_number_of_tries_is_bounded_and_the_waits_double(
    serve: Callable[[Reply], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(http_reward.time, "sleep", waits.append)
    server = serve(lambda body, number: (502, b"bad gateway"))
    config = RemoteConfig(reward_retries=3, reward_backoff=0.25, reward_timeout=5.0)
    with pytest.raises(
        InputError, match=r"no answer in 4 tries \(status 502: 'bad gateway'\); is the server up"
    ):
        ask(server.url, PROMPTS[:1], ["a"], config=config, say=print)
    assert len(server.requests) == 4 and waits == [0.25, 0.5, 1.0]


def test_nobody_at_the_address_is_told_before_anything_is_sampled() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
        with pytest.raises(InputError, match=r"score: no answer in 3 tries \(Connect"):
            http_scorer(url, Letters(), PROMPTS, config=QUICK, say=print)


@pytest.mark.parametrize("dripping", [False, True])
def test_a_slow_server_is_a_timeout_also_when_it_drips(
    serve: Callable[[Reply], Server], monkeypatch: pytest.MonkeyPatch, dripping: bool
) -> None:
    done = threading.Event()

    class Slow(Handler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            for _ in range(40 * dripping):
                done.wait(0.05)
                self.wfile.write(b" ")
            done.wait(2)

    server = serve(lengths)
    monkeypatch.setattr(server, "RequestHandlerClass", Slow)
    config = RemoteConfig(reward_timeout=0.2, reward_retries=1, reward_backoff=0.0)
    start = time.monotonic()
    with pytest.raises(InputError, match="no answer in 2 tries"):
        ask(server.url, PROMPTS[:1], ["a"], config=config, say=print)
    assert time.monotonic() - start < 3
    done.set()


WANTED = r'expected {"rewards": \[one finite number per response\]}, got '


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (200, {"rewards": [1.0]}, r"expected 2 rewards, got 1: .*rewards"),
        (200, {"rewards": [1.0, 2.0, 3.0]}, "expected 2 rewards, got 3"),
        (200, b'{"rewards": [1.0, NaN]}', "the reward of response 1 is 'nan', not a finite number"),
        (200, b'{"rewards": [-Infinity, 1]}', "the reward of response 0 is '-inf', not a finite number"),
        (200, {"rewards": [10**400, 1]}, "the reward of response 0 is '1000"),
        (200, {"rewards": [1e39, 1]}, "the reward of response 0 is '1e.39', not a finite number"),
        (200, {"rewards": [1, True]}, "the reward of response 1 is 'True', not a finite number"),
        (200, {"rewards": [1, "2"]}, "the reward of response 1 is '2', not"),
        (200, {"rewards": [1, None]}, "the reward of response 1 is 'None', not"),
        (200, {"rewards": [1, [2]]}, r"the reward of response 1 is '\[2\]', not"),
        (200, {"rewards": {"0": 1}}, WANTED + r".*\"0\""),
        (200, {"scores": [1, 2]}, WANTED + ".*scores"),
        (200, [1.0, 2.0], WANTED + r".*\[1.0, 2.0\]"),
        (200, b"<html>hello", WANTED + "no JSON: '<html>hello'"),
        (200, b"", WANTED + "no JSON: ''"),
        (200, b"\xff\xfe\x00", WANTED + "no JSON"),
        (200, b"[" * 100_000, WANTED + "no JSON"),
        (200, b" " * (2 << 20), "expected at most .* bytes for 2 responses, got more"),
        (404, b"no \x1b[31m such page", r"expected status 200, got 404: 'no \\x1b\[31m such page'"),
        (422, {"detail": "x" * 1000}, "expected status 200, got 422: .*xxx' …$"),
        (301, b"", "expected status 200, got 301"),
        (204, b"", "expected status 200, got 204"),
    ],
)
def test_any_other_answer_stops_at_once_and_is_shown(
    serve: Callable[[Reply], Server], status: int, answer: Any, said: str
) -> None:
    server = serve(lambda body, number: (status, answer))
    with pytest.raises(InputError, match=said) as raised:
        ask(server.url, PROMPTS[:2], ["a", "b"], config=QUICK, say=print)
    assert len(server.requests) == 1
    assert server.url in str(raised.value) and len(str(raised.value)) < 500


def test_user_and_password_are_sent_and_never_shown(serve: Callable[[Reply], Server]) -> None:
    server = serve(lambda body, number: (403, b"who are you?"))
    url = server.url.replace("http://", "http://me:sec@ret@")
    assert shown(url) == server.url
    with pytest.raises(InputError) as raised:
        ask(url, PROMPTS[:1], ["a"], config=QUICK, say=print)
    assert "ret" not in str(raised.value).replace("reward", "") and server.url in str(raised.value)


def test_an_impossible_url_is_a_mistake_and_no_crash() -> None:
    with pytest.raises(InputError, match="reward http://a:b/c: not a URL"):
        ask("http://a:b/c", PROMPTS[:1], ["a"], config=QUICK, say=print)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward_timeout": 0.0}, "reward_timeout must be positive"),
        ({"reward_timeout": float("inf")}, "reward_timeout must be positive"),
        ({"reward_backoff": -1.0}, "reward_backoff not negative"),
        ({"reward_retries": -1}, "reward_retries must not be negative"),
        ({"reward_batch": 0}, "reward_batch at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RemoteConfig(**settings)


def test_without_httpx_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(http_reward.importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"pip install 'minirlhf\[judge\]'"):
        http_scorer("http://127.0.0.1:1/", Letters(), PROMPTS, config=QUICK, say=print)


@pytest.mark.parametrize("source", ["nowhere", "ftp://host/x", "no/such/dir"])
def test_what_is_no_source_is_told_what_would_be(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from minirlhf.training.setting import ReadingConfig, Setting

    with pytest.raises(InputError, match="reward"):
        open_reward(source, Setting(0, "cpu", ReadingConfig()))
