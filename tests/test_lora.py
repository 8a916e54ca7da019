"""A LoRA changes the model by what its file says, to the last tensor, or is refused by name."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.small_pipeline import save_first
from saferedir.engines.errors import RequestError
from saferedir.export.lora import fuse_lora
from saferedir_torch.models import load_pipeline

Parts = SimpleNamespace
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first(tmp_path_factory.mktemp("lora") / "model")


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    """UNet and text encoder of a small model, in fp64 so that changes can be told to the last digit."""
    pipeline = load_pipeline(folder)
    return Parts(unet=pipeline.unet.double(), text_encoder=pipeline.text_encoder.double())


@pytest.fixture
def model(parts: Parts) -> Parts:
    return deepcopy(parts)


def layers_of(parts: Parts) -> dict[tuple[str, str], Tensor]:
    """Weights of all layers that a LoRA may change, by part and name."""
    return {
        (part, name): module.weight
        for part in ("unet", "text_encoder")
        for name, module in getattr(parts, part).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def weights_of(parts: Parts) -> dict[tuple[str, str], np.ndarray]:
    return {key: weight.detach().numpy().copy() for key, weight in layers_of(parts).items()}


def in_text(name: str) -> str:
    """As files call the layers of a text encoder, whatever this version of transformers calls them."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def kohya(part: str, name: str, role: str) -> str:
    stem = f"lora_unet_{name}" if part == "unet" else f"lora_te_{in_text(name)}"
    return stem.replace(".", "_") + {"up": ".lora_up.weight", "down": ".lora_down.weight", "alpha": ".alpha"}[role]


def diffusers(part: str, name: str, role: str) -> str:
    ends = {"unet": ("lora_B", "lora_A"), "text_encoder": ("lora_linear_layer.up", "lora_linear_layer.down")}[part]
    name = name if part == "unet" else in_text(name)
    return f"{part}.{name}." + {"up": f"{ends[0]}.weight", "down": f"{ends[1]}.weight", "alpha": "alpha"}[role]


def peft(part: str, name: str, role: str) -> str:
    name = name if part == "unet" else in_text(name)
    return f"base_model.model.{name}." + {"up": "lora_B.weight", "down": "lora_A.weight", "alpha": "alpha"}[role]


SCHEMES = {"kohya": kohya, "diffusers": diffusers, "peft": peft}


def pair(weight: Tensor, rank: int, numbers: np.random.Generator, *, flat: bool = False) -> tuple[Tensor, Tensor]:
    """up and down for a layer; `flat` writes convolutions of one pixel as matrices."""
    outputs, inputs, *kernel = weight.shape
    tail = [] if flat and kernel == [1, 1] else kernel
    up = numbers.standard_normal([outputs, rank, *(1 for _ in tail)])
    return torch.from_numpy(up).float(), torch.from_numpy(numbers.standard_normal([rank, inputs, *tail])).float()


def product(up: Tensor, down: Tensor) -> np.ndarray:
    """up down, by the definition of a convolution of one pixel after another one."""
    left, right = up.double().numpy(), down.double().numpy()
    if left.ndim == 4:
        return np.einsum("or,rihw->oihw", left[:, :, 0, 0], right)
    return np.asarray(left @ right)


