"""Protected pipelines under the samplers of diffusers: what reaches the controller is what the denoiser's outputs tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from saferedir.engines.errors import NonFiniteError
from saferedir_torch.controller import Controller, Guided, Seen
from saferedir_torch.protect import protect
from saferedir_torch.safety_module import SafetyModule

STEPS, GUIDANCE = 4, 5.0
#: Class of diffusers, and what it is told beside the model's noise schedule.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim, parallel": ("DDIMParallelScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "ddpm, parallel": ("DDPMParallelScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m, karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ 2m, sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ 2s": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler, exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "euler, karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm with its runge-kutta steps": ("PNDMScheduler", {"skip_prk_steps": False}),
    "sa": ("SASolverScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
#: Estimates of their own: what the denoiser's outputs tell, but for a part of the latent near the end (lcm).
TELLING = ("ddim", "ddpm", "euler", "euler ancestral", "lcm")


class Watched(NamedTuple):
    """What the denoiser and the controller were given and gave, one entry a step."""

    seen: list[Tensor]
    timesteps: list[float]
    #: Without and with the prompt.
    predicted: list[Tensor]
    denoised: list[Tensor]
    known: list[Tensor]
    shares: list[float]
    guided: list[Guided]


@contextmanager
def watched(pipe: Any) -> Iterator[Watched]:
    told = Watched([], [], [], [], [], [], [])

    def denoiser(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        told.seen.append(args[0].chunk(2)[1] if len(args[0]) == 2 else args[0])
        told.timesteps.append(float(args[1]))
        told.predicted.append(output[0])

    def controller(self: Controller, seen: Seen, original: Tensor, guided: Guided, *args: Any) -> Any:
        told.denoised.append(seen.denoised)
        told.known.append(seen.known)
        told.shares.append(float(seen.share))
        told.guided.append(guided)
        return own(self, seen, original, guided, *args)

    own, hook = Controller.forward, pipe.unet.register_forward_hook(denoiser, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Controller, "forward", controller)
        yield told
    hook.remove()


def draw(pipe: Any, seed: int = 1, **options: Any) -> Any:
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"} | options
    return pipe("a cat on blue", generator=torch.Generator().manual_seed(seed), **options)


def estimate(alphas: np.ndarray[Any, Any], seen: Tensor, timestep: float, guided: Tensor) -> Tensor:
    """The finished picture of predicted noise, by plain interpolation in float64."""
    times = np.arange(len(alphas))
    ratio = np.exp(np.interp(timestep, times, np.log(np.sqrt((1 - alphas) / alphas))))
    return seen.double() * np.sqrt(1 + ratio**2) - ratio * guided.double()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_denoiser_predicted_tells_the_next_step_what_is_being_drawn(
    pipe: Any, safety: SafetyModule, sampler: str
) -> None:
    name, options = SAMPLERS[sampler]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    kind, own = type(pipe.scheduler), []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = theirs(self, *args, **kwargs)
        own.append(output[1])
        return output

    with protect(pipe, safety), watched(pipe) as told, pytest.MonkeyPatch.context() as patch:
        if sampler in TELLING:
            theirs = kind.step
            patch.setattr(kind, "step", _like(theirs, step))
        drawn = draw(pipe)
    assert len(drawn.safety.timesteps) == len(told.seen)
    assert len(told.denoised) == len(told.seen) >= STEPS
    assert not told.known[0].any() and not told.denoised[0].any()
    assert all(known.all() for known in told.known[1:])
    alphas = pipe.scheduler.alphas_cumprod.double().numpy()
    sigmas = np.interp(told.timesteps, np.arange(len(alphas)), np.log(np.sqrt((1 - alphas) / alphas)))
    assert told.shares == pytest.approx(list(1 / (1 + np.exp(-sigmas))), abs=1e-6)
    for number, found in enumerate(told.denoised[1:]):
        without, conditional = told.predicted[number].chunk(2)
        guided = without + GUIDANCE * (conditional - without)
        wanted = estimate(alphas, told.seen[number], told.timesteps[number], guided)
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
        if own:
            torch.testing.assert_close(found, own[number], atol=2e-3, rtol=2e-3)
    assert bool(own) == (sampler in TELLING)


def _like(method: Any, replacement: Any) -> Any:
    """`replacement` with the signature of `method`, which pipelines read."""
    replacement.__wrapped__ = method
    return replacement


def test_guidance_that_is_rescaled_is_followed(pipe: Any, safety: SafetyModule) -> None:
    kind, own = type(pipe.scheduler), []
    theirs = kind.step

    def step(self: Any, predicted: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = theirs(self, predicted, *args, **kwargs)
        own.append(output[1])
        return output

    with protect(pipe, safety), watched(pipe) as told, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "step", _like(theirs, step))
        draw(pipe, guidance_rescale=0.7)
    for found, wanted in zip(told.denoised[1:], own[:-1], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_velocity_and_zero_terminal_snr_are_followed_and_noise_of_no_signal_gives_no_picture(
    pipe: Any, safety: SafetyModule
) -> None:
    options: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction", **options)
    with protect(pipe, safety), watched(pipe) as told:
        draw(pipe, guidance_scale=1.0)
    assert told.timesteps[0] == 999
    torch.testing.assert_close(told.denoised[1], -told.predicted[0])
    alphas = pipe.scheduler.alphas_cumprod[int(told.timesteps[1])]
    torch.testing.assert_close(told.denoised[2], alphas.sqrt() * told.seen[1] - (1 - alphas).sqrt() * told.predicted[1])
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type="epsilon", **options)
    with protect(pipe, safety), pytest.raises(NonFiniteError, match="at timestep 999 the UNet's prediction tells no picture"):
        draw(pipe)


def test_fresh_noise_takes_nothing_from_what_is_known(pipe: Any, safety: SafetyModule) -> None:
    with protect(pipe, safety), watched(pipe) as told:
        draw(pipe, eta=1.0)
    assert [bool(known) for known in told.known] == [False, True, True, True]
    assert all(estimate.any() for estimate in told.denoised[1:])


@pytest.mark.parametrize(("scale", "amount"), [(1.0, 0.0), (5.0, 0.0), (7.5, 0.5), (10.0, 1.0)])
def test_what_guidance_amplifies_is_told(pipe: Any, safety: SafetyModule, scale: float, amount: float) -> None:
    with protect(pipe, safety), watched(pipe) as told:
        draw(pipe, guidance_scale=scale, negative_prompt="a dog")
    assert [float(guided.amplification) for guided in told.guided] == pytest.approx([amount] * STEPS)
    if scale > 1:
        negative = pipe.encode_prompt("a dog", "cpu", 1, False)[0]
        assert all(torch.equal(guided.negative, negative) for guided in told.guided)
