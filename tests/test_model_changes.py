"""LoRAs, another VAE, skipped layers and added words: each is made before export, and equals what diffusers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks.small_pipeline import save_small_pipeline, save_small_safety
from saferedir.engines import open_bundle
from saferedir.engines.errors import RequestError, SafetyMismatchError
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.export.model_changes import ModelChanges, change
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir_torch.models import load_pipeline

PROMPT = "a church beside a cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, a safety module for it, and one file of each kind of change."""
    folder = tmp_path_factory.mktemp("changes")
    save_small_pipeline(folder / "model", width=32, heads=2, text_layers=3)
    pipeline = load_pipeline(folder / "model")
    save_small_safety(folder / "model", folder / "safety")
    torch.manual_seed(1)
    save_lora(pipeline, folder / "unet.safetensors", unet=True)
    save_lora(load_pipeline(folder / "model"), folder / "text.safetensors", unet=False)
    vae = load_pipeline(folder / "model").vae
    for parameter in vae.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    vae.save_pretrained(folder / "vae")
    torch.save({"<toy>": torch.randn(32)}, folder / "toy.bin")
    torch.save({"<scene>": torch.randn(2, 32)}, folder / "scene.bin")
    return folder


def save_lora(pipeline: Any, path: Path, *, unet: bool) -> None:
    """A LoRA of rank 2 with random weights on every attention's projections."""
    names = ["to_q", "to_v"] if unet else ["q_proj", "v_proj"]
    model = pipeline.unet if unet else pipeline.text_encoder
    model.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    own = get_peft_model_state_dict(model)
    StableDiffusionPipeline.save_lora_weights(
        path.parent, unet_lora_layers=own if unet else None, text_encoder_lora_layers=None if unet else own,
        weight_name=path.name,
    )  # fmt: skip


@pytest.mark.slow
def test_pictures_are_those_of_diffusers_with_the_same_changes(folder: Path) -> None:
    """Everything at once, as the command does it."""
    said: list[str] = []
    bundle = export_folder(
        folder / "model", folder / "safety", folder / "bundle",
        BundleOptions(name="changed", max_batch=2, words=((folder / "toy.bin", None), (folder / "scene.bin", None))),
        ModelChanges(loras=((folder / "unet.safetensors", 0.5),), vae=folder / "vae"),
        save_model=folder / "saved", on_step=lambda *_: None, on_note=said.append,
    )  # fmt: skip
    assert said == [f"{folder / 'unet.safetensors'}: added 0.5 times to 4 layers of the UNet and 0 of the text encoder"]
    theirs = load_pipeline(folder / "model")
    theirs.load_lora_weights(folder, weight_name="unet.safetensors", adapter_name="x")
    theirs.set_adapters(["x"], [0.5])
    theirs.register_modules(vae=AutoencoderKL.from_pretrained(folder / "vae"))
    for name in ("toy", "scene"):
        theirs.load_textual_inversion(folder / f"{name}.bin")
    saved = StableDiffusionPipeline.from_pretrained(folder / "saved")
    ours = Pipeline.from_bundle(bundle, policy=SafetyPolicy(unprotected=True))
    for prompt in ("a <toy> beside a cat", "a <scene>"):
        drawn = np.asarray(ours(prompt, seed=7, num_inference_steps=4, guidance_scale=5.0).images[0])
        for other in (theirs, saved):
            given = {"generator": torch.Generator().manual_seed(7), "output_type": "np"}
            expected = other(prompt, num_inference_steps=4, guidance_scale=5.0, **given).images[0]
            assert np.abs(drawn - (expected * 255).round()).max() <= 1
    plain = np.asarray(ours("a beside a cat", seed=7, num_inference_steps=4).images[0])
    assert np.abs(plain.astype(int) - drawn).max() > 1
    manifest = open_bundle(bundle).manifest
    assert manifest.model is not None
    assert manifest.model.added_words == {"<toy>": ("<toy>",), "<scene>": ("<scene>_0", "<scene>_1")}
    record = Pipeline.from_bundle(bundle)("a <SCENE> and a <toy>", num_inference_steps=4).records[0]
    assert record.tokens[1:-1] == ("a</w>", "<scene>_0", "<scene>_1", "and</w>", "a</w>", "<toy>")


def test_skipping_layers_is_what_diffusers_does(folder: Path) -> None:
    theirs, ours = load_pipeline(folder / "model"), change(load_pipeline(folder / "model"), ModelChanges(clip_skip=2))
    ids = theirs.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = theirs.text_encoder(ids, output_hidden_states=True).hidden_states
        # As StableDiffusionPipeline.encode_prompt takes them.
        expected = theirs.text_encoder.final_layer_norm(hidden[-(2 + 1)])
        found = ours.text_encoder(ids).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("changes", ["text", "skip"])
def test_a_safety_module_is_refused_where_the_text_encoder_changed(folder: Path, tmp_path: Path, changes: str) -> None:
    made = ModelChanges(clip_skip=1) if changes == "skip" else ModelChanges(loras=((folder / "text.safetensors", 1.0),))
    with pytest.raises(SafetyMismatchError, match="text encoder"):
        export_folder(
            folder / "model", folder / "safety", tmp_path / "b", BundleOptions(name="x"), made, on_step=lambda *_: None
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (ModelChanges(loras=((Path("no.safetensors"), 1.0),)), r"no\.safetensors does not exist; expected a LoRA"),
        (ModelChanges(loras=((Path("vae/diffusion_pytorch_model.safetensors"), 1.0),)), "belong to no layer of this model"),
        (ModelChanges(vae=Path("safety")), "safety cannot be used: Error no file named"),
        (ModelChanges(clip_skip=3), "clip skip is 3; expected 0 to 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(folder: Path, changes: ModelChanges, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(RequestError, match=says):
        change(load_pipeline(folder / "model"), changes)
