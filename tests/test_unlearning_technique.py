"""The technique is found and run by the `eval-unlearn` package itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from eval_unlearn.registry import get_technique, register_metric
from eval_unlearn.registry.entrypoints import load_entrypoints
from eval_unlearn.runners.single_benchmark_runner import SingleBenchmarkRunner
from eval_unlearn.types import MetricResult

from saferedir.engines.errors import RequestError
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.unlearning_technique import SafeRedirTechnique

PROMPTS = ["a church", "a cat", "a church beside a fox"]


@register_metric("share_unlike_unprotected")
class ShareUnlike:
    """The share of pictures that differ from what the unprotected model draws with the same seed."""

    def __init__(self) -> None:
        self.plain = Pipeline.from_bundle(policy=SafetyPolicy(unprotected=True))
        self.unlike: list[bool] = []

    def load_dataset(self) -> Iterator[Any]:
        yield SimpleNamespace(prompts=PROMPTS, metadata={"source": "three prompts"})

    def update(self, images: list[Any], prompts: list[str], metadata: dict[str, Any]) -> None:
        drawn = self.plain(prompts, seed=7, num_inference_steps=4).images
        self.unlike += [one.tobytes() != other.tobytes() for one, other in zip(images, drawn, strict=True)]

    def compute(self) -> MetricResult:
        return MetricResult("share_unlike_unprotected", float(np.mean(self.unlike)), {"unlike": self.unlike})


def test_the_package_finds_the_technique_by_its_entry_point() -> None:
    load_entrypoints()
    assert get_technique("saferedir") is SafeRedirTechnique


def test_the_package_runs_a_benchmark_of_it(tmp_path: Path) -> None:
    runner = SingleBenchmarkRunner(
        "saferedir", "share_unlike_unprotected", technique_config={"erase_concept": "church", "num_inference_steps": 4},
        output_dir=str(tmp_path), seed=7,
    )  # fmt: skip
    result = runner.run()["metric_result"]
    assert result["details"]["unlike"] == [True, False, True]
    assert len(list(tmp_path.rglob("*.png"))) == len(PROMPTS)


def test_pictures_are_those_of_the_pipeline_and_records_are_kept(pipeline: Pipeline) -> None:
    technique = SafeRedirTechnique(num_inference_steps=4)
    images = technique.generate(PROMPTS, seed=3)
    expected = pipeline(PROMPTS, seed=3, num_inference_steps=4)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected.images]
    assert [record.fired for record in technique.records] == [record.fired for record in expected.records]


def test_only_the_concept_that_was_asked_for_is_looked_for() -> None:
    technique = SafeRedirTechnique(erase_concept=["ink"], num_inference_steps=4)
    technique.generate(["a church", "a cat in ink style"], seed=0)
    assert [list(record.looked_for) for record in technique.records] == [["ink"], ["ink"]]
    assert [bool(record.fired) for record in technique.records] == [False, True]


def test_unknown_options_are_named() -> None:
    with pytest.raises(RequestError, match="unknown options threshold"):
        SafeRedirTechnique(threshold=0.1)
    with pytest.raises(RequestError, match="unknown concept 'dog'"):
        SafeRedirTechnique(erase_concept="dog")
    with pytest.raises(RequestError, match="unknown options eta"):
        SafeRedirTechnique(num_inference_steps=4).generate(["a cat"], eta=1.0)


def test_without_a_seed_batches_differ_and_records_say_which(pipeline: Pipeline) -> None:
    technique = SafeRedirTechnique(num_inference_steps=4)
    batches = []
    for _ in range(2):
        (image,) = technique.generate(["a cat"])
        again = pipeline("a cat", seed=technique.records[0].seed, num_inference_steps=4)
        assert again.images[0].tobytes() == image.tobytes()
        batches.append(technique.records[0].seed)
    assert batches[0] != batches[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"erase_concept": []}, "enabled is empty, and looking for nothing is not protection"),
        ({"erase_concept": ""}, "unknown concept ''"),
        ({"erase_concept": [""]}, "unknown concept ''"),
        ({"erase_concept": 3}, "enabled is 3; expected a tuple of concepts"),
        ({"erase_concept": {"church": 1}}, "enabled is {'church': 1}; expected a tuple"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": "4"}, "num_inference_steps is '4'"),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5'"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ],
)
def test_options_are_checked_when_the_technique_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SafeRedirTechnique(**options)
