"""What an operator does with a service: settings, metrics, traces, replays, and its commands."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from typer.testing import CliRunner

from benchmarks.serving.served import Served, picture, running, served
from saferedir.engines.errors import RequestError, SafeRedirError, VerificationError
from saferedir.runtime import Pipeline
from saferedir.runtime.command_line.app import app
from saferedir.runtime.serve.audit import Audit
from saferedir.runtime.serve.metrics import Drift
from saferedir.runtime.serve.replaying import replay
from saferedir.runtime.serve.settings import read_settings
from saferedir.runtime.serve.tracing import Tracing


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("operation"), keep_prompts=True) as own:
        yield own


def test_pictures_that_were_drawn_in_company_are_replayed_to_the_byte(embedded: Served) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "a church next to a cat", "steps": 6, "seed": 5, "pictures": 3},
        {"prompt": "a dog", "steps": 5, "guidance_scale": 1.0},
        {"prompt": "a castle in ink style", "negative_prompt": "a dog", "steps": 9, "sampler": "euler-ancestral"},
        {"prompt": "a cat", "steps": 4, "guidance_scale": 7.5, "tighten": {"thresholds": {"church": 0.1}}},
    ]
    answers: list[Any] = []
    asking = [
        threading.Thread(target=lambda body=body: answers.append(embedded.http.post("/v1/pictures", json=body).json()))  # type: ignore[misc]
        for body in bodies
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    pipeline = Pipeline.from_bundle(threads=1)
    pictures = [own for answer in answers for own in answer["pictures"]]
    assert len(pictures) == 6
    for own in pictures:
        assert replay(embedded.audit, own["id"], pipeline).tobytes() == picture(own["b64_json"]).tobytes()
    first = pictures[0]["id"]
    with pytest.raises(RequestError, match="not the prompts of"):
        replay(embedded.audit, first, pipeline, prompt="another")
    with pytest.raises(SafeRedirError, match="has no record"):
        replay(embedded.audit, "img_none", pipeline)


def test_metrics_count_what_was_done(embedded: Served) -> None:
    def metrics() -> dict[str, float]:
        lines = embedded.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}

    before = metrics()
    embedded.http.post("/v1/pictures", json={"prompt": "a church next to a cat", "steps": 4, "pictures": 2})
    embedded.http.post("/v1/pictures", json={"prompt": "", "steps": 4})
    after = metrics()
    gained = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert gained['saferedir_pictures_total{outcome="redirected"}'] == 2
    assert gained['saferedir_concepts_total{action="redirect",concept="church"}'] == 2
    assert gained['saferedir_requests_total{status="400"}'] == 1
    assert gained["saferedir_step_rows_total"] == 8 and gained["saferedir_steps_total"] <= 8
    assert gained["saferedir_audit_seconds_count"] == gained["saferedir_decode_seconds_count"] == 1
    assert after["saferedir_pictures_running"] == after["saferedir_pictures_waiting"] == 0


def test_drift_is_nothing_where_scores_are_the_calibrations() -> None:
    rng = np.random.default_rng(0)
    reference = rng.beta(1, 8, 20_000)
    drift = Drift(np.quantile(reference, np.arange(1, 10) / 10))
    assert np.isnan(drift.index)
    for score in rng.beta(1, 8, 1000):
        drift.seen(float(score))
    assert drift.index < 0.05
    for score in rng.beta(2, 4, 1000):
        drift.seen(float(score))
    assert drift.index > 0.25
    assert np.isnan(Drift(()).index)


def test_a_request_is_a_span(embedded: Served) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    usual, embedded.service._tracing = embedded.service._tracing, Tracing(provider.get_tracer("test"))
    try:
        embedded.http.post("/v1/pictures", json={"prompt": "a church next to a cat", "steps": 4})
    finally:
        embedded.service._tracing = usual
    (span,) = exporter.get_finished_spans()
    told = dict(span.attributes or {})
    assert span.name == "generate_content emoji-diffusion"
    assert (told["gen_ai.output.type"], told["gen_ai.request.model"]) == ("image", "emoji-diffusion")
    assert (told["saferedir.outcome"], told["saferedir.redirected"]) == ("drawn", ("church",))
    assert "church next" not in str(told)


def test_flags_come_before_the_environment_and_that_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "serve.toml").write_text("port = 1\nqueue = 2\nseconds = 3.0\n")
    monkeypatch.setenv("SAFEREDIR_SERVE_PORT", "10")
    monkeypatch.setenv("SAFEREDIR_SERVE_QUEUE", "20")
    settings = read_settings({"port": 100, "host": None}, file)
    assert (settings.port, settings.queue, settings.seconds, settings.host) == (100, 20, 3.0, "127.0.0.1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 70000", "setting port is 70000: Input should be less than or equal to 65535"),
        ("ports = 1", "setting ports is 1: Extra inputs are not permitted"),
        ("safety = false", "setting safety is False: Extra inputs"),
        ("port = ", "serve.toml cannot be read as settings"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path: Path, text: str, message: str) -> None:
    (file := tmp_path / "serve.toml").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_settings({}, file)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, catch_exceptions=True)


def test_check_says_what_would_be_in_force(tmp_path: Path) -> None:
    audit = f"sqlite:///{tmp_path}/audit.db"
    told = json.loads(run("serve", "--check", "--audit", audit, "--port", "9000").output)
    assert (told["bundle"], told["policy"], told["settings"]["port"]) == ("emoji-diffusion", "built-in", 9000)
    assert set(told["actions"].values()) == {"redirect"} and "at most 0.1 %" in told["promise"]
    assert told["settings"]["audit_key"] == "**********" or told["settings"]["audit_key"] == ""
    (many := tmp_path / "many.toml").write_text("rows = 17")
    assert "rows is 17" in str(run("serve", "--check", "--config", str(many), "--audit", audit).exception)
    failed = run("serve", "--check", "--audit", "sqlite:////nowhere/audit.db")
    assert "cannot be opened" in str(failed.exception)


def test_commands_of_policy_audit_and_keys(tmp_path: Path, embedded: Served) -> None:
    assert json.loads(run("policy", "schema").output)["$ref"].endswith("PolicyFile")
    (old := tmp_path / "old.json").write_text('{"version": "1"}')
    (new := tmp_path / "new.json").write_text('{"version": "2", "concepts": {"church": {"action": "block"}}}')
    (prompts := tmp_path / "prompts.txt").write_text("a church next to a cat\na dog\n")
    rows = json.loads(run("policy", "diff", str(old), str(new), "--prompts", str(prompts), "--steps", "4", "--json").output)
    assert rows == [{"prompt": "a church next to a cat", "concept": "church", "before": "redirect", "after": "block"}]
    audit = embedded.settings.audit
    head = run("audit", "verify", "--audit", audit).output.split()[-1]
    id = embedded.http.post("/v1/pictures", json={"prompt": "a dog", "steps": 4}).json()["pictures"][0]["id"]
    assert "to the byte" in run("audit", "replay", id, "--audit", audit, "--out", str(tmp_path / "again.png")).output
    assert (tmp_path / "again.png").exists()
    assert run("audit", "forget", id, "--audit", audit).exit_code == 0
    assert isinstance(run("audit", "replay", id, "--audit", audit).exception, RequestError)
    key = run("keys", "new", "acme", "--file", str(tmp_path / "keys.json")).output.strip()
    assert key.startswith("srk_") and key not in (tmp_path / "keys.json").read_text()
    opened = Audit(audit)
    opened._key = b"another"
    assert list(opened.verify())
    opened.close()
    assert json.loads(run("audit", "verify", "--audit", audit, "--since", head, "--json").output)["problems"] == []
    assert isinstance(run("audit", "verify", "--audit", audit, "--audit-key", "another").exception, VerificationError)


def test_it_serves_from_the_command_line(tmp_path: Path) -> None:
    with running(tmp_path) as (process, address):
        drawn = httpx.post(f"{address}/v1/images/generations", json={"prompt": "a cat", "quality": "low"}, timeout=60)
        assert drawn.status_code == 200
        assert picture(drawn.json()["data"][0]["b64_json"]).size == (64, 64)
    assert process.returncode == 0


def test_what_is_not_finished_when_it_stops_is_told_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEREDIR_SERVE_DRAIN_SECONDS", "0.2")
    with running(tmp_path) as (process, address), ThreadPoolExecutor() as pool:
        body = {"prompt": "a cat", "quality": "high", "n": 10}
        asked = pool.submit(httpx.post, f"{address}/v1/images/generations", json=body, timeout=60)
        while "saferedir_pictures_running 0.0" in httpx.get(f"{address}/metrics").text:
            time.sleep(0.01)
        process.terminate()
        answer = asked.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining") and process.returncode == 0
    outcomes = [body["outcome"] for body in Audit(f"sqlite:///{tmp_path}/audit.db", make=False).bodies()]
    assert outcomes == ["cancelled"] * 10
