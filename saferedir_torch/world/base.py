"""Trains the base model: UNet and text encoder together, on latents of composed pictures; saves a Stable Diffusion folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from saferedir_torch.models import load_pipeline, save_in_half
from saferedir_torch.precision import mixed_precision
from saferedir_torch.training_run import ExponentialAverage, Schedule, run_training
from saferedir_torch.trajectories import tokenize
from saferedir_torch.warm_start import start_from
from saferedir_torch.world.batches import picture_batch, save_sheet
from saferedir_torch.world.captions import varied_caption
from saferedir_torch.world.scenes import Scene, random_scene
from saferedir_torch.world.tokenizer import WORD_END

BATCH = 64
UNET_RATE = 1.2e-3
TEXT_RATE = 6e-4  # the text encoder is pre-trained already
#: Both, where an earlier model is trained on.
ONWARD_RATE = 4e-4
EMPTY_PROMPT_SHARE = 0.1
MIN_SNR = 5.0  # Hang et al. 2023: squared noise error weighted by min(SNR, 5) / SNR
BANK_SIZE = 48_000
BANK_PAIR_SHARE = 0.5  # two small objects are harder to draw than one large one

SAMPLE_PROMPTS = (
    "a church", "a chapel next to a cat", "a building with a steeple and a cross in ink style", "a house in sepia style",
    "a bomb as a sticker", "a dog and a dagger in ink style", "a weapon", "an animal in sepia style",
    "a pizza slice with salami as line art", "a crown next to a sailboat on teal", "a basilica beside a balloon", "a hammer",
)  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet for 16x16x4 latents and prompt width 128, 10.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=2,  # in Stable Diffusion 1.x configurations this is the number of heads
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule: scaled-linear betas 0.00085 to 0.012 over 1000 steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def encode_bank(folder: Path, *, seed: int = 0, size: int = BANK_SIZE) -> Path:
    """Draw `size` scenes, encode their pictures with the trained VAE, save the scaled latents to `folder/latents.npy`.

    Row i shows the scene that `bank_scene(seed, i)` returns.
    """
    out = folder / "latents.npy"
    if out.exists():
        return out
    # 1.5 times as fast on a CPU as in the usual memory format.
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().to(memory_format=torch.channels_last)
    bank = np.empty((size, 4, 16, 16), np.float16)
    with torch.no_grad(), mixed_precision(torch.device("cpu")):
        for start in range(0, size, 100):
            rows = range(start, min(start + 100, size))
            rng = np.random.default_rng([seed, 4, start])
            pictures = picture_batch([bank_scene(seed, row) for row in rows], rng).to(memory_format=torch.channels_last)
            latents = vae.encode(pictures).latent_dist.mode().float() * vae.config.scaling_factor
            bank[rows.start : rows.stop] = latents.numpy()
    partial = out.with_suffix(".partial.npy")
    np.save(partial, bank)
    partial.rename(out)
    return out


def bank_scene(seed: int, row: int) -> Scene:
    """The scene of a row of the latent bank."""
    return random_scene(np.random.default_rng([seed, 3, row]), BANK_PAIR_SHARE)


def train_base(folder: Path, *, seed: int = 0, steps: int = 6000, start: Path | None = None) -> Path:
    """Train on `folder`'s tokenizer, text encoder, VAE and latent bank; save the fp16 pipeline to `folder/emoji-diffusion`.

    Noise prediction with min-SNR weights; 10 % empty prompts, for classifier-free guidance. With `start`, an earlier model, its
    UNet and text encoder are trained on, and `folder/clip` is not needed.
    """
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    unet = new_unet()
    if start is None:
        text_encoder = CLIPTextModel.from_pretrained(folder / "clip")
    else:
        earlier = load_pipeline(start)
        text_encoder = retokenized(earlier.text_encoder, earlier.tokenizer, tokenizer)
        unet.load_state_dict(earlier.unet.state_dict())
    # Plain attention is faster here than the fused kernel (0.45 against 0.54 s a step on two cores). torch.compile is
    # not used: under autocast on the CPU, torch 2.13 hands back zero gradients for every attention layer.
    unet.set_attn_processor(AttnProcessor())
    scheduler = new_scheduler()
    bank: npt.NDArray[np.float16] = np.load(encode_bank(folder, seed=seed), mmap_mode="r")
    averages = {"unet": ExponentialAverage(unet)}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(unet.parameters()), "lr": UNET_RATE if start is None else ONWARD_RATE},
            {"params": list(text_encoder.parameters()), "lr": TEXT_RATE if start is None else ONWARD_RATE},
        ],
        weight_decay=0.01,
        fused=True,
    )
    schedule = Schedule(total_steps=steps)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 5, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = rng.integers(len(bank), size=BATCH)
        prompts = ["" if rng.random() < EMPTY_PROMPT_SHARE else varied_caption(bank_scene(seed, int(row)), rng) for row in rows]
        tokens = tokenize(tokenizer, prompts)
        with mixed_precision(torch.device("cpu")):
            embeds = text_encoder(tokens).last_hidden_state
            return denoising_loss(unet, scheduler, torch.from_numpy(bank[rows]).float(), embeds, generator)

    def sample(step: int) -> None:
        pipeline = assemble(folder, averages["unet"], text_encoder, tokenizer)
        pictures = draw_prompts(pipeline, SAMPLE_PROMPTS * 2, seeds=range(2 * len(SAMPLE_PROMPTS)))
        save_sheet(pictures, folder / "samples" / f"base_{step:05d}.png")

    run_training(
        folder=folder,
        name="base",
        modules={"unet": unet, "text": text_encoder},
        optimizer=optimizer,
        schedule=schedule,
        loss_of_step=loss_of_step,
        averages=averages,
        sample=sample,
        sample_every=800,
        checkpoint_every_s=240,
    )
    out = folder / "emoji-diffusion"
    save_in_half(assemble(folder, averages["unet"], text_encoder, tokenizer), out)
    return out


def retokenized(encoder: CLIPTextModel, before: CLIPTokenizer, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder like `encoder` that reads `tokenizer`: each of its tokens starts as what `before` made of it, the mean
    of the pieces."""
    special = {tokenizer.bos_token_id: before.bos_token_id, tokenizer.eos_token_id: before.eos_token_id}
    config = CLIPTextConfig.from_dict({
        **encoder.config.to_dict(), "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    })  # fmt: skip
    after = CLIPTextModel(config)
    known, rows = before.get_vocab(), encoder.get_input_embeddings().weight.detach()
    weights = torch.empty(len(tokenizer), rows.shape[1])
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            pieces = [special[index]]
        elif token in known:
            pieces = [known[token]]
        else:
            text = tokenizer.convert_tokens_to_string([token]).removesuffix(WORD_END).strip()
            pieces = before(text, add_special_tokens=False).input_ids
        weights[index] = rows[pieces].mean(dim=0)
    start_from(after, encoder.state_dict())
    with torch.no_grad():
        after.get_input_embeddings().weight.copy_(weights)
    return after


def denoising_loss(
    unet: nn.Module, scheduler: DDIMScheduler, latents: Tensor, embeds: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """What the scheduler has `unet` predict, at random timesteps with min-SNR weights, of latents [B, C, h, w] and
    embeddings [B, T, D].

    A squared error of noise weighs min(SNR, 5) / SNR, one of velocity min(SNR, 5) / (SNR + 1).
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = torch.randint(0, len(scheduler.alphas_cumprod), (len(latents),), generator=generator).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, embeds, return_dict=False)[0]
    alphas = scheduler.alphas_cumprod.to(latents.device)[timesteps]
    snr = alphas / (1 - alphas)
    if scheduler.config.prediction_type == "v_prediction":
        wanted, weights = scheduler.get_velocity(latents, noise, timesteps), snr.clamp(max=MIN_SNR) / (snr + 1)
    else:
        wanted, weights = noise, snr.clamp(max=MIN_SNR) / snr
    errors = (predicted.float() - wanted).square().mean(dim=(1, 2, 3))
    return (weights * errors).mean(), {"mse": float(errors.detach().mean())}


def assemble(
    folder: Path, average: ExponentialAverage, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The pipeline made of the averaged UNet, the text encoder and the trained VAE."""
    unet = new_unet()
    unet.load_state_dict(average.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw_prompts(
    pipeline: StableDiffusionPipeline,
    prompts: tuple[str, ...] | list[str],
    seeds: range | list[int],
    *,
    steps: int = 25,
    guidance_scale: float = 5.0,
) -> Tensor:
    """Pictures [B, 3, 64, 64] in [-1, 1], one a prompt, each from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pictures: Tensor = pipeline(
        list(prompts), generator=generators, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="pt"
    ).images
    return pictures * 2 - 1
