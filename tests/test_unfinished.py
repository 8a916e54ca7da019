"""An export that is interrupted goes on where it was, and gives the same bytes; one that fails leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.small_pipeline import SMALL, save_turbo
from saferedir.engines.bundle import file_sha256
from saferedir.engines.errors import OutputError
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.export.unfinished import unfinished
from saferedir_torch.models import load_pipeline
from saferedir_torch.train import new_module

KEY = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_turbo(tmp_path / "model")
    new_module(load_pipeline(tmp_path / "model"), {"church": "house"}, **SMALL).save(tmp_path / "safety")
    return tmp_path


def left(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_an_interrupted_export_goes_on_and_gives_the_same_bytes(folder: Path) -> None:
    def export(out: str, stop_at: int | None = None) -> Path:
        def on_step(done: int, _: int) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        options = BundleOptions(name="small", max_batch=4)
        return export_folder(folder / "model", folder / "safety", folder / out, options, on_step=on_step)

    with pytest.raises(KeyboardInterrupt):
        export("bundle", stop_at=6)
    (kept,) = left(folder)
    finished = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert {"text_encoder.onnx", "unet.onnx", "plain_step.onnx"} <= finished.keys()
    assert not (folder / "bundle").exists()
    (kept / ".step.onnx.1.partial").write_bytes(b"cut short")

    bundle = export("bundle")
    assert not left(folder)
    assert {name: (bundle / name).stat().st_mtime_ns for name in finished} == finished
    whole = export("whole")
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
        assert [path.name for path in left(tmp_path) if path != place] == [".bundle-2-another key of 1.unfinished"]
        with unfinished(tmp_path / "bundle", "a third key of 16") as third:
            assert place.exists()  # which is worked on
            third.rmdir()
        os.replace(place, tmp_path / "bundle")