def beside(folder: Path, config: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_added_is_what_the_file_says(data: st.DataObject, parts: Parts, tmp_path: Path) -> None:
    weights = layers_of(parts)
    scheme = data.draw(st.sampled_from(["kohya", "diffusers", "diffusers metadata", "peft"]))
    keys = sorted(weights) if scheme != "peft" else [key for key in sorted(weights) if key[0] == "unet"]
    chosen = data.draw(st.lists(st.sampled_from(keys), unique=True, min_size=1, max_size=6))
    scale = data.draw(st.sampled_from([1.0, 0.5, -0.75, 2.0]))
    usual = data.draw(st.sampled_from([None, 1.0, 8.0, 3.5]))
    by_root = data.draw(st.booleans())
    numbers = np.random.default_rng(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    tensors: dict[str, Tensor] = {}
    expected: dict[tuple[str, str], np.ndarray] = {}
    patterns: dict[tuple[str, str], float] = {}
    for part, name in chosen:
        rank, own = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([None, 1.0, 4.0]))
        up, down = pair(weights[part, name], rank, numbers, flat=data.draw(st.booleans()))
        up, down = up.to(dtype), down.to(dtype)
        names = SCHEMES[scheme.partition(" ")[0]]
        tensors |= {names(part, name, "up"): up, names(part, name, "down"): down}
        if scheme in ("kohya", "diffusers"):
            alpha = own
            if own is not None:
                tensors[names(part, name, "alpha")] = torch.tensor(own)
            factor = 1.0 if alpha is None else alpha / rank
        else:
            if own is not None:
                patterns[part, name] = own
            alpha = own or usual or 8.0
            factor = alpha / (rank**0.5 if by_root else rank)
        expected[part, name] = scale * factor * product(up, down).reshape(weights[part, name].shape)
    for old in tmp_path.iterdir():
        old.unlink()
    config = {} if usual is None else {"lora_alpha": usual}
    config |= {"use_rslora": by_root}
    metadata = None
    if scheme == "peft":
        beside(tmp_path, config | {"alpha_pattern": {name: alpha for (_, name), alpha in patterns.items()}})
    elif scheme == "diffusers metadata":
        whole: dict[str, Any] = {}
        for part in ("unet", "text_encoder"):
            own_patterns = {name: alpha for (of, name), alpha in patterns.items() if of == part}
            whole |= {f"{part}.{key}": value for key, value in {**config, "alpha_pattern": own_patterns}.items()}
        metadata = {"lora_adapter_metadata": json.dumps(whole)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
    before = weights_of(parts)
    said = fuse_lora(parts, tmp_path / "lora.safetensors", scale)
    for key, weight in weights.items():
        change = weight.detach().numpy() - before[key]
        weight.data.copy_(torch.from_numpy(before[key]))
        wanted = expected.get(key, np.zeros_like(before[key]))
        np.testing.assert_allclose(change, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))
    assert f"to {sum(part == 'unet' for part, _ in chosen)} layers of the UNet" in said


@pytest.mark.parametrize("scheme", ["kohya", "diffusers"])
def test_it_is_what_diffusers_adds(scheme: str, folder: Path, parts: Parts, model: Parts, tmp_path: Path) -> None:
    numbers = np.random.default_rng(3)
    tensors: dict[str, Tensor] = {}
    # diffusers takes alphas that differ from layer to layer for one and the same, so here they are one.
    chosen = [key for key, weight in layers_of(parts).items() if "attn" in key[1] and weight.ndim == 2]
    for index, (part, name) in enumerate(chosen):
        up, down = pair(layers_of(parts)[part, name], 1 + index % 4, numbers)
        tensors |= {SCHEMES[scheme](part, name, "up"): 0.1 * up, SCHEMES[scheme](part, name, "down"): down}
        if scheme == "kohya":
            tensors[kohya(part, name, "alpha")] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    theirs = load_pipeline(folder)
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="x")
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    fuse_lora(model, tmp_path / "lora.safetensors", 0.7)
    ours, expected, before = weights_of(model), weights_of(theirs), weights_of(parts)
    assert {key for key in ours if np.abs(ours[key] - before[key]).max() > 1e-3} == set(chosen)
    for key in ours:
        np.testing.assert_allclose(ours[key], expected[key], atol=2e-6)


