"""LoRAs, another VAE, skipped layers and added words: each is fused in at export, and equals what diffusers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from benchmarks.small_pipeline import save_small_pipeline, save_small_safety
from saferedir.engines import open_bundle
from saferedir.engines.errors import RequestError, SafetyMismatchError
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.export.model_changes import ModelChanges, change, with_words
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.verify import verify_bundle
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


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """Everything at once, as the command does it."""
    return export_folder(
        folder / "model", folder / "safety", folder / "bundle",
        BundleOptions(name="changed", max_batch=2, words=(folder / "toy.bin", folder / "scene.bin")),
        ModelChanges(loras=((folder / "unet.safetensors", 0.5),), vae=folder / "vae"),
        save_model=folder / "saved", on_step=lambda *_: None,
    )  # fmt: skip


def test_the_bundle_equals_the_changed_model(exported: Path, folder: Path) -> None:
    report = verify_bundle(exported, folder / "saved", folder / "safety")
    assert report.passed
    with pytest.raises(SafetyMismatchError, match="not the model"):
        verify_bundle(exported, folder / "model", folder / "safety")


def test_pictures_are_those_of_diffusers_with_the_same_changes(exported: Path, folder: Path) -> None:
    theirs = load_pipeline(folder / "model")
    theirs.load_lora_weights(folder, weight_name="unet.safetensors", adapter_name="x")
    theirs.set_adapters(["x"], [0.5])
    theirs.register_modules(vae=AutoencoderKL.from_pretrained(folder / "vae"))
    for name in ("toy", "scene"):
        theirs.load_textual_inversion(folder / f"{name}.bin")
    ours = Pipeline.from_bundle(exported, policy=SafetyPolicy(unprotected=True))
    for prompt in ("a <toy> beside a cat", "a <scene>"):
        drawn = np.asarray(ours(prompt, seed=7, num_inference_steps=4, guidance_scale=5.0).images[0])
        generator = torch.Generator().manual_seed(7)
        expected = theirs(prompt, generator=generator, num_inference_steps=4, guidance_scale=5.0, output_type="np").images[0]
        assert np.abs(drawn - (expected * 255).round()).max() <= 1
    plain = np.asarray(ours("a beside a cat", seed=7, num_inference_steps=4).images[0])
    assert np.abs(plain.astype(int) - drawn).max() > 1


def test_a_word_of_several_vectors_becomes_as_many_tokens(exported: Path) -> None:
    manifest = open_bundle(exported).manifest
    assert manifest.model is not None
    assert manifest.model.added_words == {"<toy>": ("<toy>",), "<scene>": ("<scene>", "<scene>_1")}
    record = Pipeline.from_bundle(exported)("a <scene> and a <toy>", num_inference_steps=1).records[0]
    assert [token for token in record.tokens if token.startswith("<") and "text" not in token] == [
        "<scene>",
        "<scene>_1",
        "<toy>",
    ]


def test_added_words_leave_all_others_as_they_are(folder: Path) -> None:
    pipeline = load_pipeline(folder / "model")
    added, _ = with_words(pipeline, (folder / "scene.bin",))
    ids = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        before, after = (one.text_encoder(ids).last_hidden_state for one in (pipeline, added))
    assert torch.equal(before, after)
    assert "<scene>" not in pipeline.tokenizer.get_vocab()


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
        (ModelChanges(loras=((Path("vae/diffusion_pytorch_model.safetensors"), 1.0),)), "cannot be used as a LoRA here"),
        (ModelChanges(vae=Path("safety")), "safety cannot be used as a VAE here"),
        (ModelChanges(clip_skip=3), "clip skip is 3; expected 0 to 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(folder: Path, changes: ModelChanges, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(RequestError, match=says):
        change(load_pipeline(folder / "model"), changes)


def test_a_word_of_another_width_is_named(folder: Path, tmp_path: Path) -> None:
    save_file({"<wide>": torch.randn(64)}, tmp_path / "wide.safetensors")
    with pytest.raises(RequestError, match=r"wide\.safetensors cannot be used as a textual inversion here"):
        with_words(load_pipeline(folder / "model"), (tmp_path / "wide.safetensors",))
