"""A service as the official `openai` client meets it."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tiny_bundle import write_tiny_bundle

from benchmarks.serving.served import Served, picture, served
from saferedir.runtime.backend import Backend, BackendAround, Call, Tensors
from saferedir.runtime.serve.keys import add_key

#: Steps of a request that is to be left while it is drawn.
MANY = 999


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    bundle = write_tiny_bundle(folder / "tiny")
    with served(folder, bundle=str(bundle), most_steps=MANY, body_bytes=100_000, keep_prompts=True) as own:
        yield own


def test_a_picture_and_the_same_again_by_its_seed(tiny: Served) -> None:
    client = tiny.client()
    drawn = client.images.generate(prompt="a church", n=2, model="tiny", size="8x8", quality="low", extra_body={"seed": 7})
    assert drawn.data is not None and [picture(str(own.b64_json)).size for own in drawn.data] == [(8, 8)] * 2
    assert (drawn.size, drawn.quality, drawn.output_format) == ("8x8", "low", "png")
    assert drawn.usage is not None and (drawn.usage.input_tokens, drawn.usage.output_tokens) == (2, 24)
    (again,) = client.images.generate(prompt="a church", quality="low", extra_body={"seed": 8}).data or []
    assert again.b64_json == drawn.data[1].b64_json != drawn.data[0].b64_json


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
def test_formats(tiny: Served, kind: Any) -> None:
    drawn = tiny.client().images.generate(prompt="a cat", output_format=kind, output_compression=50, moderation="low")
    assert drawn.data is not None and picture(str(drawn.data[0].b64_json)).format == kind.upper()


def test_a_stream_shows_the_picture_as_it_comes(tiny: Served) -> None:
    events = list(tiny.client().images.generate(prompt="a cat", stream=True, partial_images=3, extra_body={"seed": 1}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    whole = tiny.client().images.generate(prompt="a cat", extra_body={"seed": 1}).data or []
    assert events[-1].b64_json == whole[0].b64_json
    assert events[-1].usage.total_tokens > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "a" * 10_001}, "prompt", "this service takes 10000 at most"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"size": "7x7"}, None, "7"),
        ({"size": "huge"}, "size", "pattern"),
        ({"model": "another"}, "model", "expected 'tiny'"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"partial_images": 2}, "partial_images", "for stream"),
        ({"stream": True, "n": 2}, "n", "one picture"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"extra_body": {"seed": "seven"}}, "seed", "valid integer"),
        ({"extra_body": {"safety": False}}, "safety", "Unknown parameter"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tiny: Served, asked: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        tiny.client().images.generate(**{"prompt": "a cat", **asked})
    assert refused.value.param == param and refused.value.type == "invalid_request_error"
    assert refused.value.request_id is not None and refused.value.request_id.startswith("req_")


def test_models(tiny: Served) -> None:
    client = tiny.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "saferedir"
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[1]", 400, "invalid_value"),
        (b'{"prompt": "\\ud800"}', 400, "invalid_value"),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, "body_too_large"),
    ],
    ids=["unparsable", "not UTF-8", "a list", "half a character", "10 MB"],
)
def test_bodies_that_are_none(tiny: Served, body: bytes, status: int, code: str) -> None:
    answer = tiny.http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["x-request-id"].startswith("req_")


def test_no_such_place_and_no_such_method(tiny: Served) -> None:
    assert tiny.http.get("/nowhere").json()["error"]["code"] == "not_found"
    answer = tiny.http.get("/v1/pictures")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


def test_requests_of_one_key_are_one_picture_and_one_record(tiny: Served) -> None:
    client, before, answers = tiny.client(), len(tiny.records()), []

    def ask() -> None:
        drawn = client.images.generate(prompt="a cat", extra_headers={"Idempotency-Key": "one"})
        answers.append((drawn.data or [])[0].b64_json)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ask()
    assert len(answers) == 6 and len(set(answers)) == 1  # seeds are random: it was drawn once
    assert len(tiny.records()) == before + 1
    with pytest.raises(openai.ConflictError, match="another request"):
        client.images.generate(prompt="a dog", extra_headers={"Idempotency-Key": "one"})
    with pytest.raises(openai.BadRequestError, match="without stream"):
        list(client.images.generate(prompt="a cat", stream=True, extra_headers={"Idempotency-Key": "two"}))


def test_the_service_says_what_it_did(tiny: Served) -> None:
    body = {"prompt": "a church", "negative_prompt": "a cat", "steps": 4, "seed": 3, "sampler": "euler", "pictures": 2}
    answer = tiny.http.post("/v1/pictures", json=body).json()
    first, second = answer["pictures"]
    assert (first["record"]["seed"], second["record"]["seed"]) == (3, 4)
    assert first["record"]["scheduler"] == "euler" and len(first["record"]["steps"]) == 4
    record = tiny.records()[-1]
    assert record["id"] == second["id"] and (record["steps"], record["outcome"], record["seed"]) == (4, "drawn", 4)
    tighter = tiny.http.post("/v1/pictures", json={**body, "tighten": {"thresholds": {"church": 0.2}}}).json()
    assert tighter["pictures"][0]["record"]["looked_for"]["church"]["threshold"] == pytest.approx(0.2)
    looser = tiny.http.post("/v1/pictures", json={**body, "tighten": {"thresholds": {"church": 0.9}}})
    assert looser.status_code == 400 and "a request may only lower it" in looser.json()["error"]["message"]


def test_progress_comes_after_every_step(tiny: Served) -> None:
    body = {"prompt": "a church", "steps": 5, "pictures": 2, "stream": True, "previews": 2}
    with tiny.http.stream("POST", "/v1/pictures", json=body) as answer:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    progress, previews = ([event for event in events if event["type"] == kind] for kind in ("progress", "preview"))
    assert [event["done"] for event in progress] == list(range(1, 11)) and progress[0]["total"] == 10
    assert {event["picture"] for event in previews} == {0, 1} and len(previews) == 4
    assert (len(events), events[-1]["type"], len(events[-1]["pictures"])) == (15, "completed", 2)
    record = events[-1]["pictures"][1]["record"]
    scores = [event["scores"] for event in progress if event["picture"] == 1]
    assert scores == [step["score"] for step in record["steps"]]


def slow(backend: Backend, seconds: float = 0.005) -> Backend:
    """Another backend, whose protected steps take so long at least."""

    class Slow(BackendAround):
        def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
            call = super().bind(engine, inputs, outputs, rows)

            def slow() -> None:
                time.sleep(seconds if engine == "step" else 0)
                call()

            return slow

    return Slow(backend)


def test_clients_that_leave_free_their_rows_in_the_next_step(tmp_path: Path) -> None:
    rng, late = random.Random(0), []
    with served(tmp_path, bundle=str(write_tiny_bundle(tmp_path / "tiny")), most_steps=MANY, change=slow) as own:
        batcher = own.service.batcher
        for number in range(200):
            sent = json.dumps({"prompt": "a church", "steps": MANY, "stream": bool(number % 2)}).encode()
            with socket.create_connection(("127.0.0.1", own.settings.port)) as connection:
                head = (
                    "POST /v1/pictures HTTP/1.1",
                    "host: x",
                    "content-type: application/json",
                    f"content-length: {len(sent)}",
                )
                connection.sendall("\r\n".join((*head, "", "")).encode() + sent)
                own.wait_until(lambda: batcher.running == 1)
                (ticket,) = (ticket for group in batcher._groups.values() for ticket in group.tickets.values())
                time.sleep(rng.uniform(0, 0.04))
            done = ticket.done
            own.wait_until(lambda: batcher.running == 0)
            late.append(ticket.done - done)
        own.wait_until(lambda: len(own.records()) == 200)
        assert [record["outcome"] for record in own.records()] == ["cancelled"] * 200
        assert np.median(late) <= 2  # the step under way, and one more while the connection is seen to close


class Failing(BackendAround):
    """Another backend, whose safety raises when it is told to."""

    failing = False

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        call = super().bind(engine, inputs, outputs, rows)

        def failing() -> None:
            if Failing.failing and engine == "step":
                raise RuntimeError("device lost")
            call()

        return failing


def test_a_safety_failure_is_told_once_and_the_service_recovers(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    with served(tmp_path, bundle=str(bundle), change=Failing) as own:
        Failing.failing = True
        try:
            with pytest.raises(openai.InternalServerError, match="no picture leaves without it") as failed:
                own.client().images.generate(prompt="a church")
            assert failed.value.code == "safety_failed"
            assert [record["outcome"] for record in own.records()] == ["failed"]  # one request: it was not sent again
            assert own.http.get("/ready").status_code == 503
        finally:
            Failing.failing = False
        own.wait_until(lambda: own.http.get("/ready").status_code == 200)
        own.client().images.generate(prompt="a church")


def test_keys_and_rates(tmp_path: Path) -> None:
    bundle, keys = write_tiny_bundle(tmp_path / "tiny"), tmp_path / "keys.json"
    key = add_key(keys, "acme", pictures_per_minute=3)
    assert key not in keys.read_text()
    with served(tmp_path, bundle=str(bundle), keys=keys) as own:
        with pytest.raises(openai.AuthenticationError, match="not known"):
            own.client("srk_wrong").images.generate(prompt="a cat")
        client = own.client(key, max_retries=0)
        client.images.generate(prompt="a cat", n=3)
        with pytest.raises(openai.RateLimitError) as limited:
            client.images.generate(prompt="a cat")
        assert int(limited.value.response.headers["retry-after"]) in (19, 20)
        assert {record["tenant"] for record in own.records()} == {"acme"}


def test_what_cannot_be_drawn_in_time_is_refused(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")

    with served(tmp_path, bundle=str(bundle), change=partial(slow, seconds=0.02), queue=6) as own:
        answer = own.http.post("/v1/pictures", json={"prompt": "a cat", "steps": 40, "within": 0.3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1 and "past its deadline" in answer.json()["error"]["message"]
        client = own.client(max_retries=0)
        with ThreadPoolExecutor() as pool:
            first = pool.submit(client.images.generate, prompt="a cat", n=10)
            own.wait_until(lambda: own.service.batcher.running > 0)
            with pytest.raises(openai.RateLimitError, match="would wait, and 6 may"):
                client.images.generate(prompt="a cat", n=10)
            first.result()
        assert len(own.records()) == 10  # what never began has none
