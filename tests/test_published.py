"""The published network: its layout, the properties that its code implies, and its controller around the deployed UNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from benchmarks.published_backend import PublishedBackend, published_bundle
from saferedir.engines import open_bundle
from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import ConceptInfo
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir_torch.published import PublishedNetwork, published_step
from saferedir_torch.published_checkpoint import load_published

#: Some parameters of the released checkpoints, of each part.
LAYOUT = {
    "pos_embed": (1, 77, 768),
    "latent_encoder.0.conv.0.weight": (64, 4, 3, 3),
    "latent_encoder.2.conv.4.running_var": (256,),
    "latent_encoder.1.downsample.weight": (128, 64, 1, 1),
    "latent_encoder.5.weight": (512, 256),
    "t_encoder.0.weight": (64, 320),
    "t_encoder.2.bias": (64,),
    "cross_attn.heads.3.query.weight": (768, 576),
    "cross_attn.fuse.0.weight": (768, 3072),
    "classifier.0.weight": (256, 2112),
    "classifier.3.weight": (2, 256),
    "token_proj.0.weight": (512, 1344),
    "delta_head.scale": (),
    "delta_head.down.weight": (16, 768),
    "gate_linear.weight": (1, 768),
    "mask_predictor.attn.in_proj_weight": (2304, 768),
    "mask_predictor.predictor.3.weight": (1, 128),
    "alpha_predictor.net.2.bias": (1,),
}


@pytest.fixture(scope="module")
def network() -> PublishedNetwork:
    torch.manual_seed(0)
    return PublishedNetwork(width=128).eval()


def test_parameters_are_named_and_shaped_as_in_the_released_checkpoints() -> None:
    state = PublishedNetwork().state_dict()
    assert {name: tuple(state[name].shape) for name in LAYOUT} == LAYOUT


@torch.no_grad()
def test_gate_and_mask_cancel_out(network: PublishedNetwork) -> None:
    generator = torch.Generator().manual_seed(1)
    latent, prompt = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 128, generator=generator)
    output = network(latent, prompt, torch.tensor([500.0, 20.0]))
    scaled = output._replace(delta=output.delta * torch.rand(2, 77, 1, generator=generator).clamp(min=0.1))
    torch.testing.assert_close(published_step(prompt, output, 1.5), published_step(prompt, scaled, 1.5))
    moved = (published_step(prompt, output, 1.5) - prompt).norm(dim=-1)
    torch.testing.assert_close(moved, 1.5 * output.alpha[..., 0] * prompt.norm(dim=-1))
    direction = torch.nn.functional.normalize(output.delta, dim=-1)
    torch.testing.assert_close(direction, direction[:, :1].expand_as(direction), rtol=1e-3, atol=1e-4)


def test_the_controller_acts_one_step_late_and_on_both_halves(network: PublishedNetwork) -> None:
    opened = open_bundle("emoji-diffusion")
    concept = ConceptInfo("church", "house", None, 1.5)
    bundle = published_bundle(opened, replace(opened.manifest.safety, concepts=(concept,), promise=None))
    with torch.no_grad():
        network.classifier[3].bias.copy_(torch.tensor([-9.0, 9.0]))  # always unsafe
    pipeline = Pipeline(bundle, PublishedBackend(bundle, network))
    plain = Pipeline(bundle, pipeline.backend, SafetyPolicy(unprotected=True))
    one = pipeline("a church", seed=1, num_inference_steps=1)
    assert one.records[0].steps[0].fired == ("church",)
    assert one.images[0].tobytes() == plain("a church", seed=1, num_inference_steps=1).images[0].tobytes()
    four = pipeline("a church", seed=1, num_inference_steps=4)
    assert [bool(step.fired) for step in four.records[0].steps] == [True, False, False, True]
    assert four.images[0].tobytes() != plain("a church", seed=1, num_inference_steps=4).images[0].tobytes()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (lambda own: torch.zeros(1, 1, 1).expand(1, 10**9, 768), "pos_embed repeats itself, 1x1000000000x768 of 4 bytes"),
        (lambda own: own.to(torch.float8_e4m3fn), "pos_embed is of type float8_e4m3fn"),
        (lambda own: own.to_sparse(), "pos_embed is sparse"),
        (lambda own: torch.empty_like(own, device="meta"), "pos_embed has no data"),
        (lambda own: own.to(torch.complex64), "pos_embed is of type complex64"),
        (lambda own: torch.zeros(1, 77, 4), "is 64x4x3x3|expected"),
    ],
)
def test_a_hostile_tensor_is_refused_before_memory_is_taken(
    network: PublishedNetwork, tmp_path: Path, tensor: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    state = dict(network.state_dict())
    torch.save(state | {"pos_embed": tensor(state["pos_embed"])}, tmp_path / "best_model.pt")
    with pytest.raises(RequestError, match=rf"best_model\.pt.*({says})"):
        load_published(tmp_path / "best_model.pt")
    torch.save(state | {"more": torch.zeros(1).expand(10**12)}, tmp_path / "best_model.pt")
    with pytest.raises(RequestError, match="more repeats itself"):
        load_published(tmp_path / "best_model.pt")
