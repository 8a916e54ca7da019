"""Pictures of several sizes: engines for each, which share their weights, and a clear word about any other size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel, StableDiffusionPipeline
from typer.testing import CliRunner

from benchmarks.small_pipeline import save_small_pipeline, save_small_safety
from saferedir.engines import open_bundle
from saferedir.engines.errors import RequestError, SafetyMissingError
from saferedir.engines.step import SIZED_ENGINES
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.capture import capture_obstacles
from saferedir.export.command import export_folder
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.command_line.app import app
from saferedir.runtime.command_line.picture_size import picture_size
from saferedir.runtime.replay import Runs
from saferedir.runtime.verify import verify_bundle
from saferedir_torch.pixart import TOLD_ITS_SIZE, Denoiser

#: The model's own pictures are of 32x32 pixels, a pixel of the latent covers 2x2.
WIDE = (32, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    save_small_safety(save_small_pipeline(folder / "model", width=32, heads=2), folder / "safety")
    options = BundleOptions(name="sizes", max_batch=4, further_sizes=(WIDE, (32, 32), WIDE))
    begun: list[tuple[int, int]] = []
    export_folder(folder / "model", folder / "safety", folder / "bundle", options, on_step=lambda *at: begun.append(at))
    assert [done for done, _ in begun] == list(range(begun[0][1] + 1))
    return folder


@pytest.mark.slow
def test_each_size_has_engines_that_share_their_weights(folder: Path) -> None:
    manifest = open_bundle(folder / "bundle").manifest
    assert manifest.model is not None
    assert manifest.model.picture_sizes == ["32x32", "32x48"]
    assert {f"{name}@16x24" for name in SIZED_ENGINES} <= manifest.engines.keys()
    assert manifest.engines["step@16x24"].weights == manifest.engines["step"].weights
    assert manifest.engines["step@16x24"].inputs[0].shape == ("batch", 4, 16, 24)


@pytest.mark.slow
def test_every_engine_of_every_size_equals_its_reference(folder: Path) -> None:
    report = verify_bundle(folder / "bundle", folder / "model", folder / "safety", runs=Runs(2, 4))
    assert report.passed
    assert {"plain_step@16x24", "step_unguided@16x24", "vae_decoder@16x24"} <= {row.engine for row in report.parity or []}


@pytest.mark.slow
def test_another_size_is_drawn_as_diffusers_draws_it(folder: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32)
    height, width = WIDE
    expected = theirs(
        "a church", height=height, width=width, generator=torch.Generator().manual_seed(5), num_inference_steps=3,
        guidance_scale=5.0, output_type="np",
    ).images[0]  # fmt: skip
    ours = Pipeline.from_bundle(folder / "bundle", policy=SafetyPolicy(unprotected=True))
    picture = ours("a church", height=height, width=width, seed=5, num_inference_steps=3).images[0]
    assert picture.size == (width, height)
    assert np.abs(np.asarray(picture) - (expected * 255).round()).max() <= 1


@pytest.mark.slow
def test_every_size_is_protected(folder: Path) -> None:
    policy = SafetyPolicy(thresholds={"church": 0.0}, cooldown=1)
    pipeline = Pipeline.from_bundle(folder / "bundle", policy=policy)
    safe = pipeline("a church", width=48, num_inference_steps=4)
    assert [bool(step.fired) for step in safe.records[0].steps] == [True, False] * 2
    plain = Pipeline(pipeline.bundle, pipeline.backend, SafetyPolicy(unprotected=True))
    assert safe.images[0].tobytes() != plain("a church", width=48, num_inference_steps=4).images[0].tobytes()


@pytest.mark.slow
def test_nothing_ends_the_capture_of_another_size(folder: Path) -> None:
    bundle = open_bundle(folder / "bundle")
    assert [capture_obstacles(bundle.engine_path(f"{name}@16x24")) for name in ("step", "step_unguided")] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "says"),
    [((32, 64), "32x32, 32x48; export it with --size 32x64"), ((33, 32), "multiples of 2"), ((-2, 32), "multiples of 2")],
)
def test_a_size_without_engines_is_refused(folder: Path, size: tuple[int, int], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Pipeline.from_bundle(folder / "bundle")("a cat", height=size[0], width=size[1])


@pytest.mark.slow
def test_a_size_that_the_latent_cannot_have_is_not_exported(folder: Path, tmp_path: Path) -> None:
    options = BundleOptions(name="odd", further_sizes=((32, 33),))
    with pytest.raises(RequestError, match="multiples of 2"):
        export_folder(folder / "model", folder / "safety", tmp_path / "odd", options, on_step=lambda *_: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bundle_that_lacks_an_engine_of_a_size_it_states_is_refused(folder: Path, tmp_path: Path) -> None:
    bundle = folder / "bundle" / "bundle.json"
    raw = json.loads(bundle.read_text())
    raw["engines"].pop("step@16x24")
    (tmp_path / "bundle.json").write_text(json.dumps(raw))
    with pytest.raises(SafetyMissingError, match="step@16x24"):
        open_bundle(tmp_path)


def test_a_transformer_is_told_the_size_it_draws() -> None:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, cross_attention_dim=24, caption_channels=24,
        sample_size=TOLD_ITS_SIZE, attention_bias=True, in_channels=4, out_channels=8,
    ).eval()  # fmt: skip
    latent, prompt = torch.randn(2, 4, 16, 24), torch.randn(2, 7, 24)
    told = {"resolution": torch.tensor([[128.0, 192.0]] * 2), "aspect_ratio": torch.tensor([[128 / 192]] * 2)}
    with torch.no_grad():
        expected = transformer(
            latent, encoder_hidden_states=prompt, timestep=torch.tensor([500.0, 500.0]), added_cond_kwargs=told,
            return_dict=False,
        )[0][:, :4]  # fmt: skip
        said = Denoiser(transformer)(latent, torch.tensor([500.0]), prompt)[0]
    assert torch.allclose(said, expected, atol=1e-5)


def test_sizes_are_written_as_people_write_them() -> None:
    assert picture_size("512") == (512, 512)
    assert picture_size(" 512x768") == (512, 768)
    for text in ("", "x", "512x", "wide", "1.5"):
        with pytest.raises(RequestError, match="SIDE or HEIGHTxWIDTH"):
            picture_size(text)


@pytest.mark.slow
def test_the_command_draws_a_size_that_is_named(folder: Path, tmp_path: Path) -> None:
    command = ["generate", "a cat", "--bundle", str(folder / "bundle"), "--steps", "4", "--out", str(tmp_path / "drawn")]
    assert CliRunner().invoke(app, [*command, "--size", "32x48"]).exit_code == 0
    assert len(list((tmp_path / "drawn").iterdir())) == 1
