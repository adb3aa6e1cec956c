"""`transformers serve` with a saved folder, asked by the `openai` client; and the script that starts it."""

import json
import os
import signal
import socket
import threading
import time
import urllib.request

import pytest
import torch
from harness import ROOT, Command, calls, flags, ran, shell, stub_python
from tiny_models import save_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import MLPMemory

openai = pytest.importorskip("openai", reason="the package openai is not installed")
pytest.importorskip("uvicorn", reason="the package uvicorn is not installed")

CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
TOO_LONG = "longer than the base's context of 128"
SCRIPT = ROOT / "scripts" / "serve.sh"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    base, memory = save_models(made, context=128)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT
    MLPMemory.from_pretrained(base, memory, lmbda=0.5).save_pretrained(made / "joint", tokenizer=tokenizer)
    return made / "joint"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """`transformers serve` in a process of its own, and a client of it."""

    def __init__(self, folder, log, port):
        words = ("serve", folder, "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", port)
        self.name, self.port, self.address = str(folder), port, f"http://127.0.0.1:{port}"
        self.command = Command(log, "transformers.cli.transformers", *words)
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)
        while not self.answers():
            assert self.command.process.is_alive(), self.command.text()
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/health", timeout=5).status == 200
        except OSError:
            return False

    def stop(self) -> None:
        if self.command.process.is_alive():
            self.command.kill(signal.SIGINT)
            self.command.wait()

    def chat(self, text: str, *, model: str | None = None, stream: bool = False, tokens: int = 12) -> str:
        answer = self.client.chat.completions.create(
            model=model or self.name,
            messages=[{"role": "user", "content": text}],
            max_completion_tokens=tokens,
            temperature=0,
            stream=stream,
        )
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    served = Server(folder, tmp_path_factory.mktemp("server") / "log", free_port())
    yield served
    served.stop()


def generated(folder, text: str, tokens: int = 12) -> str:
    """What `generate` continues a chat with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        made = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_what_generate_says(server, folder, stream):
    assert server.chat("who wrote it?", stream=stream) == generated(folder, "who wrote it?")


def test_two_requests_at_once_get_each_their_own_answer(server, folder):
    texts = ["who wrote it?", "is the moon here?"]
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda text=text: found.update({text: server.chat(text)})) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: generated(folder, text) for text in texts}


def test_what_cannot_be_answered_is_refused_with_the_reason(server, folder):
    long = "who wrote it? " * 100
    for words, reason in (({"model": "another", "text": "hello"}, "requested 'another'"), ({"text": long}, TOO_LONG)):
        with pytest.raises(openai.BadRequestError) as caught:
            server.chat(**words)
        assert reason in caught.value.response.text
    with pytest.raises(openai.APIError) as caught:
        server.chat(long, stream=True)
    assert TOO_LONG in str(caught.value.body)
    assert server.chat("hello") == generated(folder, "hello")


def test_a_stopped_server_starts_again_on_its_port(server, folder, tmp_path):
    server.stop()
    assert not server.answers()
    again = Server(folder, tmp_path / "log", server.port)
    assert again.chat("hello", tokens=4) == generated(folder, "hello", 4)
    again.stop()


# The script


def test_the_script_exports_the_quickstarts_memory_and_serves_it_on_loopback(tmp_path):
    for epoch in ("epoch_1", "epoch_2"):
        (tmp_path / "quick" / "work" / "memory" / epoch).mkdir(parents=True)
        (tmp_path / "quick" / "work" / "memory" / epoch / "config.json").write_text("{}")
    results = {"lambda": 0.55, "memory_temp": 2.0, "examples": []}
    (tmp_path / "quick" / "results.json").write_text(json.dumps(results))
    program = tmp_path / "python"
    stub = stub_python(tmp_path / "stub")
    program.write_text(f'#!/bin/sh\n[ "$2" != demo.pair ] || exec "$REAL" "$@"\nexec {stub} "$@"\n')
    program.chmod(0o755)
    environment = {"PYTHON": program, "REAL": os.sys.executable, "OUTPUT": tmp_path / "quick", "PORT": free_port()}
    done = shell("bash", SCRIPT, **environment)
    assert done.returncode == 0, done.stderr
    export, serve = calls(stub)
    work = tmp_path / "quick" / "work"
    assert export[:5] == [
        "-m",
        "models.export",
        str(work / "embedded" / "model"),
        str(work / "memory" / "epoch_2"),
        str(tmp_path / "quick" / "served"),
    ]
    assert (flags(export)["--lmbda"], flags(export)["--memory_temp"]) == ("0.55", "2.0")
    assert serve[:4] == ["-m", "transformers.cli.transformers", "serve", str(tmp_path / "quick" / "served")]
    assert flags(serve)["--host"] == "127.0.0.1"


def test_the_script_takes_another_pair_and_says_what_is_missing(tmp_path):
    settings = {"MODEL": "a/base", "KNN_PATH": "a/memory", "LAMBDA": 0.3, "FOLDER": tmp_path / "out"}
    _, (export, serve) = ran(tmp_path, SCRIPT, "--device", "cpu", **settings, PORT=free_port())
    assert export[2:5] == ["a/base", "a/memory", str(tmp_path / "out")] and flags(export)["--lmbda"] == "0.3"
    assert flags(serve)["--device"] == "cpu"
    done = shell("bash", SCRIPT, PYTHON=os.sys.executable, OUTPUT=tmp_path / "nothing", PORT=free_port())
    assert done.returncode == 2 and str(tmp_path / "nothing") in done.stderr


def test_a_port_in_use_is_told_before_anything_is_written(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = shell("bash", SCRIPT, PYTHON=stub_python(tmp_path), OUTPUT=tmp_path, PORT=port)
    assert done.returncode == 2 and f"PORT={port}" in done.stderr and calls(tmp_path / "python-stub") == []
