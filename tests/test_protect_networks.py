"""Every network that a protected pipeline gives its prompt to: followed, or refused with the reason."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MultiControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionSAGPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from saferedir.engines.errors import SafetyError, SafetyMismatchError
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.network_hooks import networks_of
from saferedir_torch.pixart import PixArt
from saferedir_torch.protect import EagerPolicy, Guard, protect
from saferedir_torch.safety_module import SafetyModule

UNSAFE, SAFE = "a church next to a cat", "a dog on blue"
STEPS = 2
PICTURE = Image.new("RGB", (64, 64), (40, 90, 170))
MASK = Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((32, 0), (0, 0))))


@pytest.fixture(scope="module")
def controls(eager: Any) -> list[Any]:
    """Two ControlNets that read the prompt and, untrained, change nothing; the second with other weights."""
    made = [ControlNetModel.from_unet(eager.unet, conditioning_embedding_out_channels=(16, 32, 96)) for _ in range(2)]
    for weight in made[1].parameters():
        weight.data *= 1.01
    return made


def sibling(kind: Any, pipe: Any, **parts: Any) -> Any:
    own = {name: part for name, part in pipe.components.items() if name in inspect.signature(kind.__init__).parameters}
    made = kind(**(own | parts), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, prompt: str | list[str] = UNSAFE, **options: Any) -> Any:
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"} | options
    return pipe(prompt, generator=torch.Generator().manual_seed(1), **options)


def given_to(networks: list[Any], run: Callable[[], Any]) -> list[list[Tensor]]:
    """What each network is given as its prompt while `run` draws."""
    given: list[list[Tensor]] = [[] for _ in networks]
    hooks = [
        network.register_forward_pre_hook(
            lambda _, __, kwargs, kept=kept: kept.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        for network, kept in zip(networks, given, strict=True)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return given


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_a_controlnet_is_given_the_redirected_prompt(
    pipe: Any, controls: list[Any], safety: SafetyModule, several: bool, guess_mode: bool
) -> None:
    nets = controls if several else controls[:1]
    other = sibling(StableDiffusionControlNetPipeline, pipe, controlnet=MultiControlNetModel(nets) if several else nets[0])
    options: dict[str, Any] = {"image": [PICTURE] * 2 if several else PICTURE, "guess_mode": guess_mode}
    with protect(other, safety), protect(pipe, safety):
        run: list[Any] = []
        *to_nets, to_unet = given_to([*nets, pipe.unet], lambda: run.append(draw(other, **options)))
        plain = draw(pipe)
    assert np.array_equal(run[0].images, plain.images)  # these ControlNets change nothing, and each step was decided once
    assert torch.equal(run[0].safety.scores, plain.safety.scores) and plain.safety.fired[0, 0, 0]
    assert len(to_unet) == STEPS
    for to_net in to_nets:
        assert [len(given) for given in to_net] == [1 if guess_mode else 2] * STEPS
        assert all(torch.equal(net[-1], unet[-1]) for net, unet in zip(to_net, to_unet, strict=True))


def test_a_controlnet_that_two_pipelines_share_is_followed_in_each(
    pipe: Any, controls: list[Any], safety: SafetyModule
) -> None:
    first = sibling(StableDiffusionControlNetPipeline, pipe, controlnet=controls[0])
    second = sibling(StableDiffusionControlNetPipeline, pipe, controlnet=MultiControlNetModel(controls))
    with protect(first, safety):
        alone = draw(first, image=PICTURE)
        with protect(second, safety):
            assert draw(second, image=[PICTURE] * 2).safety.fired.any()
        assert np.array_equal(draw(first, image=PICTURE).images, alone.images)
    assert not any(net._forward_pre_hooks for net in (*controls, pipe.unet))


def test_pictures_and_masks_are_drawn_from_under_protection(pipe: Any, controls: list[Any], safety: SafetyModule) -> None:
    control = {"controlnet": controls[0]}
    others: list[tuple[Any, dict[str, Any]]] = [
        (sibling(StableDiffusionInpaintPipeline, pipe), {"image": PICTURE, "mask_image": MASK}),
        (sibling(StableDiffusionControlNetImg2ImgPipeline, pipe, **control), {"image": PICTURE, "control_image": PICTURE}),
        (
            sibling(StableDiffusionControlNetInpaintPipeline, pipe, **control),
            {"image": PICTURE, "mask_image": MASK, "control_image": PICTURE},
        ),
    ]
    for other, options in others:
        options |= {"strength": 0.9, "num_inference_steps": 3}
        plain = draw(other, SAFE, **options).images
        with protect(other, safety):
            drawn, unsafe = draw(other, SAFE, **options), draw(other, [SAFE, UNSAFE], num_images_per_prompt=2, **options)
        assert np.array_equal(drawn.images, plain)
        assert len(drawn.safety.timesteps) == STEPS
        assert unsafe.safety.fired[0, :, 0].tolist() == [False, False, True, True]


class Adapter(torch.nn.Module):
    """Features of a picture, as a T2I adapter adds them to the UNet's."""

    downscale_factor, dtype, device = 4, torch.float32, torch.device("cpu")

    def forward(self, picture: Tensor) -> list[Tensor]:
        shapes = ((64, 8), (128, 8), (192, 4))
        return [picture.mean() * torch.ones(len(picture), channels, side, side) for channels, side in shapes]


