"""Which text encoders a safety module fits: the same weights in any precision, with any words added, and no others."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_module import fitting_module
from torch import nn

from saferedir.engines import DEFAULT_BUNDLE, open_bundle
from saferedir.engines.errors import SafetyMismatchError
from saferedir_torch.config import SafetyConfig
from saferedir_torch.fit import check_match, encoder_hashes, made_for
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY
from saferedir_torch.safety_module import SafetyModule

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def safety(eager: Any) -> SafetyModule:
    return fitting_module(eager, "church")


@pytest.fixture
def pipe(eager: Any) -> Any:
    """A pipeline whose text encoder and tokenizer the test may change."""
    pipe = copy.copy(eager)
    pipe.text_encoder, pipe.tokenizer = copy.deepcopy(pipe.text_encoder), copy.deepcopy(pipe.tokenizer)
    return pipe


def never_rounded(pipe: Any) -> Any:
    """`pipe` with weights that neither fp16 nor bf16 holds, very small ones among them."""
    generator = torch.Generator().manual_seed(0)
    for weight in pipe.text_encoder.parameters():
        weight.data += 1e-3 * torch.randn(weight.shape, generator=generator)
        weight.data *= torch.where(torch.rand(weight.shape, generator=generator) < 0.02, 1e-3, 1.0)
    return pipe


@pytest.mark.parametrize(("first", "then"), list(product(DTYPES, DTYPES)))
def test_the_shipped_encoder_in_another_precision_is_the_same(
    pipe: Any, safety: SafetyModule, first: torch.dtype, then: torch.dtype
) -> None:
    pipe.text_encoder.to(first).to(then)
    check_match(pipe, safety)


@pytest.mark.parametrize(("before", "first", "then"), list(product(DTYPES, DTYPES, DTYPES)))
def test_an_encoder_that_rounding_changes_is_the_same_after_any_casts(
    pipe: Any, before: torch.dtype, first: torch.dtype, then: torch.dtype
) -> None:
    never_rounded(pipe).text_encoder.to(before)
    safety = fitting_module(pipe, "church")
    pipe.text_encoder.to(first).to(then).to(torch.float32)
    check_match(pipe, safety)


def test_the_encoder_that_a_module_was_made_with_in_less_precision_is_the_same(pipe: Any) -> None:
    whole = copy.deepcopy(never_rounded(pipe).text_encoder)
    for dtype in DTYPES[1:]:
        pipe.text_encoder = copy.deepcopy(whole).to(dtype)
        safety = fitting_module(pipe, "church")
        pipe.text_encoder = whole
        check_match(pipe, safety)


def test_added_words_leave_it_the_same(pipe: Any, safety: SafetyModule, tmp_path: Path) -> None:
    save_file({"emb_params": torch.randn(2, 128)}, tmp_path / "zork.safetensors")
    pipe.load_textual_inversion(tmp_path / "zork.safetensors", token="zork")
    check_match(pipe, safety)
    words = pipe.tokenizer.vocab_size
    assert pipe.text_encoder.get_input_embeddings().num_embeddings == words + 2
    pipe.text_encoder.resize_token_embeddings(words + 50)
    check_match(pipe, safety)
    pipe.text_encoder.get_input_embeddings().weight.data[words - 1] *= 1.01
    with pytest.raises(SafetyMismatchError, match="text encoder"):
        check_match(pipe, safety)


def adapted(layer: nn.Linear, scale: float) -> None:
    """As a LoRA of rank 4, whose product is a tenth as large as the weights, is fused."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, layer.in_features, generator=generator), torch.randn(layer.out_features, 4, generator=generator)
    product = up @ down
    layer.weight.data += scale * 0.1 * float(layer.weight.data.norm() / product.norm()) * product


def test_rows_that_change_places_are_noticed(pipe: Any, safety: SafetyModule) -> None:
    check_match(pipe, safety)
    words = pipe.text_encoder.get_input_embeddings().weight.data
    words[[7, 8]] = words[[8, 7]]
    with pytest.raises(SafetyMismatchError, match="text encoder"):
        check_match(pipe, safety)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.05, 0.001])
def test_a_fused_lora_makes_it_another(pipe: Any, safety: SafetyModule, scale: float, dtype: torch.dtype) -> None:
    for layer in pipe.text_encoder.encoder.layers:
        adapted(layer.self_attn.q_proj, scale)
    pipe.text_encoder.to(dtype)
    with pytest.raises(SafetyMismatchError, match="text encoder: the safety module is made for"):
        check_match(pipe, safety)


@pytest.mark.parametrize(
    "name", ["embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.bias", "final_layer_norm.weight"]
)
def test_one_other_value_makes_it_another(pipe: Any, safety: SafetyModule, name: str) -> None:
    dict(pipe.text_encoder.named_parameters())[name].data.flatten()[3] += 0.1
    with pytest.raises(SafetyMismatchError, match="text encoder"):
        check_match(pipe, safety)


def test_names_of_other_versions_of_transformers_leave_it_the_same(pipe: Any) -> None:
    """Version 5 names the weights without the `text_model.` that 4 has before each."""
    expected = encoder_hashes(pipe)
    inner = pipe.text_encoder

    class Prefixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_model = inner

        def get_input_embeddings(self) -> nn.Module:
            return inner.get_input_embeddings()

    pipe = copy.copy(pipe)
    vars(pipe)["text_encoder"] = Prefixed()
    assert encoder_hashes(pipe) == expected


def test_the_shipped_modules_state_the_shipped_encoder(eager: Any) -> None:
    hashes = encoder_hashes(eager)
    assert hashes.through_fp16 == hashes.direct  # its weights are fp16 on disk
    configs = [SHIPPED_SAFETY / "config.json", *Path(__file__).parents[1].glob("benchmarks/modules/*/config.json")]
    assert {made_for(SafetyConfig.load(path)) for path in configs} == {frozenset(hashes)}
    manifest = open_bundle(DEFAULT_BUNDLE).manifest
    assert manifest.model is not None
    assert {manifest.model.text_encoder_sha256, manifest.safety.text_encoder_sha256} == set(hashes)


def test_an_encoder_that_is_not_in_memory_says_so(pipe: Any, safety: SafetyModule) -> None:
    pipe.text_encoder.to("meta")
    with pytest.raises(SafetyMismatchError, match=r"not in memory .* use enable_model_cpu_offload"):
        check_match(pipe, safety)


def test_diffusers_own_way_to_half_precision_fits(safety: SafetyModule) -> None:
    from diffusers import StableDiffusionPipeline

    for dtype in DTYPES[1:]:
        check_match(StableDiffusionPipeline.from_pretrained(SHIPPED_MODEL, torch_dtype=dtype), safety)
