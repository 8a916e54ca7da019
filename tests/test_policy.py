"""What an operator and a request may choose: strengths where there are any, and settings beyond the safety's promise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tiny_bundle import SAFETY, write_tiny_bundle

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import ConceptInfo, Envelope, Promise
from saferedir.runtime import Pipeline, SafetyPolicy, Tightening
from saferedir.runtime.policy import check_promise, resolve

ENVELOPE = Envelope((4, 50), ("ddim", "euler"), (1.0, 12.0))
PROMISE = Promise(0.001, 0.95, 3000, 0, ENVELOPE, "noise")
#: As of a published checkpoint, whose authors chose one.
WITH_STRENGTH = structs.replace(SAFETY, concepts=(ConceptInfo("church", "house", 0.5, 1.5), *SAFETY.concepts[1:]))
WITHIN = {"steps": 4, "sampler": "euler", "guidance_scale": 12.0}


def test_a_strength_is_refused_where_there_is_none_to_choose() -> None:
    said = "alpha_scale of 'ink': the safety of this bundle has no strength to choose; leave it out"
    with pytest.raises(RequestError, match=said):
        resolve(SafetyPolicy(alpha_scales={"church": 2.0, "ink": 2.0}), WITH_STRENGTH)
    with pytest.raises(RequestError, match=said):
        resolve(SafetyPolicy(), WITH_STRENGTH).tightened(Tightening(alpha_scales={"ink": 2.0}))
    assert resolve(SafetyPolicy(), SAFETY).alpha_scale.tolist() == [0, 0]


def test_a_strength_that_was_published_may_be_chosen_and_raised_by_a_request() -> None:
    assert resolve(SafetyPolicy(), WITH_STRENGTH).alpha_scale.tolist() == [1.5, 0]
    chosen = resolve(SafetyPolicy(alpha_scales={"church": 2.0}), WITH_STRENGTH)
    assert chosen.tightened(Tightening(alpha_scales={"church": 2.5})).alpha_scale.tolist() == [2.5, 0]
    with pytest.raises(RequestError, match=r"alpha_scale of 'church' is 1\.5; a request may only raise it above 2"):
        chosen.tightened(Tightening(alpha_scales={"church": 1.5}))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"steps": 3}, "num_inference_steps is 3; expected 4 to 50"),
        ({"steps": 51}, "num_inference_steps is 51; expected 4 to 50"),
        ({"sampler": "lcm"}, "the sampler is lcm; expected one of ddim, euler"),
        ({"guidance_scale": 12.5}, "guidance_scale is 12.5; expected 1 to 12"),
        ({"steps": 1, "guidance_scale": 30.0}, "num_inference_steps is 1; .*; guidance_scale is 30; expected 1 to 12"),
    ],
)
def test_settings_beyond_the_promise_are_refused_unless_the_operator_allows_them(
    setting: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = WITHIN | setting
    assert ENVELOPE.refuses(**WITHIN) == ""
    strict, open_to = (resolve(SafetyPolicy(beyond_promise=allowed), SAFETY) for allowed in (False, True))
    with pytest.raises(RequestError, match=f"^{said}: what the safety was made and calibrated for.*--beyond-promise") as caught:
        check_promise(strict, PROMISE, **asked)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="saferedir"):
        assert check_promise(open_to, PROMISE, **asked) is False
    assert "drawn beyond what the safety promises for, as the operator allows: " in caplog.text
    caplog.clear()
    assert check_promise(strict, PROMISE, **WITHIN) is check_promise(open_to, PROMISE, **WITHIN) is True
    assert not caplog.text
    assert check_promise(strict, None, **asked) is None
    assert check_promise(resolve(SafetyPolicy(unprotected=True), SAFETY), PROMISE, **asked) is None


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0])
def test_no_guidance_is_a_scale_of_1_whatever_it_is_called(guidance_scale: float) -> None:
    policy = resolve(SafetyPolicy(beyond_promise=False), SAFETY)
    assert check_promise(policy, PROMISE, **(WITHIN | {"guidance_scale": guidance_scale}))
    guided = structs.replace(PROMISE, envelope=structs.replace(ENVELOPE, guidance_scale=(2.0, 12.0)))
    with pytest.raises(RequestError, match="guidance_scale is 1; expected 2 to 12"):
        check_promise(policy, guided, **(WITHIN | {"guidance_scale": guidance_scale}))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"beyond_promise": 1}, "beyond_promise is 1; expected True or False"),
        ({"unprotected": True, "beyond_promise": True}, "unprotected draws without any safety; leave everything else out"),
    ],
)
def test_going_beyond_the_promise_is_said_plainly(policy: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        resolve(SafetyPolicy(**policy), SAFETY)


@pytest.fixture(scope="module")
def promising(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", PROMISE)


def test_records_say_whether_settings_are_within_the_promise(promising: Path, tmp_path: Path) -> None:
    strict = Pipeline.from_bundle(promising, policy=SafetyPolicy(beyond_promise=False))
    (record,) = strict("a cat", num_inference_steps=4).records
    assert record.within_promise is True
    assert record.to_dict()["within_promise"] is True
    assert record.looked_for["church"].alpha_scale is None
    with pytest.raises(RequestError, match="num_inference_steps is 3; expected 4 to 50"):
        strict("a cat", num_inference_steps=3)
    with pytest.raises(RequestError, match="the sampler is dpm\\+\\+-2m; expected one of ddim, euler"):
        strict("a cat", num_inference_steps=4, scheduler="dpm++-2m")
    allowing = Pipeline.from_bundle(promising, policy=SafetyPolicy(beyond_promise=True))
    for steps, within in ((3, False), (4, True)):
        assert allowing("a cat", num_inference_steps=steps).records[0].within_promise is within
    unprotected = Pipeline.from_bundle(promising, policy=SafetyPolicy(unprotected=True))
    assert unprotected("a cat", num_inference_steps=3).records[0].within_promise is None
    without = Pipeline.from_bundle(write_tiny_bundle(tmp_path / "tiny"))
    assert without("a cat", num_inference_steps=3).records[0].within_promise is None