def test_an_adapter_that_reads_a_picture_is_followed(pipe: Any, safety: SafetyModule) -> None:
    other = sibling(StableDiffusionAdapterPipeline, pipe, adapter=Adapter())
    plain = draw(other, SAFE, image=PICTURE).images
    with protect(other, safety):
        drawn, unsafe = draw(other, SAFE, image=PICTURE), draw(other, image=PICTURE)
    assert np.array_equal(drawn.images, plain) and not drawn.safety.fired.any()
    assert unsafe.safety.fired[0, 0, 0] and len(unsafe.safety.timesteps) == STEPS


def test_the_pipeline_of_latent_consistency_models_is_followed(pipe: Any, safety: SafetyModule) -> None:
    unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=16)
    unet.load_state_dict(pipe.unet.state_dict(), strict=False)
    few = sibling(LatentConsistencyModelPipeline, pipe, unet=unet, scheduler=LCMScheduler.from_config(pipe.scheduler.config))
    plain = draw(few, SAFE).images
    with protect(few, safety):
        drawn, unsafe = draw(few, SAFE), draw(few)
    assert np.array_equal(drawn.images, plain)
    assert unsafe.safety.fired[0, 0, 0] and len(unsafe.safety.timesteps) == STEPS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"added_cond_kwargs": {"image_embeds": [torch.zeros(1, 1, 8)]}}, "added_cond_kwargs: an IP-Adapter's picture"),
        ({"class_labels": torch.zeros(1)}, "class_labels: a class is a second prompt"),
        ({"encoder_attention_mask": torch.ones(1, 77)}, "encoder_attention_mask: protection cannot follow it"),
        ({"cross_attention_kwargs": {"gligen": {}}}, r"cross_attention_kwargs\['gligen'\]: protection cannot follow it"),
    ],
)
def test_what_could_say_what_to_draw_past_the_prompt_is_refused(
    pipe: Any, safety: SafetyModule, given: dict[str, Any], said: str
) -> None:
    def also_given(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | given

    hook = pipe.unet.register_forward_pre_hook(also_given, with_kwargs=True)
    try:
        with protect(pipe, safety), pytest.raises(SafetyError, match=f"UNet2DConditionModel was given {said}"):
            draw(pipe)
    finally:
        hook.remove()


def test_an_ip_adapter_is_refused(pipe: Any, safety: SafetyModule) -> None:
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    pipe.prepare_ip_adapter_image_embeds = lambda *_: [torch.zeros(2, 1, 8)]
    with protect(pipe, safety), pytest.raises(SafetyError, match="an IP-Adapter's picture is a second prompt"):
        draw(pipe, ip_adapter_image_embeds=[torch.zeros(2, 1, 8)])


def test_a_lora_of_the_unet_is_followed_at_any_strength(pipe: Any, safety: SafetyModule) -> None:
    from peft import LoraConfig

    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    drawn = {}
    for scale in (0.0, 0.5):
        plain = draw(pipe, SAFE, cross_attention_kwargs={"scale": scale}).images
        with protect(pipe, safety):
            drawn[scale] = draw(pipe, SAFE, cross_attention_kwargs={"scale": scale}).images
        assert np.array_equal(drawn[scale], plain)
    assert not np.array_equal(drawn[0.0], drawn[0.5])


@pytest.mark.slow
def test_a_compiled_unet_is_followed_and_its_original_guarded(pipe: Any, safety: SafetyModule) -> None:
    original = copy.copy(pipe)
    with protect(pipe, safety):
        expected = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    draw(pipe, SAFE)  # compiled before it was hooked
    with protect(pipe, safety):
        found = draw(pipe)
        with pytest.raises(SafetyError, match="without a prompt of a protected pipeline"):
            draw(original)
        with protect(original, safety):
            assert draw(original).safety.fired.any()
    assert torch.equal(found.safety.fired, expected.safety.fired) and found.safety.fired.any()
    np.testing.assert_allclose(found.images, expected.images, atol=1e-4)
    torch.compiler.reset()


def test_networks_that_hooks_do_not_reach_are_refused(pipe: Any, controls: list[Any], safety: SafetyModule) -> None:
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.compile(backend="eager")
    with pytest.raises(SafetyError, match="UNet2DConditionModel was compiled in place"), protect(pipe, safety):
        pass
    together = sibling(StableDiffusionControlNetPipeline, pipe, controlnet=MultiControlNetModel(controls))
    vars(together)["controlnet"] = torch.compile(together.controlnet, backend="eager")
    with pytest.raises(SafetyError, match="compile each of its nets"):
        networks_of(together)
    vars(pipe)["unet"] = object()
    with pytest.raises(SafetyError, match="object is no module of PyTorch"):
        networks_of(pipe)


def test_a_step_that_the_safety_did_not_see_gives_no_picture(pipe: Any, safety: SafetyModule) -> None:
    with protect(pipe, safety):
        unseen = pipe.unet.forward

        def callback(pipe: Any, _: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            vars(pipe)["unet"] = Bare()
            return tensors

        class Bare:
            config = pipe.unet.config

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return unseen(*args, **kwargs)

        with pytest.raises(SafetyError, match="the safety saw 1 of 2 steps; no picture is handed out"):
            draw(pipe, callback_on_step_end=callback)


def test_a_network_that_is_replaced_within_a_call_gives_no_picture(
    pipe: Any, controls: list[Any], safety: SafetyModule
) -> None:
    def replace(pipe: Any, _: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.controlnet = controls[1]
        return tensors

    other = sibling(StableDiffusionControlNetPipeline, pipe, controlnet=controls[0])
    with protect(other, safety), pytest.raises(SafetyError, match="a network was replaced within a call"):
        draw(other, image=PICTURE, callback_on_step_end=replace)


def test_a_forward_that_somebody_replaced_is_followed(pipe: Any, safety: SafetyModule) -> None:
    """As caches of deep features do, which compute some steps in part."""
    pipe.unet = copy.deepcopy(pipe.unet)
    inner, called = pipe.unet.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(kwargs["encoder_hidden_states"])
        return inner(*args, **kwargs)

    with protect(pipe, safety):
        expected = draw(pipe)
        pipe.unet.forward = forward
        found = draw(pipe)
    assert np.array_equal(found.images, expected.images)
    assert len(called) == STEPS and found.safety.fired.any()


def test_half_precision_is_protected_in_full(pipe: Any, safety: SafetyModule) -> None:
    pipe = copy.deepcopy(pipe).to(torch.bfloat16)
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "height": 48, "width": 48}
    plain = draw(pipe, SAFE, **options).images
    with protect(pipe, safety):
        safe, unsafe = draw(pipe, SAFE, **options), draw(pipe, **options)
    assert torch.equal(safe.images, plain) and plain.dtype == torch.bfloat16
    assert unsafe.safety.fired[0, 0, 0] and unsafe.safety.scores.dtype == torch.float32


def test_autocast_is_not_the_safetys(pipe: Any, safety: SafetyModule) -> None:
    embeds, latent, scores = pipe.encode_prompt(UNSAFE, "cpu", 1, False)[0], torch.randn(1, 4, 16, 16), []
    for enabled in (False, True):
        run = Guard(safety, EagerPolicy()).run(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run.embeddings(latent, 999, embeds, NoiseLevels(pipe.scheduler), 5.0, denoises=True)
        scores.append(run.record.scores)
    assert torch.equal(*scores)


def test_a_pipeline_of_another_kind_is_refused_by_name(pipe: Any, safety: SafetyModule) -> None:
    with pytest.raises(SafetyError, match="StableDiffusionSAGPipeline cannot be protected; expected one of StableDiffusion"):
        protect(sibling(StableDiffusionSAGPipeline, pipe), safety).__enter__()
    parts = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "vae", "tokenizer", "scheduler")}
    with pytest.raises(SafetyError, match="PixArt cannot be protected"):
        protect(PixArt(**parts), safety).__enter__()


def test_an_inpainting_unet_of_more_channels_is_refused(pipe: Any, safety: SafetyModule) -> None:
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(SafetyMismatchError, match="latent channels: the safety module is made for 4, the pipeline has 9"):
        protect(pipe, safety).__enter__()


def test_a_pipeline_that_diffusers_makes_of_a_protected_one_is_refused_until_protected(pipe: Any, safety: SafetyModule) -> None:
    with protect(pipe, safety, EagerPolicy(thresholds={"church": 0.0})):
        other = AutoPipelineForImage2Image.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {"image": PICTURE, "strength": 0.9, "num_inference_steps": 3}
        with pytest.raises(SafetyError, match="without a prompt of a protected pipeline"):
            draw(other, **options)
        with protect(other, safety):
            assert draw(other, **options).safety.fired.any()
