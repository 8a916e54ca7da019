"""The policy of a service: by tenant and concept, of one content for each version, and never half in force."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from saferedir.engines import DEFAULT_BUNDLE, open_bundle
from saferedir.runtime.serve.policies import Policies, schema

SAFETY = open_bundle(DEFAULT_BUNDLE).manifest.safety
POLICY = {
    "version": "1",
    "concepts": {"ink": {"action": "observe"}, "weapons": {"threshold": 0.4}},
    "tenants": {"acme": {"weapons": {"action": "block"}, "ink": {}}},
}


def written(path: Path, policy: Any) -> Path:
    path.write_text(policy if isinstance(policy, str) else json.dumps(policy))
    stamp = path.stat().st_mtime_ns + 1_000_000_000  # a clock may stand still between two writes
    os.utime(path, ns=(stamp, stamp))
    return path


def test_without_a_file_everything_is_redirected() -> None:
    policy = Policies(SAFETY).of("anyone")
    assert set(policy.actions.values()) == {"redirect"}
    assert policy.engine.enabled.all()


def test_a_tenant_has_what_all_have_but_for_its_own(tmp_path: Path) -> None:
    policies = Policies(SAFETY, written(tmp_path / "p.json", POLICY))
    anyone, acme = policies.of("anyone"), policies.of("acme")
    assert anyone.actions == {"church": "redirect", "ink": "observe", "weapons": "redirect"}
    assert acme.actions == {"church": "redirect", "ink": "redirect", "weapons": "block"}
    assert anyone.engine.enabled.tolist() == [True, False, True]
    assert acme.engine.enabled.all()
    assert float(anyone.engine.threshold[2]) == pytest.approx(0.4)
    assert float(acme.engine.threshold[2]) == pytest.approx(float(SAFETY.concepts[2].threshold or 0), rel=1e-6)
    score = np.array([[0.0, 0.99, 0.0], [0.0, 0.1, 0.5]], np.float32)
    assert anyone.decisions(score) == {"ink": "observe", "weapons": "redirect"}
    assert anyone.observed(score) == ["ink"]
    assert anyone.fired(np.array([[True, True, False], [False, False, False]])) == ["church"]


def test_a_new_version_is_taken_and_whoever_has_the_old_one_keeps_it(tmp_path: Path) -> None:
    path = written(tmp_path / "p.json", POLICY)
    policies = Policies(SAFETY, path)
    before = policies.of("acme")
    assert not policies.reload()
    written(path, {"version": "2"})
    assert policies.reload()
    assert (before.version, policies.of("acme").version) == ("1", "2")
    assert before.actions["weapons"] == "block"


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("{", "is no policy"),
        ("[" * 5000, "is no policy"),
        ({"version": "2", "concepts": {"tanks": {}}}, "names 'tanks'; this bundle has church, ink, weapons"),
        ({"version": "2", "tenants": {"x": {"tanks": {}}}}, "names 'tanks' of tenant 'x'"),
        ({"version": "2", "concepts": {"ink": {"action": "allow"}}}, r"Invalid enum value 'allow'.*\$.concepts"),
        ({"version": "2", "concepts": {"ink": {"threshold": 2}}}, "<= 1"),
        ({"version": "2", "unprotected": True}, "unknown field `unprotected`"),
        ({"version": "1"}, "version '1' was another policy before"),
        ({"concepts": {}}, "missing required field `version`"),
    ],
)
def test_a_policy_that_cannot_be_used_changes_nothing(tmp_path: Path, policy: Any, said: str) -> None:
    path = written(tmp_path / "p.json", POLICY)
    policies = Policies(SAFETY, path)
    written(path, policy)
    assert not policies.reload()
    assert re.search(said, policies.problem or "")
    assert policies.of("acme").actions["weapons"] == "block"
    written(path, {"version": "3"})
    assert policies.reload()
    assert policies.problem is None


def test_a_file_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "p.json", POLICY)
    policies = Policies(SAFETY, path)
    path.unlink()
    assert not policies.reload()
    assert "cannot be read" in (policies.problem or "")
    assert policies.version == "1"


def test_the_schema_is_one_and_agrees(tmp_path: Path) -> None:
    jsonschema_rs.meta.validate(schema())
    validator = jsonschema_rs.validator_for(schema())
    validator.validate(POLICY)
    with pytest.raises(jsonschema_rs.ValidationError):
        validator.validate({"version": "1", "concepts": {"ink": {"action": "allow"}}})
    assert not validator.is_valid({"version": "1\n"})
