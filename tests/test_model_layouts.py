"""Models open in the layouts in which they are published: half precision alone, without a safety checker, in pieces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from benchmarks.single_file import save_single_file
from benchmarks.small_pipeline import save_pixart, save_small_pipeline, small_vae
from saferedir.engines.errors import RequestError
from saferedir.export.command import _open
from saferedir.export.model_changes import ModelChanges, change
from saferedir.export.other_vae import open_vae
from saferedir_torch.model_source import bundled_words
from saferedir_torch.models import SHIPPED_MODEL, load_pipeline, save_in_half

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_pipeline(tmp_path_factory.mktemp("layouts") / "model", width=32, heads=2, two_levels=True)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def assert_same(ours: Any, theirs: Any, parts: tuple[str, ...] = PARTS) -> None:
    for part in parts:
        first, second = (getattr(pipeline, part).state_dict() for pipeline in (ours, theirs))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.float32 for name in first), part


def in_half_alone(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def unet_in_half_alone(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))


def index(**entries: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        in_half_alone,
        unet_in_half_alone,
        index(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True),
        index(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], image_encoder=["transformers", "CLIPModel"]),
        index(safety_checker=None, feature_extractor=None),
        index(_class_name="StableDiffusionImg2ImgPipeline"),
        index(_class_name="StableDiffusionInpaintPipeline"),
    ],
    ids=["fp16", "fp16 of the UNet", "checker without its folder", "encoder too", "null", "img2img", "inpainting"],
)
def test_a_folder_of_another_layout_is_the_same_model(edit: Callable[[Path], None], copy: Path, folder: Path) -> None:
    edit(copy)
    assert_same(_open(copy), load_pipeline(folder))


def test_a_folder_that_an_image_to_image_pipeline_saved_opens(folder: Path, tmp_path: Path) -> None:
    StableDiffusionImg2ImgPipeline(**load_pipeline(folder).components, requires_safety_checker=False).save_pretrained(
        tmp_path / "m"
    )
    assert_same(_open(tmp_path / "m"), load_pipeline(folder))


def test_an_inpainting_unet_is_still_refused(copy: Path) -> None:
    index(_class_name="StableDiffusionInpaintPipeline")(copy)
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    with pytest.raises(RequestError, match="takes 9 latent channels and gives 4"):
        _open(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_with_weights_missing_is_refused(part: str, copy: Path) -> None:
    (path,) = (copy / part).glob("*.safetensors")
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=rf"{part} cannot be used: it lacks 1 of its weights, such as "):
        _open(copy)


@pytest.fixture(scope="module")
def vae(folder: Path) -> Any:
    """Another VAE of the model's shapes."""
    torch.manual_seed(5)
    vae = load_pipeline(folder).vae
    for parameter in vae.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return vae