def test_diffusers_older_names_are_known(parts: Parts, model: Parts, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    unet = ATTENTION.removesuffix(".to_q")
    text = next(name for part, name in layers_of(parts) if part == "text_encoder" and name.endswith("out_proj"))
    old = {
        ("unet", f"{unet}.to_out.0"): f"unet.{unet}.processor.to_out_lora",
        ("text_encoder", text): f"text_encoder.{in_text(text).removesuffix('out_proj')}to_out_lora",
    }
    pairs = {key: pair(layers_of(parts)[key], 2, numbers) for key in old}
    tensors = {f"{old[key]}.up.weight": up for key, (up, _) in pairs.items()}
    tensors |= {f"{old[key]}.down.weight": down for key, (_, down) in pairs.items()}
    save_file(tensors, tmp_path / "old.safetensors")
    fuse_lora(model, tmp_path / "old.safetensors", 1.0)
    for key, (up, down) in pairs.items():
        np.testing.assert_allclose(weights_of(model)[key] - weights_of(parts)[key], product(up, down), atol=1e-6)


def attention(parts: Parts, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of one layer, in kohya's names."""
    up, down = pair(layers_of(parts)["unet", ATTENTION], rank, np.random.default_rng(0))
    return {kohya("unet", ATTENTION, "up"): up, kohya("unet", ATTENTION, "down"): down}


STEM = kohya("unet", ATTENTION, "alpha").removesuffix(".alpha")
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("further", "says"),
    [
        ({f"{STEM}.dora_scale": ONE}, "holds DoRA, which is not known here"),
        ({f"unet.{ATTENTION}.lora_magnitude_vector": ONE}, "holds DoRA"),
        ({f"{STEM}.hada_w1_a": ONE}, "holds LoHa, which is not known here"),
        ({f"{STEM}.lokr_w1": ONE}, "holds LoKr, which is not known here"),
        ({f"{STEM}.lora_mid.weight": ONE}, "holds a LoRA in Tucker's form"),
        ({f"{STEM}.diff": ONE}, "holds full differences of weights"),
        ({f"{STEM}.lora_up.bias": ONE}, "holds a LoRA with biases"),
        (
            {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": ONE},
            "1 of 3 tensors belong to no layer of this model, but are named as those of Stable Diffusion XL, such as lora_te2_",
        ),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": ONE}, "belong to no layer of this model.*Flux"),
        ({"lora_unet_down_blocks_7_attn1_to_q.lora_up.weight": ONE}, "1 of 3 tensors belong to no layer of this model, such"),
        ({"note": ONE}, "1 of 3 tensors belong to no layer of this model, such as note"),
        ({f"unet.{ATTENTION}.lora_A.weight": ONE}, "holds two tensors for down of unet"),
        ({kohya("unet", ATTENTION, "alpha"): torch.ones(2)}, "alpha of shape"),
        ({kohya("unet", ATTENTION, "alpha"): torch.tensor(float("nan"))}, "is no tensor of finite numbers"),
        ({kohya("unet", ATTENTION, "up"): torch.ones(3, 2)}, r"has shape \(32, 32\), its up and down are \(3, 2\)"),
        ({kohya("unet", "conv_in", "up"): torch.ones(16, 2)}, "conv_in has no down"),
        ({kohya("unet", ATTENTION, "down"): torch.ones(0, 32)}, "its up and down are"),
        ({kohya("unet", ATTENTION, "down"): ONE[0]}, "its up and down are"),
        ({kohya("unet", ATTENTION, "alpha"): torch.tensor(1e300, dtype=torch.float64)}, "changes by is not finite"),
        ({kohya("unet", "conv_in", "up"): torch.ones(16, 2), kohya("unet", "conv_in", "down"): torch.ones(2, 3, 3, 4)},
         r"conv_in has shape \(16, 4, 3, 3\)"),
    ],
)  # fmt: skip
def test_more_or_less_than_a_lora_of_this_model_is_refused_and_changes_nothing(
    further: dict[str, Tensor], says: str, parts: Parts, model: Parts, tmp_path: Path
) -> None:
    save_file(attention(parts) | further, tmp_path / "lora.safetensors")
    with pytest.raises(RequestError, match=says):
        fuse_lora(model, tmp_path / "lora.safetensors", 1.0)
    before, after = weights_of(parts), weights_of(model)
    assert all(np.array_equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "use_dora 'True'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"some_later_option": 3}, "some_later_option '3'"),
        ({"lora_alpha": "much"}, "cannot be used as a LoRA here: could not convert"),
        ({"lora_alpha": None}, "cannot be used as a LoRA here"),
        ({"alpha_pattern": {"(": 1}}, "cannot be used as a LoRA here"),
        ({"alpha_pattern": [1]}, "cannot be used as a LoRA here"),
    ],
)
def test_what_peft_asks_for_beyond_a_plain_lora_is_named(
    config: dict[str, Any], says: str, parts: Parts, model: Parts, tmp_path: Path
) -> None:
    up, down = attention(parts).values()
    save_file(
        {peft("unet", ATTENTION, "up"): up, peft("unet", ATTENTION, "down"): down}, tmp_path / "adapter_model.safetensors"
    )
    beside(tmp_path, config)
    with pytest.raises(RequestError, match=says):
        fuse_lora(model, tmp_path / "adapter_model.safetensors", 1.0)


def test_metadata_that_leaves_a_part_out_is_named(parts: Parts, model: Parts, tmp_path: Path) -> None:
    config = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 2, "text_encoder.lora_alpha": 2})}
    save_file(attention(parts), tmp_path / "lora.safetensors", metadata=config)
    with pytest.raises(RequestError, match="its metadata says nothing of the unet"):
        fuse_lora(model, tmp_path / "lora.safetensors", 1.0)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_file_is_let_through_untyped(data: st.DataObject, parts: Parts, tmp_path: Path) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(layers_of(parts))), unique=True, min_size=1, max_size=3))
    tensors: dict[str, Tensor] = {}
    for part, name in keys:
        up, down = pair(layers_of(parts)[part, name], 2, np.random.default_rng(0))
        tensors |= {kohya(part, name, "up"): up, kohya(part, name, "down"): down, kohya(part, name, "alpha"): ONE.clone()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    old = tensors.pop(name)
    tensors |= data.draw(
        st.sampled_from(
            [{}, {name: old.flatten()}, {name: old[None]}, {name: old.int()}, {name: old[:0]}, {name[:-1]: old},
             {name[9:]: old},
             {name.replace("_", "."): old}, {name.replace("lora_", ""): old}, {name: old * float("inf")}, {name: old > 0},
             {name: old.repeat(2, *(1 for _ in old.shape[1:]))}, {"": old}, {name + ".": old}, {"." + name: old}]
        )
    )  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    before = weights_of(parts)
    try:
        fuse_lora(parts, tmp_path / "lora.safetensors", 1.0)
    except RequestError:
        changed = [key for key, weight in layers_of(parts).items() if not np.array_equal(weight.detach(), before[key])]
        assert not changed
        return
    for key, weight in layers_of(parts).items():
        assert np.array_equal(weight.detach(), before[key]) == (key not in keys)
        weight.data.copy_(torch.from_numpy(before[key]))


def test_pefts_file_alone_does_not_say_its_alpha(parts: Parts, model: Parts, tmp_path: Path) -> None:
    up, down = attention(parts).values()
    save_file(
        {peft("unet", ATTENTION, "up"): up, peft("unet", ATTENTION, "down"): down}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(RequestError, match=r"does not say its alpha, nor does .*adapter_config\.json"):
        fuse_lora(model, tmp_path / "adapter_model.safetensors", 1.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_named(scale: float, model: Parts, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected a finite scale"):
        fuse_lora(model, tmp_path / "lora.safetensors", scale)


def test_files_that_are_none_are_named(parts: Parts, model: Parts, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no\.safetensors does not exist; expected a LoRA"):
        fuse_lora(model, tmp_path / "no.safetensors", 1.0)
    save_file(attention(parts), tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-5])
    with pytest.raises(RequestError, match=r"cut\.safetensors is no readable LoRA"):
        fuse_lora(model, tmp_path / "cut.safetensors", 1.0)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(RequestError, match="is empty"):
        fuse_lora(model, tmp_path / "empty.safetensors", 1.0)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(RequestError, match="holds a list"):
        fuse_lora(model, tmp_path / "list.pt", 1.0)
