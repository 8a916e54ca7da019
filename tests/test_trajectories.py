"""Recorded runs: drawn as diffusers draws them, by each sampler, with what was known before each step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler

from saferedir.engines.errors import RequestError
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.trajectories import SAMPLERS, STOCHASTIC, encode, initial_noise, make_scheduler, sample

PROMPTS, SEEDS, STEPS = ["a cat on blue", "a fish"], [5, 6], 4


def record(pipe: Any, sampler: str, **options: Any) -> Any:
    embeds, empty = encode(pipe, PROMPTS)[1], encode(pipe, [""])[1]
    if sampler in STOCHASTIC:
        options.setdefault("seeds", SEEDS)
    return sample(pipe, embeds, empty, initial_noise(pipe, SEEDS), steps=STEPS, sampler=sampler, **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_runs_are_what_diffusers_draws(pipe: Any, sampler: str) -> None:
    if sampler == "lcm":
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    drawn = record(pipe, sampler)
    pipe.scheduler = make_scheduler(pipe, sampler)
    seen, told = [], []
    scheduler = type(pipe.scheduler)

    def looked_at(_: Any, args: Any) -> None:
        seen.append(args[0][: len(PROMPTS)])

    own, hook = scheduler.step, pipe.unet.register_forward_pre_hook(looked_at)

    @functools.wraps(own)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **(kwargs | {"return_dict": True}))
        told.append(getattr(output, "pred_original_sample", getattr(output, "denoised", None)))
        return (output.prev_sample,)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "step", step)
        theirs = pipe(
            PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], guidance_scale=5.0,
            num_inference_steps=STEPS, output_type="latent",
        ).images  # fmt: skip
    hook.remove()
    torch.testing.assert_close(drawn.final, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn.latents, torch.stack(seen, dim=1).half(), atol=2e-3, rtol=2e-3)
    assert not drawn.denoised[:, 0].any()
    levels = NoiseLevels(pipe.scheduler)
    assert drawn.shares.tolist() == pytest.approx([levels.at(float(time)).share for time in drawn.timesteps])
    assert drawn.timesteps.tolist() == pipe.scheduler.timesteps.float().tolist()
    assert (drawn.shares.diff() < 0).all()
    if None not in told:  # diffusers' own estimate, but for what lcm adds of the latent near the end
        torch.testing.assert_close(drawn.denoised[:, 1:].float(), torch.stack(told[:-1], dim=1), atol=5e-3, rtol=5e-3)


def test_a_run_does_not_depend_on_its_company(pipe: Any) -> None:
    together = record(pipe, "euler-ancestral")
    embeds, empty = encode(pipe, PROMPTS)[1], encode(pipe, [""])[1]
    alone = sample(
        pipe, embeds[1:], empty, initial_noise(pipe, SEEDS[1:]), steps=STEPS, sampler="euler-ancestral", seeds=SEEDS[1:]
    )
    torch.testing.assert_close(alone.final, together.final[1:], atol=1e-4, rtol=1e-4)


def test_a_sampler_that_cannot_be_had_is_refused(pipe: Any) -> None:
    with pytest.raises(RequestError, match="sampler is 'heun'; expected one of ddim, euler, euler-karras, "):
        record(pipe, "heun")
    with pytest.raises(RequestError, match=r"sampler is 'lcm', .* the model's scheduler is DDIMScheduler"):
        record(pipe, "lcm")
    with pytest.raises(RequestError, match="sampler is 'euler-ancestral', which adds noise in a step; expected 2 seeds"):
        record(pipe, "euler-ancestral", seeds=None)
