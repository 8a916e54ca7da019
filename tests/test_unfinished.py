"""An export that is interrupted goes on where it was, and gives the same bytes; one that fails leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saferedir.engines.bundle import file_sha256
from saferedir.engines.errors import OutputError
from saferedir.engines.manifest import PUBLISHED, ConceptInfo, SafetyInfo
from saferedir.engines.step import SAFETY_ENGINES
from saferedir.export.bundle_export import BundleOptions, write_bundle
from saferedir.export.engine_graph import graph
from saferedir.export.unfinished import unfinished
from saferedir.export.weights import WeightFile

KEY = "0123456789abcdef"


class Doubling(nn.Module):
    """An engine that takes no time to trace."""

    def forward(self, latent: Tensor) -> Tensor:
        return 2 * latent


def left(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def export(out: Path, stop_at: str | None = None) -> Path:
    """A bundle of a safety alone, whose export is interrupted at an engine's beginning."""

    def begun(engine: str) -> None:
        if engine == stop_at:
            raise KeyboardInterrupt

    graphs = {name: graph(Doubling(), {"latent": torch.zeros(2, 4)}, ("twice",)) for name in SAFETY_ENGINES}
    concepts = (ConceptInfo("church", "house", None, 1.0),)
    info = SafetyInfo("", "", prompt_tokens=4, prompt_width=4, latent_channels=4, cooldown=2, concepts=concepts)
    weights = WeightFile("safety.safetensors", nn.Linear(40, 40))
    return write_bundle(
        out, None, lambda _: graphs, weights, info, BundleOptions(name="small"), controller=PUBLISHED, on_engine=begun
    )


def test_an_interrupted_export_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "bundle", stop_at="published_network")
    (kept,) = left(tmp_path)
    (finished,) = kept.iterdir()
    assert finished.name == "safety.onnx"
    written = finished.stat().st_mtime_ns
    assert not (tmp_path / "bundle").exists()
    (kept / ".published_network.onnx.1.partial").write_bytes(b"cut short")

    torch.manual_seed(0)
    bundle = export(tmp_path / "bundle")
    assert (bundle / finished.name).stat().st_mtime_ns == written
    assert not left(tmp_path)
    torch.manual_seed(0)
    whole = export(tmp_path / "whole")
    assert {path.name: file_sha256(path) for path in bundle.iterdir()} == {
        path.name: file_sha256(path) for path in whole.iterdir()
    }


def test_nothing_is_kept_of_an_export_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), unfinished(tmp_path / "bundle", KEY) as place:
        (place / "step.onnx").write_bytes(b"")
        raise ValueError("wrong")
    assert not left(tmp_path)


def test_nothing_is_kept_of_an_export_that_is_interrupted_at_its_beginning(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "bundle", KEY):
        raise KeyboardInterrupt
    assert not left(tmp_path)


def test_two_processes_do_not_make_the_same_bundle(tmp_path: Path) -> None:
    with (
        unfinished(tmp_path / "bundle", KEY),
        pytest.raises(OutputError, match="another process"),
        unfinished(tmp_path / "bundle", KEY),
    ):
        pass


def test_what_other_exports_left_is_removed(tmp_path: Path) -> None:
    for name in ("bundle", "bundle-2"):
        with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / name, "another key of 16") as place:
            (place / "step.onnx").write_bytes(b"")
            raise KeyboardInterrupt
    assert len(left(tmp_path)) == 2
    with unfinished(tmp_path / "bundle", KEY) as place:
        assert [path.name for path in left(tmp_path) if path != place and path.suffix != ".lock"] == [
            ".bundle-2-another key of 1.unfinished"
        ]
        with unfinished(tmp_path / "bundle", "a third key of 16") as third:
            assert place.exists()  # which is worked on
            third.rmdir()
        os.replace(place, tmp_path / "bundle")


def test_what_no_export_writes_is_never_removed(tmp_path: Path) -> None:
    """However much a neighbour's name looks like one of an export's own."""
    theirs = tmp_path / ".bundle-fedcba9876543210.unfinished"
    (theirs / "letters").mkdir(parents=True)
    (theirs / "letters" / "dear.txt").write_text("dear")
    linked = tmp_path / ".bundle-fedcba987654321f.unfinished"
    linked.symlink_to(theirs)
    with unfinished(tmp_path / "bundle", KEY) as place:
        place.rmdir()
    assert (theirs / "letters" / "dear.txt").read_text() == "dear"
    assert linked.is_symlink()
    mine = tmp_path / f".bundle-{KEY}.unfinished"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    with pytest.raises(OutputError, match="holds what no export writes"), unfinished(tmp_path / "bundle", KEY):
        pass
    assert (mine / "thesis.txt").read_text() == "words"