@pytest.fixture(scope="module")
def checkpoint(folder: Path, vae: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Tensors of a whole checkpoint in one file, with the other VAE, in the original layout."""
    pipeline = load_pipeline(folder)
    pipeline.register_modules(vae=vae)
    return load_file(save_single_file(pipeline, tmp_path_factory.mktemp("file") / "model.safetensors"))


PREFIX = "first_stage_model."


@pytest.mark.parametrize("part", ["UNet", "VAE", "text encoder"])
def test_a_checkpoint_with_weights_missing_is_refused(
    part: str, folder: Path, checkpoint: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    prefix = {"UNet": "model.diffusion_model.", "VAE": PREFIX, "text encoder": "cond_stage_model."}[part]
    gone = [name for name in sorted(checkpoint) if name.startswith(prefix)][3]
    save_file({name: tensor for name, tensor in checkpoint.items() if name != gone}, tmp_path / "m.safetensors")
    with pytest.raises(RequestError, match=f"its .*{part}.* lacks "):
        _open(tmp_path / "m.safetensors", str(folder))


@pytest.mark.parametrize("layout", ["diffusers", "original", "in a checkpoint", "with what it was trained with"])
def test_a_vae_in_one_file_is_the_same_in_every_layout(
    layout: str, folder: Path, vae: Any, checkpoint: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    original = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.items() if name.startswith(PREFIX)}
    tensors = {
        "diffusers": vae.state_dict(),
        "original": original,
        "in a checkpoint": checkpoint,
        "with what it was trained with": original
        | {"loss.discriminator.weight": torch.ones(1), "model_ema.decay": torch.ones(1)},
    }[layout]
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    changed = change(load_pipeline(folder), ModelChanges(vae=tmp_path / "vae.safetensors"))
    first, second = changed.vae.state_dict(), vae.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_vae_folder_in_half_alone_opens_and_keeps_its_own_scaling(folder: Path, vae: Any, tmp_path: Path) -> None:
    other = AutoencoderKL.from_config(vae.config, scaling_factor=0.5)
    other.load_state_dict(vae.state_dict())
    other.save_pretrained(tmp_path / "vae")
    in_half_alone(tmp_path)
    found = change(load_pipeline(folder), ModelChanges(vae=tmp_path / "vae")).vae
    assert found.config.scaling_factor == 0.5
    assert torch.equal(found.decoder.conv_in.weight, vae.decoder.conv_in.weight)


def test_a_vae_that_does_not_fit_is_named(folder: Path, vae: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no\.safetensors does not exist; expected a VAE"):
        open_vae(tmp_path / "no.safetensors", vae)
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")  # fmt: skip
    with pytest.raises(RequestError, match="it is a AutoencoderTiny; expected a AutoencoderKL"):
        open_vae(tmp_path / "tiny", vae)
    AutoencoderKL.from_config(small_vae().config, latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(RequestError, match="it has 16 latent channels, the model 4"):
        open_vae(tmp_path / "wide", vae)
    tensors = vae.state_dict()
    del tensors["decoder.conv_in.bias"]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "part.safetensors")
    with pytest.raises(RequestError, match=r"part\.safetensors cannot be used as a VAE here.*decoder\.conv_in\.bias"):
        open_vae(tmp_path / "part.safetensors", vae)
    vae.save_pretrained(tmp_path / "part")
    (path,) = (tmp_path / "part").glob("*.safetensors")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"part cannot be used: it lacks 1 of its weights, such as decoder\.conv_in\.bias"):
        open_vae(tmp_path / "part", vae)


def test_a_checkpoint_without_a_vae_opens_beside_one(
    folder: Path, vae: Any, checkpoint: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file({name: tensor for name, tensor in checkpoint.items() if not name.startswith(PREFIX)}, tmp_path / "m.safetensors")
    save_file({name: tensor.clone() for name, tensor in vae.state_dict().items()}, tmp_path / "vae.safetensors")
    with pytest.raises(RequestError, match="has no VAE; expected a whole Stable Diffusion model; name another by --vae"):
        _open(tmp_path / "m.safetensors", str(folder))
    opened = _open(tmp_path / "m.safetensors", str(folder), without_vae=True)
    ours = change(opened, ModelChanges(vae=tmp_path / "vae.safetensors"))
    assert_same(ours, load_pipeline(folder), ("unet", "text_encoder"))
    assert torch.equal(ours.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)


def test_a_checkpoint_with_a_bundled_embedding_opens_and_says_that_it_has_one(
    folder: Path, checkpoint: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    embedding = {"bundle_emb.EasyNeg.string_to_param.*": torch.ones(1, 32)}
    save_file(checkpoint | embedding, tmp_path / "m.safetensors")
    assert_same(_open(tmp_path / "m.safetensors", str(folder)), load_pipeline(folder), ("unet", "text_encoder"))
    assert bundled_words(tmp_path / "m.safetensors") == ["EasyNeg"]
    assert bundled_words(folder) == []


def test_stock_diffusers_draws_with_the_shipped_model_by_its_defaults() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED_MODEL)
    pipeline.set_progress_bar_config(disable=True)
    expected = load_pipeline()
    drawn, known = (
        one("a cat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for one in (pipeline, expected)
    )
    assert (drawn == known).all()


def test_stock_diffusers_draws_with_what_training_saves(folder: Path, tmp_path: Path) -> None:
    save_in_half(load_pipeline(folder), tmp_path)
    assert not any(
        "_name_or_path" in config.read_text() for own in (tmp_path, SHIPPED_MODEL) for config in own.glob("*/config.json")
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert {getattr(pipeline, part).dtype for part in PARTS} == {torch.float32}
    assert {tensor.dtype for tensor in load_file(tmp_path / "text_encoder" / "model.safetensors").values()} == {torch.float16}


def test_a_transformer_in_half_alone_opens(tmp_path: Path) -> None:
    save_pixart(tmp_path / "model")
    expected = load_pipeline(tmp_path / "model").unet.state_dict()
    in_half_alone(tmp_path / "model" / "transformer")
    found = _open(tmp_path / "model").unet.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
