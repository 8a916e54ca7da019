"""What benign prompts come up to by single words, in steps whose latent is noise still.

The levels of a branch are what benign pictures come up to around each knot, and around the first those are latents that begin
to show something. In the first step there is nothing but noise, and a detector that reads it along with the prompt takes some
noise for a concept where the prompt says little. Single words do not read it, and tell prompts apart far better than those
levels ask for. So in that step they have levels of their own, for which nothing is drawn.

These are read off benign prompts in strange words. Plain ones stay so far below that they would leave no room for what strange
words say now and then without meaning it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.trajectories import encode

#: Share of benign prompts in strange words that stay below the level. What fires lies above it by as much as thresholds do.
STRANGE_SHARE = 0.95
CHUNK = 256


@torch.no_grad()
def set_prompt_levels(pipeline: StableDiffusionPipeline, module: SafetyModule, strange: Sequence[str]) -> None:
    """Set the `prompt_levels` of the branch trained last by benign prompts in strange words."""
    branch, said = module.last_branch, []
    for start in range(0, len(strange), CHUNK):
        _, embeds = encode(pipeline, list(strange[start : start + CHUNK]))
        said.append(branch.detector.words(embeds.to(branch.gains)).cpu())
    level = torch.quantile(torch.cat(said).double(), STRANGE_SHARE, dim=0)
    branch.prompt_levels.copy_(level.half())  # rounded as it will be on disk
