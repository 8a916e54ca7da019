"""Models of the world with other parts, a safety module re-fitted to one, and the table of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from typer.testing import CliRunner

from benchmarks.evaluate import app as evaluate
from benchmarks.html_report import write_report
from saferedir.engines.errors import SafetyMismatchError
from saferedir.runtime.command_line.app import app as safety
from saferedir_torch.envelope import ENVELOPE
from saferedir_torch.fit import check_match
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.pixart import PixArt
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.train import train
from saferedir_torch.warm_start import start_from
from saferedir_torch.world.__main__ import app as world
from saferedir_torch.world.architectures import make
from saferedir_torch.world.base import denoising_loss
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

pytestmark = pytest.mark.usefixtures("small_training", "few_steps")


@pytest.fixture(scope="module")
def made(small_training: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    kinds = ("other-vae", "wider-text", "transformer")
    return {kind: make(kind, folder / kind, steps=1, part_steps=1, size=8) for kind in kinds}


def test_each_keeps_what_it_does_not_change(made: dict[str, Path], eager: Any) -> None:
    other = {kind: load_pipeline(folder) for kind, folder in made.items()}
    same = {
        kind: {part for part in ("text_encoder", "vae") if _sha256(model, part) == _sha256(eager, part)}
        for kind, model in other.items()
    }
    assert same == {"other-vae": {"text_encoder"}, "wider-text": {"vae"}, "transformer": {"text_encoder", "vae"}}
    assert isinstance(other["transformer"], PixArt)
    assert other["wider-text"].scheduler.config.prediction_type == "v_prediction"
    assert all((folder.parent / "samples.png").exists() for folder in made.values())
    shipped = SafetyModule.load(SHIPPED_SAFETY)
    for kind in ("other-vae", "transformer"):
        check_match(other[kind], shipped)
    with pytest.raises(SafetyMismatchError, match="prompt width: the safety module is made for 128, the pipeline has 192"):
        check_match(other["wider-text"], shipped)


def _sha256(pipeline: Any, part: str) -> str:
    return parameters_sha256(getattr(pipeline, part))


@pytest.mark.slow
def test_a_module_is_refitted_and_both_are_measured(made: dict[str, Path], tmp_path: Path) -> None:
    pipeline, shipped = load_pipeline(made["wider-text"]), SafetyModule.load(SHIPPED_SAFETY)
    source = WorldPrompts(shipped.config.concept_names, load_split())
    options: dict[str, Any] = {"runs": 60, "pairs": 8, "envelope": structs.replace(ENVELOPE, steps=(4, 4))}
    module = train(pipeline, source, tmp_path / "refit", steps=1, start=shipped, **options)
    assert module.config.provenance["started_from"] == parameters_sha256(shipped)
    assert module.config.streams[0].width == 192

    tables = ["--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    models = ["--model", f"wider={made['wider-text']}", "--model", f"transformer={made['transformer']}"]
    command = ["transfer", *models, "--refitted", f"wider={tmp_path / 'refit' / 'safety'}", *tables]
    assert CliRunner().invoke(evaluate, command, catch_exceptions=False).exit_code == 0
    entries = json.loads((tmp_path / "transfer.json").read_text())["entries"]
    assert [(entry["model"], entry["module"], "refused" in entry) for entry in entries] == [
        ("wider", "unchanged", True), ("wider", "re-fitted", False), ("transformer", "unchanged", False),
    ]  # fmt: skip
    assert entries[1]["minutes"] == module.config.provenance["minutes"]
    assert set(entries[2]["concepts"]) == {"church"}
    assert "prompt width" in write_report(tmp_path).read_text()


def test_what_fits_is_taken_over() -> None:
    before, after = torch.nn.Linear(3, 4), torch.nn.Linear(5, 4)
    assert start_from(after, before.state_dict()) == ["weight"]
    assert torch.equal(after.bias, before.bias)
    assert start_from(torch.nn.Linear(3, 4), before.state_dict()) == []


def test_the_loss_of_velocity_is_that_of_the_noise_it_implies(eager: Any) -> None:
    """v = sqrt(a) noise - sqrt(1 - a) x, and with the weights of each an error counts the same either way."""
    latents, embeds = torch.randn(4, 4, 16, 16), torch.zeros(4, 77, 128)
    scheduler = eager.scheduler
    velocity = type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")

    class Guess(torch.nn.Module):
        """The same wrong picture, told as noise or as velocity."""

        def __init__(self, as_velocity: bool) -> None:
            super().__init__()
            self.as_velocity = as_velocity

        def forward(self, noisy: Any, timesteps: Any, _: Any, return_dict: bool) -> tuple[torch.Tensor]:
            alphas = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            guessed = latents + 0.1
            noise = (noisy - alphas.sqrt() * guessed) / (1 - alphas).sqrt()
            return (alphas.sqrt() * noise - (1 - alphas).sqrt() * guessed if self.as_velocity else noise,)

    losses = [
        denoising_loss(Guess(kind), own, latents, embeds, torch.Generator().manual_seed(3))[0]
        for kind, own in ((False, scheduler), (True, velocity))
    ]
    assert torch.allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("app", "command", "said"),
    [
        (world, ["architecture", "--kind", "magic", "--folder", "x"], "magic"),
        (evaluate, ["transfer", "--model", "few"], "TITLE=FOLDER"),
        (evaluate, ["transfer", "--model", "a=.", "--refitted", "b=."], "no --model"),
        (safety, ["train", "--model", "x", "--out", "y", "--extend", "a", "--start-from", "b"], "not both"),
    ],
)
def test_what_cannot_be_made_is_named(app: Any, command: list[str], said: str) -> None:
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.output
