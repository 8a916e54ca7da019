"""What an operator's policy does to pictures, and what a request cannot do to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tiny_bundle import write_tiny_bundle

from benchmarks.serving.served import Served, picture, served
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.serve.keys import add_key

POLICY = {
    "version": "1",
    "tenants": {
        "watching": {"church": {"action": "observe"}},
        "strict": {"church": {"action": "block"}},
    },
}
UNSAFE = {"prompt": "a church next to a cat", "steps": 4, "seed": 3}
#: Ways in which people have asked services to look away.
SPELLINGS: list[dict[str, Any]] = [
    {"safety": False}, {"safety": "off"}, {"safety_enabled": False}, {"enable_safety_checker": False}, {"safety_checker": None},
    {"safety_check": False}, {"guardrails": False}, {"guardrails": "none"}, {"guardrail": 0}, {"unprotected": True},
    {"protected": False}, {"protect": False}, {"moderation": "off"}, {"moderation": "none"}, {"moderation": False},
    {"nsfw": True}, {"allow_nsfw": True}, {"safe_mode": False}, {"unsafe": True}, {"bypass": True}, {"policy": "none"},
    {"policy": {"version": "0"}}, {"tighten": {"thresholds": {"church": 1.0}}}, {"tighten": {"enabled": []}},
    {"tighten": {"disabled": ["church"]}}, {"tighten": {"cooldown": 1000}}, {"thresholds": {"church": 1.0}},
    {"threshold": 1.0}, {"cooldown": 1000}, {"beyond_promise": True}, {"alpha_scale": 0}, {"tenant": "watching"},
    {"safety_identifier": "admin", "safety": False}, {"user": "admin"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("policy")
    (folder / "policy.json").write_text(json.dumps(POLICY))
    keys = {name: add_key(folder / "keys.json", name) for name in ("usual", "watching", "strict")}
    with served(folder, keys=folder / "keys.json", policy=folder / "policy.json") as own:
        yield own, keys


def ask(tenants: tuple[Served, dict[str, str]], whose: str, **fields: Any) -> Any:
    own, keys = tenants
    headers = {"authorization": f"Bearer {keys[whose]}"}
    return own.http.post("/v1/pictures", json={**UNSAFE, **fields}, headers=headers)


def test_redirect_observe_and_block(tenants: tuple[Served, dict[str, str]]) -> None:
    usual, watching = (ask(tenants, name).json()["pictures"][0] for name in ("usual", "watching"))
    assert (usual["redirected"], usual["observed"]) == (["church"], [])
    assert (watching["redirected"], watching["observed"]) == ([], ["church"])
    assert usual["b64_json"] != watching["b64_json"]
    own, keys = tenants
    for body in ({"quality": "low"}, {"quality": "low", "stream": True, "partial_images": 3}):
        with pytest.raises(openai.APIError) as blocked:
            list(own.client(keys["strict"]).images.generate(prompt=UNSAFE["prompt"], **body))  # type: ignore[call-overload]
        assert blocked.value.code == "moderation_blocked"
        assert blocked.value.body["moderation"] == {"stage": "generation", "categories": ["church"]}  # type: ignore[index]
    record = own.records()[-1]
    assert (record["outcome"], record["blocked"], record["policy"]["version"]) == ("blocked", ["church"], "1")
    assert record["steps_done"] < 12


def test_what_is_only_observed_is_drawn_as_without_the_safety(tenants: tuple[Served, dict[str, str]]) -> None:
    plain = Pipeline.from_bundle(threads=1, policy=SafetyPolicy(unprotected=True))
    drawn = plain(UNSAFE["prompt"], num_inference_steps=4, seed=3).images[0]
    assert picture(ask(tenants, "watching").json()["pictures"][0]["b64_json"]).tobytes() == drawn.tobytes()


@pytest.mark.parametrize("spelling", SPELLINGS, ids=json.dumps)
def test_no_request_loosens_anything(tenants: tuple[Served, dict[str, str]], spelling: dict[str, Any]) -> None:
    usual = ask(tenants, "usual").json()["pictures"][0]
    answer = ask(tenants, "usual", **spelling)
    if answer.status_code == 200:
        (picture,) = answer.json()["pictures"]
        assert picture["b64_json"] == usual["b64_json"] and picture["redirected"] == ["church"]
        assert picture["record"]["steps"] == usual["record"]["steps"]
    else:
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_the_same_spelling_through_the_official_client(tenants: tuple[Served, dict[str, str]]) -> None:
    own, keys = tenants
    client, asked = own.client(keys["usual"]), {"prompt": UNSAFE["prompt"], "quality": "low"}
    usual = client.images.generate(**asked, extra_body={"seed": 3}).data or []
    low = client.images.generate(**asked, moderation="low", extra_body={"seed": 3}).data or []
    assert usual[0].b64_json == low[0].b64_json


def test_what_is_seen_while_detection_rests_is_blocked_as_well(tmp_path: Path) -> None:
    """Church fires in the first step, and detection rests for two; ink is over its threshold in these alone."""
    concepts = {"church": {"threshold": 0.0}, "ink": {"action": "block", "threshold": 0.38}}
    (tmp_path / "policy.json").write_text(json.dumps({"version": "1", "concepts": concepts}))
    bundle = write_tiny_bundle(tmp_path / "tiny", sees=True)
    with served(tmp_path, bundle=str(bundle), policy=tmp_path / "policy.json") as own:
        answer = own.http.post("/v1/pictures", json={"prompt": "a cat", "steps": 3, "seed": 0})
        assert answer.status_code == 400 and answer.json()["error"]["moderation"]["categories"] == ["ink"]
        (record,) = own.records()
        assert [step for step, fired in enumerate(record["fired"]) if "ink" in fired] == []
        assert (record["outcome"], record["blocked"], len(record["scores"])) == ("blocked", ["ink"], record["steps_done"])
        assert own.service.metrics.text().count(b'saferedir_concepts_total{action="block",concept="ink"} 1.0') == 1
