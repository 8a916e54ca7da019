"""Published checkpoints in: the same numbers as an independent float64 transcription, in eager PyTorch and in the runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from published_float64 import Controller, network
from typer.testing import CliRunner

from benchmarks.small_pipeline import save_small_pipeline
from saferedir.engines import open_bundle
from saferedir.engines.errors import BundleError, RequestError, SafetyMismatchError
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import import_checkpoint
from saferedir.export.published_import import PublishedOptions
from saferedir.export.torch_backend import TorchBackend
from saferedir.runtime import Pipeline, SafetyPolicy, Tightening
from saferedir.runtime.command_line.app import app
from saferedir.runtime.verify import verify_bundle
from saferedir_torch.models import SHIPPED_MODEL, load_pipeline
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.published_checkpoint import load_published
from saferedir_torch.trajectories import encode, initial_noise, sample

#: Of each tensor's largest magnitude.
TOLERANCE = 1e-5
STEPS = 12
OPTIONS = PublishedOptions(concept="church", replacement="house", alpha_scale=1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def checkpoint(folder: Path, latents: torch.Tensor) -> Path:
    """Random weights and random statistics of batch norm; which of a run's steps it calls unsafe, about half, hangs on time."""
    torch.manual_seed(3)
    made = PublishedNetwork().eval()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.3)
            elif tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn_like(tensor))
        made.classifier[0].weight[:, 512:576] *= 10
        made.classifier[0].weight[:, 576:] *= 0.1
        prompt = torch.randn(1, 77, 768)
        said = made(latents[0], prompt.expand(STEPS, -1, -1), torch.linspace(981, 1, STEPS)).logits
        made.classifier[3].bias[1] -= (said[:, 1] - said[:, 0]).median()
    path = folder / "best_model.pt"
    torch.save(made.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Of real runs of the embedded model, [3, steps, 4, h, w]."""
    pipeline = load_pipeline()
    _, embeds = encode(pipeline, ["a church", "a cat in ink style", "a house on blue"])
    _, empty = encode(pipeline, [""])
    return sample(pipeline, embeds, empty, initial_noise(pipeline, [1, 2, 3]), steps=STEPS).latents.float()


@pytest.fixture(scope="module")
def parameters(checkpoint: Path) -> dict[str, Any]:
    return {name: value.double().numpy() for name, value in torch.load(checkpoint, weights_only=True).items()}


@pytest.fixture(scope="module")
def alone(checkpoint: Path, folder: Path) -> Path:
    """The bundle of the safety alone."""
    done: list[tuple[int, int]] = []
    out = import_checkpoint(
        checkpoint,
        folder / "alone",
        OPTIONS,
        BundleOptions(name="alone", max_batch=4),
        model=None,
        on_step=lambda *at: done.append(at),
    )
    assert done == [(0, 2), (1, 2), (2, 2)]
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A pipeline of Stable Diffusion's classes and prompt width, otherwise small, with random weights."""
    return save_small_pipeline(folder / "model", width=768, heads=4)


@pytest.fixture(scope="module")
def drawing(checkpoint: Path, model: Path, folder: Path) -> Path:
    """The bundle of model and safety."""
    return import_checkpoint(
        checkpoint,
        folder / "drawing",
        OPTIONS,
        BundleOptions(name="drawing", max_batch=4),
        model=model,
        on_step=lambda *_: None,
    )


def close(found: Any, expected: Any) -> None:
    worst = np.abs(np.asarray(found, np.float64) - expected).max()
    assert worst <= TOLERANCE * np.abs(expected).max()


def session(bundle: Path, engine: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(bundle / f"{engine}.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_the_network_equals_its_transcription(
    checkpoint: Path, alone: Path, parameters: dict[str, Any], latents: torch.Tensor, batch: int
) -> None:
    exported, eager = session(alone, "published_network"), load_published(checkpoint)
    prompt = torch.randn(batch, 77, 768, generator=torch.Generator().manual_seed(batch))
    for step in (0, STEPS // 2, STEPS - 1):
        latent, time = latents[:batch, step].contiguous(), torch.full((batch,), 981.0 - 80 * step)
        expected = network(parameters, latent.double().numpy(), prompt.double().numpy(), time.double().numpy())
        with torch.no_grad():
            said = eager(latent, prompt, time)
        inputs = {"latent": latent.numpy(), "prompt_embeds": prompt.numpy(), "timestep": time.numpy()}
        found = dict(zip(expected, exported.run(list(expected), inputs), strict=True))
        for name, value in expected.items():
            close(getattr(said, name).numpy().reshape(value.shape), value)
            close(found[name].reshape(value.shape), value)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
def test_a_whole_trajectory_of_the_controller_equals_its_transcription(
    drawing: Path, parameters: dict[str, Any], batch: int, guided: bool
) -> None:
    engine = session(drawing, "step" if guided else "step_unguided")
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(batch, 4, 16, 16, generator=generator).numpy()
    original, negative = (torch.randn(batch, 77, 768, generator=generator).numpy() for _ in range(2))
    halves = np.stack([negative, original], axis=1) if guided else original[:, None]
    controllers = [Controller(parameters, pair.astype(np.float64), period=2, alpha_scale=1.5) for pair in halves]
    state: dict[str, Any] = {
        "prompt": original, "negative": negative, "cooldown": np.zeros(batch, np.int32),
        "active": np.zeros((batch, 1), bool), "ok": np.ones(batch, bool),
    }  # fmt: skip
    constants: dict[str, Any] = {
        # The estimate is what the model gave.
        "numbers": np.tile(np.array([1, 0, 1, 0.9, -0.3, 0, 0, 0.5, 1, 0], np.float32), (batch, 1)),
        "denoised": np.zeros_like(latent), "noise": np.zeros_like(latent), "guidance_rescale": np.zeros(batch, np.float32),
        "guidance_scale": np.full(batch, 7.5, np.float32), "original": original, "original_negative": negative,
        "period": np.full(batch, 2, np.int32), "enabled": np.ones((batch, 1), bool),
        "alpha_scale": np.full((batch, 1), 1.5, np.float32),
    }  # fmt: skip
    names = [output.name for output in engine.get_outputs()]
    taken = {tensor.name for tensor in engine.get_inputs()}
    for step in range(STEPS):
        time = 981.0 - 80 * step
        inputs = {**constants, **state, "latent": latent, "timestep": np.full(batch, time, np.float32)}
        given = dict(zip(names, engine.run(names, {name: inputs[name] for name in taken}), strict=True))
        for row, controller in enumerate(controllers):
            controller.after_unet(latent[row].astype(np.float64), time)
            assert bool(given["fired"][row, 0]) == controller.fired[-1]
            assert given["next_cooldown"][row] == controller.counter
            close(given["next_prompt"][row], controller.in_force[-1])
            if guided:
                close(given["next_negative"][row], controller.in_force[0])
        assert given["next_ok"].all()
        latent = given["next_latent"]
        state |= {name: given[f"next_{name}"] for name in state if f"next_{name}" in given}
    fired = np.array([controller.fired for controller in controllers])
    assert fired.any(axis=1).all()
    assert not fired[:, ::3].all(axis=1).any()
    # No decision hangs on rounding.
    assert min(min(controller.margins) for controller in controllers) > 1e-4


@pytest.mark.slow
def test_mask_again_multiplies_by_the_mask(
    checkpoint: Path, folder: Path, parameters: dict[str, Any], latents: torch.Tensor
) -> None:
    options = PublishedOptions(mask_again=True, cooldown=0)
    out = import_checkpoint(
        checkpoint, folder / "again", options, BundleOptions(name="again", max_batch=4), model=None, on_step=lambda *_: None
    )
    prompt = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0)).numpy()
    controller = Controller(parameters, np.stack([prompt[0], prompt[0]]).astype(float), 0, 1.25, mask_again=True)
    engine = session(out, "safety")
    for step in range(STEPS):
        latent = latents[:1, step].contiguous().numpy()
        controller.after_unet(latent[0].astype(float), 981.0 - 80 * step)
        if not controller.fired[-1]:
            continue
        found = engine.run(["next_prompt"], {
            "latent": latent, "timestep": np.full(1, 981.0 - 80 * step, np.float32), "prompt": prompt, "negative": prompt,
            "original": prompt, "original_negative": prompt, "cooldown": np.zeros(1, np.int32),
            "period": np.zeros(1, np.int32), "active": np.zeros((1, 1), bool), "ok": np.ones(1, bool),
            "enabled": np.ones((1, 1), bool), "alpha_scale": np.full((1, 1), 1.25, np.float32),
        })[0]  # fmt: skip
        close(found[0], controller.in_force[1])
        return
    pytest.fail("nothing fired")


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_the_runtime_draws_as_the_eager_reference_does(drawing: Path, checkpoint: Path, model: Path, guidance: float) -> None:
    bundle = open_bundle(drawing)
    deployed = Pipeline.from_bundle(drawing)
    eager = Pipeline(bundle, TorchBackend(bundle, model, checkpoint))
    prompts = ["a church", "a cat", "two words"]
    first, second = (each(prompts, seed=3, guidance_scale=guidance, num_inference_steps=STEPS) for each in (deployed, eager))
    for one, other, left, right in zip(first.records, second.records, first.images, second.images, strict=True):
        assert [step.fired for step in one.steps] == [step.fired for step in other.steps]
        assert [step.cooldown for step in one.steps] == [step.cooldown for step in other.steps]
        assert np.abs(np.asarray(left, int) - np.asarray(right, int)).max() <= 1
    assert any(step.fired for record in first.records for step in record.steps)


@pytest.mark.slow
def test_the_first_step_is_unprotected(drawing: Path) -> None:
    protected = Pipeline.from_bundle(drawing)
    plain = Pipeline(protected.bundle, protected.backend, SafetyPolicy(unprotected=True))
    one = protected("a church", seed=1, num_inference_steps=1)
    assert one.images[0].tobytes() == plain("a church", seed=1, num_inference_steps=1).images[0].tobytes()


@pytest.mark.slow
def test_there_is_no_threshold_to_set(drawing: Path) -> None:
    with pytest.raises(RequestError, match="church has no threshold"):
        Pipeline.from_bundle(drawing, policy=SafetyPolicy(thresholds={"church": 0.2}))
    pipeline = Pipeline.from_bundle(drawing)
    with pytest.raises(RequestError, match="church has no threshold"):
        pipeline("a church", tighten=Tightening(thresholds={"church": 0.2}))
    assert pipeline("a church", num_inference_steps=1, tighten=Tightening(alpha_scales={"church": 2.0})).images


@pytest.mark.slow
def test_a_safety_alone_is_whole_but_does_not_draw(alone: Path, checkpoint: Path) -> None:
    bundle = open_bundle(alone)
    assert set(bundle.manifest.engines) == {"safety", "published_network"}
    assert "tokenizer.json" not in bundle.manifest.files
    shapes = {tensor.name: tensor.shape for tensor in bundle.manifest.engines["published_network"].inputs}
    assert shapes == {
        "latent": ("batch", 4, "height", "width"), "prompt_embeds": ("batch", 77, 768), "timestep": ("batch",)
    }  # fmt: skip
    with pytest.raises(BundleError, match="safety alone"):
        Pipeline.from_bundle(alone)
    report = verify_bundle(alone, safety=checkpoint)
    assert report.passed
    assert {row.engine for row in report.parity or []} == {"safety", "published_network"}
    with pytest.raises(RequestError, match="name it by --safety"):
        verify_bundle(alone)


@pytest.mark.slow
def test_a_bundle_that_draws_is_verified_against_its_checkpoint(drawing: Path, model: Path, checkpoint: Path) -> None:
    report = verify_bundle(drawing, model, checkpoint)
    assert report.passed
    assert {row.engine for row in report.parity or []} == set(open_bundle(drawing).manifest.engines)


def test_a_checkpoint_of_another_width_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SafetyMismatchError, match="prompt width: the checkpoint is made for 768, the pipeline has 128"):
        import_checkpoint(
            checkpoint, tmp_path / "x", OPTIONS, BundleOptions(name="x"), model=SHIPPED_MODEL, on_step=lambda *_: None
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("gate_linear.bias"), "gate_linear.bias is missing"),
        (lambda state: state.update({"extra.weight": torch.zeros(2)}), "extra.weight is unknown"),
        (lambda state: state.update({"classifier.3.weight": torch.zeros(3, 9)}), "classifier.3.weight is 3x9, expected 2x256"),
        (lambda state: state["delta_head.scale"].fill_(float("nan")), "delta_head.scale is not finite"),
        (lambda state: state.pop("pos_embed"), "pos_embed .* missing"),
        (lambda state: state.update(note="text"), "no mapping of parameter names"),
    ],
)  # fmt: skip
def test_a_wrong_layout_is_named(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    state = torch.load(checkpoint, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(RequestError, match=message):
        load_published(tmp_path / "changed.pt")


def test_wrappers_and_prefixes_of_trainers_are_read(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    inner = {f"module.{name}": value for name, value in state.items() if name not in counts}
    torch.save({"epoch": 3, "model_state_dict": inner}, tmp_path / "wrapped.pt")
    loaded = load_published(tmp_path / "wrapped.pt")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items() if name not in counts)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"pos_embed": Harmful()}, "harmful.pt")
    with pytest.raises(RequestError, match="is not opened"):
        load_published(Path("harmful.pt"))
    assert not Path("executed").exists()
    Path("cut.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(RequestError, match=r"cannot be read|is not opened"):
        load_published(Path("cut.pt"))
    with pytest.raises(RequestError, match="cannot be read"):
        load_published(Path("absent.pt"))


def test_the_command_leaves_nothing_where_a_checkpoint_cannot_be_used(tmp_path: Path) -> None:
    command = ["import-published", str(tmp_path / "absent.pt"), "--out", str(tmp_path / "x")]
    with pytest.raises(RequestError, match=r"absent\.pt cannot be read"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    with pytest.raises(RequestError, match="alpha_scale is nan"):
        CliRunner().invoke(app, [*command, "--alpha-scale", "nan"], catch_exceptions=False)
    with pytest.raises(RequestError, match=r"name 'a\\\\x1bb' is not what a bundle can state"):
        CliRunner().invoke(app, [*command, "--name", "a\x1bb"], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []
