"""Model families: a small pipeline of each kind exported and verified; what cannot be protected is refused, and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, PixArtAlphaPipeline, StableDiffusionPipeline
from transformers import CLIPTokenizer

from benchmarks.lean import draw_lean, pixels_sha256
from benchmarks.small_pipeline import save_consistency, save_pixart, save_second, save_small_safety, save_turbo
from saferedir.engines import open_bundle
from saferedir.engines.errors import RequestError
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.export.families import family_of
from saferedir.export.model_changes import ModelChanges
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.tokenizer import PromptTokenizer
from saferedir.runtime.verify import verify_bundle
from saferedir_torch.detector import Step
from saferedir_torch.models import SHIPPED_MODEL
from saferedir_torch.safety_module import SafetyModule


def exported(folder: Path, save_model: Callable[[Path], Path]) -> Path:
    """`folder` with a model, a safety for it, and the bundle of both."""
    save_model(folder / "model")
    save_small_safety(folder / "model", folder / "safety")
    options = BundleOptions(name=folder.name, max_batch=4)
    export_folder(folder / "model", folder / "safety", folder / "bundle", options, on_step=lambda *_: None)
    return folder


def draws_without_torch(folder: Path) -> bool:
    """The bundle in `folder`, opened where PyTorch cannot be imported, draws what it draws here; half the steps fire."""
    policy = SafetyPolicy(thresholds={"church": 0.0}, cooldown=1)
    drawn = Pipeline.from_bundle(folder / "bundle", policy=policy)("a church", seed=0, num_inference_steps=2)
    return draw_lean(folder / "bundle", "a church", 2, policy) == pixels_sha256(drawn.images[0])


def farthest_pixel(theirs: DiffusionPipeline, folder: Path, prompt: str, steps: int, guidance: float, **further: Any) -> float:
    """Between what diffusers draws and what the bundle in `folder` draws unprotected, in 1/255."""
    expected = theirs(
        prompt, generator=torch.Generator().manual_seed(5), num_inference_steps=steps, guidance_scale=guidance,
        output_type="np", **further,
    ).images[0]  # fmt: skip
    ours = Pipeline.from_bundle(folder / "bundle", policy=SafetyPolicy(unprotected=True))
    drawn = np.asarray(ours(prompt, seed=5, num_inference_steps=steps, guidance_scale=guidance).images[0])
    return float(np.abs(drawn - (expected * 255).round()).max())


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("second"), save_second)


@pytest.mark.slow
def test_stable_diffusion_2_is_exported_and_equals_its_reference(second: Path) -> None:
    manifest = open_bundle(second / "bundle").manifest
    assert manifest.model is not None
    assert (manifest.model_family, manifest.model.prompt_width) == ("stable-diffusion-2.x", 1024)
    assert manifest.model.prediction_type == "v_prediction"
    report = verify_bundle(second / "bundle", second / "model", second / "safety")
    assert report.passed
    assert report.pictures is not None
    assert report.pictures.psnr > 40


@pytest.mark.slow
def test_half_the_steps_fire_and_pictures_differ_from_unprotected_ones(second: Path) -> None:
    policy = SafetyPolicy(thresholds={"church": 0.0}, cooldown=1)
    fires = Pipeline.from_bundle(second / "bundle", policy=policy)
    result = fires("a church", num_inference_steps=6)
    assert [bool(step.fired) for step in result.records[0].steps] == [True, False] * 3
    plain = Pipeline(fires.bundle, fires.backend, SafetyPolicy(unprotected=True))
    assert result.images[0].tobytes() != plain("a church", num_inference_steps=6).images[0].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", "a church beside a cat", "many words " * 60])
def test_prompts_are_padded_as_the_model_was_trained_with(second: Path, prompt: str) -> None:
    theirs = CLIPTokenizer.from_pretrained(second / "model" / "tokenizer")
    assert theirs.pad_token_id != theirs.eos_token_id
    expected = theirs(prompt, padding="max_length", truncation=True).input_ids
    assert PromptTokenizer((second / "bundle" / "tokenizer.json").read_bytes(), 77)(prompt).ids.tolist() == expected


@pytest.mark.slow
def test_every_family_draws_without_torch(second: Path, consistency: Path, turbo: Path, pixart: Path) -> None:
    assert all(draws_without_torch(folder) for folder in (second, consistency, turbo, pixart))


@pytest.fixture(scope="module")
def consistency(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("consistency"), save_consistency)


@pytest.mark.slow
def test_a_latent_consistency_model_is_exported_and_equals_its_reference(consistency: Path) -> None:
    manifest = open_bundle(consistency / "bundle").manifest
    assert manifest.model_family == "latent-consistency"
    assert manifest.model is not None
    assert manifest.model.told_guidance
    assert "guidance_scale" in {tensor.name for tensor in manifest.engines["plain_step_unguided"].inputs}
    assert verify_bundle(consistency / "bundle", consistency / "model", consistency / "safety").passed


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_a_latent_consistency_model_draws_what_diffusers_draws(consistency: Path, guidance: float) -> None:
    theirs = LatentConsistencyModelPipeline.from_pretrained(consistency / "model", torch_dtype=torch.float32)
    assert farthest_pixel(theirs, consistency, "a cat", 4, guidance) <= 1


@pytest.mark.slow
def test_half_the_steps_of_a_latent_consistency_model_fire(consistency: Path) -> None:
    policy = SafetyPolicy(thresholds={"church": 0.0}, cooldown=1)
    result = Pipeline.from_bundle(consistency / "bundle", policy=policy)("a church", num_inference_steps=4)
    assert [bool(step.fired) for step in result.records[0].steps] == [True, False] * 2


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that draws in few steps without guidance."""
    return exported(tmp_path_factory.mktemp("turbo"), save_turbo)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_model_of_few_steps_draws_what_diffusers_draws(turbo: Path, steps: int) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(turbo / "model", torch_dtype=torch.float32)
    assert farthest_pixel(theirs, turbo, "a church", steps, 0) <= 1


def test_its_first_step_is_protected_already(turbo: Path) -> None:
    policy = SafetyPolicy(thresholds={"church": 0.0})
    pipeline = Pipeline.from_bundle(turbo / "bundle", policy=policy)
    result = pipeline("a church", num_inference_steps=1, guidance_scale=0)
    assert result.records[0].steps[0].fired == ("church",)
    plain = Pipeline(pipeline.bundle, pipeline.backend, SafetyPolicy(unprotected=True))
    drawn = plain("a church", num_inference_steps=1, guidance_scale=0)
    assert result.images[0].tobytes() != drawn.images[0].tobytes()


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion transformer with T5's prompts."""
    return exported(tmp_path_factory.mktemp("pixart"), save_pixart)


@pytest.mark.slow
def test_a_transformer_is_exported_and_equals_its_reference(pixart: Path) -> None:
    manifest = open_bundle(pixart / "bundle").manifest
    assert manifest.model is not None
    assert (manifest.model_family, manifest.model.prompt_tokens) == ("pixart", 120)
    assert verify_bundle(pixart / "bundle", pixart / "model", pixart / "safety").passed


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["A Church on blue ", ""])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_transformer_draws_what_diffusers_draws(pixart: Path, prompt: str, guidance: float) -> None:
    theirs = PixArtAlphaPipeline.from_pretrained(pixart / "model", torch_dtype=torch.float32)
    assert farthest_pixel(theirs, pixart, prompt, 4, guidance, use_resolution_binning=False, clean_caption=False) <= 1


@pytest.mark.slow
def test_half_the_steps_of_a_transformer_fire_and_its_padding_stays(pixart: Path) -> None:
    policy = SafetyPolicy(thresholds={"church": 0.0}, cooldown=1)
    pipeline = Pipeline.from_bundle(pixart / "bundle", policy=policy)
    result = pipeline("a church", num_inference_steps=4)
    assert [bool(step.fired) for step in result.records[0].steps] == [True, False] * 2
    plain = Pipeline(pipeline.bundle, pipeline.backend, SafetyPolicy(unprotected=True))
    assert result.images[0].tobytes() != plain("a church", num_inference_steps=4).images[0].tobytes()
    embedding = pipeline.encode(["a church"])
    kept = np.any(embedding[0] != 0, axis=1)
    assert kept.sum() == len(result.records[0].tokens)
    module = SafetyModule.load(pixart / "safety")
    original = torch.from_numpy(embedding)
    nothing = torch.zeros(1, 4, 16, 16)
    features = module.features(Step(nothing, nothing, torch.tensor([0.5])))
    scored = module.score(features, torch.tensor([True]), [original], [original], [original])
    active = torch.tensor([[True]])
    module.last_branch.keeps_subject.fill_(1)
    for again in (~active, active):
        (moved,) = module.redirect(scored, [original], active, again).streams
        assert not torch.equal(moved, original)
        assert np.array_equal(np.any(moved[0].detach().numpy() != 0, axis=1), kept)


@pytest.mark.slow
def test_changes_that_a_transformer_does_not_take_are_refused(pixart: Path, tmp_path: Path) -> None:
    given = (pixart / "model", pixart / "safety", tmp_path / "bundle", BundleOptions(name="x"))
    with pytest.raises(RequestError, match="LoRAs and skipped layers are for Stable Diffusion"):
        export_folder(*given, ModelChanges(clip_skip=1), on_step=lambda *_: None)
    with pytest.raises(RequestError, match="--save-model writes Stable Diffusion pipelines alone"):
        export_folder(*given, save_model=tmp_path / "saved", on_step=lambda *_: None)


def folder_with(tmp_path: Path, pipeline: str, **unet: Any) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    config = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, **unet}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_families_are_known_by_their_files(tmp_path: Path) -> None:
    assert family_of(SHIPPED_MODEL).name == "stable-diffusion-1.x"
    assert family_of(folder_with(tmp_path, "StableDiffusionPipeline", cross_attention_dim=1024)).name == "stable-diffusion-2.x"


@pytest.mark.parametrize(
    ("pipeline", "unet", "says"),
    [
        ("StableDiffusionXLPipeline", {}, "refused: its UNet is also conditioned by a pooled embedding"),
        ("StableDiffusion3Pipeline", {}, "refused: text and picture attend to each other"),
        (
            "AudioLDMPipeline",
            {},
            "is a AudioLDMPipeline, which is not known here; known: LatentConsistencyModelPipeline, Pix",
        ),
        ("StableDiffusionPipeline", {"in_channels": 9}, "takes 9 latent channels and gives 4"),
        ("StableDiffusionPipeline", {"addition_embed_type": "text_time"}, "addition_embed_type"),
    ],
)
def test_what_cannot_be_protected_is_refused_with_the_reason(
    tmp_path: Path, pipeline: str, unet: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        family_of(folder_with(tmp_path, pipeline, **unet))


def test_a_folder_that_is_cut_short_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "StableDiffusionPipeline")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"unet/config\.json"):
        family_of(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(RequestError, match=r"model_index\.json"):
        family_of(folder)
