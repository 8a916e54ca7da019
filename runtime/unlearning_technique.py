"""A technique for the `eval-unlearn` benchmarks: any bundle under its own safety, found by that package through an entry point.

`eval-unlearn` builds it with its configuration and calls `generate` batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from saferedir.engines import DEFAULT_BUNDLE
from saferedir.engines.errors import RequestError
from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.policy import SafetyPolicy
from saferedir.runtime.record import SafetyRecord

#: What `generate` may be given beside prompts and seed.
OPTIONS = (
    "num_inference_steps", "guidance_scale", "guidance_rescale", "negative_prompt", "scheduler", "prompt_embeds",
    "negative_prompt_embeds",
)  # fmt: skip


class SafeRedirTechnique:
    """Draws with the deployed engines; `records` says of the last batch what the safety saw and did."""

    def __init__(
        self,
        bundle: str = DEFAULT_BUNDLE,
        backend: str = "auto",
        erase_concept: str | Sequence[str] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        **unknown: Any,
    ) -> None:
        """`erase_concept` names one concept of the bundle or lists several; all of them by default.

        Raises:
            RequestError: an option or a concept is not known, out of range, or the list of concepts is empty.
            BundleError, SafetyError, BackendError: the bundle cannot be opened or run.
        """
        if unknown:
            raise RequestError(f"unknown options {', '.join(sorted(unknown))}; expected bundle, backend, erase_concept, "
                               "num_inference_steps, guidance_scale")  # fmt: skip
        concepts = (erase_concept,) if isinstance(erase_concept, str) else erase_concept
        self.pipeline = Pipeline.from_bundle(bundle, backend=backend, policy=SafetyPolicy(enabled=concepts))
        self.records: list[SafetyRecord] = []
        self._options: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self.pipeline.check(**self._options)

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Image.Image]:
        """A picture a prompt, or an embedding where `prompt_embeds` are given; the seed is the first picture's and counts up.
        Without one it is random, batch by batch, as the package's own techniques do, and `records` say which.

        Raises:
            RequestError: an option is not known, or out of range.
            SafetyError: the safety failed; no picture of this batch leaves.
        """
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise RequestError(f"unknown options {', '.join(unknown)}; expected {', '.join(OPTIONS)}")
        asked = None if "prompt_embeds" in options else list(prompts)
        result = self.pipeline(asked, seed=seed, **{**self._options, **options})
        self.records = result.records
        return result.images
