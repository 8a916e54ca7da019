"""Protects a stock diffusers pipeline: `with protect(pipeline, safety) as guard: pipeline(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from saferedir_torch.eager_policy import EagerPolicy
from saferedir_torch.fit import check_match
from saferedir_torch.guard import Guard
from saferedir_torch.network_hooks import networks_of, watched
from saferedir_torch.pipeline_calls import check_kind, guarded
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.shared_tokenizer import taking_turns

__all__ = ["EagerPolicy", "Guard", "protect"]


@contextmanager
def protect(pipeline: Any, safety: SafetyModule, policy: EagerPolicy | None = None) -> Iterator[Guard]:
    """Detects and redirects before every step of `pipeline` while the context lasts; then leaves it as it was.

    What a call returns has its `CallRecord` as `safety` (with `return_dict=False` too), which any thread may read.
    `guard.last` is that of the latest call of the current thread or task.

    A call is followed from its beginning to its end, also past the end of the context, whichever thread or task makes it.
    Contexts of one pipeline may be nested or overlap: a call is under the innermost one that its thread or task entered. Where
    that is none, all that are open must be alike. Copies of the pipeline are protected like it, until the context ends. Another
    pipeline that shares its networks needs a context of its own: where it has none, its calls are refused while this one lasts.
    Calls of one pipeline object take turns; pipelines that share weights, schedulers too, draw side by side. On another device
    than the pipeline's, `safety` stays where it is, and each context makes a copy.

    Any sampler will do whose scheduler states `alphas_cumprod`: what the denoiser is given and gives tells what it is drawing.

    Words in letters that look like plain ones are read as plain words. Works with any batch size, `num_images_per_prompt`,
    `prompt_embeds`, negative prompts, guidance on, off and switched by a callback, ControlNets, T2I adapters, LoRAs of the
    UNet and UNets that `torch.compile` returned.

    Raises:
        SafetyMismatchError: channels, tokens, width or text encoder differ from the module's, or the scheduler does not tell
            how noisy a latent is; also before any call, where they changed.
        SafetyError: the pipeline is of a kind that is not known here; during generation, a network is given more than a prompt
            (an IP-Adapter's picture, another prompt by a callback), or called by a pipeline that is not protected.
        RequestError: the policy names an unknown concept, or a value out of range; `prompt_embeds` are of another shape.
        NonFiniteError: during generation, NaN or infinity anywhere.
    """
    check_kind(pipeline)
    guard = Guard(safety, policy or EagerPolicy())
    check_match(pipeline, safety)
    with watched(networks_of(pipeline)), taking_turns(pipeline.tokenizer), guarded(pipeline, guard):
        yield guard
