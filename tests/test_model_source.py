"""Models come as a folder, as a name on the hub or as one file, and are the same model each time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.single_file import save_single_file
from benchmarks.small_pipeline import save_first
from saferedir.engines.errors import RequestError
from saferedir.export.command import _open
from saferedir_torch.model_source import locate, open_single_file
from saferedir_torch.models import load_pipeline

#: Asks for a name on the hub without a network, as the library itself reads it from its cache.
FIND = "import sys; from saferedir_torch.model_source import locate; print(locate(sys.argv[1]))"
WHOLE = {f"{prefix}x": torch.zeros(1) for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first(tmp_path_factory.mktemp("model") / "folder")


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single_file(load_pipeline(folder), tmp_path_factory.mktemp("file") / "model.safetensors")


def test_one_file_is_the_model_of_the_folder(folder: Path, file: Path) -> None:
    ours, theirs = _open(file, str(folder)), _open(folder)
    for part in ("unet", "vae", "text_encoder"):
        first, second = (getattr(pipeline, part).state_dict() for pipeline in (ours, theirs))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert ours.scheduler.config == theirs.scheduler.config
    assert ours.tokenizer("a church").input_ids == theirs.tokenizer("a church").input_ids


def test_a_folder_needs_no_other_configuration(folder: Path) -> None:
    with pytest.raises(RequestError, match="configuration of its own"):
        _open(folder, str(folder))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_down.lora_down.weight": torch.zeros(1)}, "is a LoRA"),
        (WHOLE | {"conditioner.embedders.0.x": torch.zeros(1)}, "Stable Diffusion XL"),
        ({"model.diffusion_model.double_blocks.0.x": torch.zeros(1)}, "Flux"),
        ({"model.diffusion_model.x": torch.zeros(1)}, "has no VAE, no text encoder"),
        (WHOLE, "cannot be opened as a Stable Diffusion model"),
    ],
)
def test_other_files_are_named_for_what_they_are(
    tmp_path: Path, folder: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    with pytest.raises(RequestError, match=message):
        _open(path, str(folder))


def test_a_file_cut_short_is_named(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RequestError, match=r"cut\.safetensors is damaged or cut short"):
        open_single_file(path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"")
    with pytest.raises(RequestError, match="may run code"):
        open_single_file(path)


def test_a_configuration_folder_without_one_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no model_index\.json"):
        open_single_file(file, tmp_path)


def test_what_is_nowhere_is_named() -> None:
    with pytest.raises(RequestError, match=r"nowhere\.safetensors does not exist"):
        locate("nowhere.safetensors")


def on_the_hub(name: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", FIND, name], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_name_on_the_hub_is_found_in_its_cache(tmp_path: Path, folder: Path) -> None:
    place = tmp_path / "hub" / "models--acme--tiny"
    shutil.copytree(folder, place / "snapshots" / "0123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123")
    result = on_the_hub("acme/tiny", tmp_path)
    assert Path(result.stdout.strip()) == place / "snapshots" / "0123", result.stderr


@pytest.mark.slow
def test_a_name_that_is_not_to_be_had_ends_in_one_line(tmp_path: Path) -> None:
    result = on_the_hub("acme/missing", tmp_path)
    assert "RequestError: acme/missing is no folder here and cannot be had from the hub" in result.stderr
