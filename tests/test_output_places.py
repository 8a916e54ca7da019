"""What is written replaces nothing that this product did not write, whatever the place is called."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from saferedir.engines.errors import OutputError, SafeRedirError
from saferedir.engines.manifest import MANIFEST_FILE
from saferedir.engines.output_place import expect_bundle, output_place, put_in_place
from saferedir.export import command
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder, import_checkpoint
from saferedir.export.model_changes import ModelChanges
from saferedir.export.published_import import PublishedOptions
from saferedir.runtime import demo
from saferedir.runtime.outputs import output_folder, refuse_strange, write_picture


def folder_of(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text(name)
    return path


def bundle(path: Path, mark: str = "bundle") -> Path:
    """What a bundle looks like from outside."""
    folder = folder_of(path, "step.onnx")
    stated = {"schema_version": 1, "name": mark, "engines": {}, "made_with": {"saferedir": "1"}, "files": {"step.onnx": {}}}
    (folder / MANIFEST_FILE).write_text(json.dumps(stated))
    return folder


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """A model, a safety module and all else that an export may be given."""
    return {
        "model": folder_of(tmp_path / "in" / "model", "model_index.json", "weights.safetensors"),
        "safety": folder_of(tmp_path / "in" / "safety", "config.json"),
        "config": folder_of(tmp_path / "in" / "config", "config.json"),
        "vae": folder_of(tmp_path / "in" / "vae", "config.json"),
        "lora": folder_of(tmp_path / "in" / "loras", "lora.safetensors") / "lora.safetensors",
        "words": folder_of(tmp_path / "in" / "words", "words.pt") / "words.pt",
    }


def export(inputs: dict[str, Path], out: Path, save_model: Path | None = None) -> None:
    changes = ModelChanges(loras=((inputs["lora"], 1.0),), vae=inputs["vae"])
    export_folder(
        inputs["model"], inputs["safety"], out, BundleOptions(name="small", words=((inputs["words"], None),)), changes,
        config=str(inputs["config"]), save_model=save_model, on_step=lambda *_: None,
    )  # fmt: skip


@pytest.mark.parametrize("what", ["model", "safety", "config", "vae", "lora", "words"])
@pytest.mark.parametrize("where", ["itself", "above", "inside"])
def test_an_export_onto_what_it_reads_is_refused_and_changes_nothing(
    tmp_path: Path, inputs: dict[str, Path], what: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SafetyModule", None)  # nothing is opened before
    given = inputs[what]
    out = {"itself": given, "above": given.parent, "inside": given / "bundle"}[where]
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"--out .* (is|holds|lies in) .*, which is read|is no folder"):
        export(inputs, out)
    with pytest.raises(OutputError, match=r"--save-model .* (is|holds|lies in) .*, which is read|is no folder"):
        export(inputs, tmp_path / "bundle", save_model=out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("spelling", ["link", "dots", "slash", "relative", "cwd"])
def test_an_input_by_another_name_is_the_same_input(
    tmp_path: Path, inputs: dict[str, Path], spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inputs["model"]
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model if spelling == "cwd" else tmp_path)
    named = {
        "link": tmp_path / "link", "dots": model / ".." / "model", "slash": Path(f"{model}/"),
        "relative": Path("in/model"), "cwd": Path(),
    }  # fmt: skip
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"is .* itself, which is read"):
        export(inputs, named[spelling])
    assert snapshot(tmp_path) == before


def test_an_import_onto_what_it_reads_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    before = snapshot(tmp_path)
    for out in (inputs["lora"].parent, inputs["model"], inputs["model"].parent):
        with pytest.raises(OutputError, match="which is read"):
            import_checkpoint(
                inputs["lora"],
                out,
                PublishedOptions(),
                BundleOptions(name="small"),
                model=inputs["model"],
                on_step=lambda *_: None,
            )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "fill",
    [
        lambda place: folder_of(place, "thesis.txt"),
        lambda place: folder_of(place, MANIFEST_FILE),  # of something else
        lambda place: (bundle(place) / "thesis.txt").write_text("words"),  # beside a bundle
        lambda place: folder_of(bundle(place) / "plans", "step-0123.plan", "thesis.txt"),
        lambda place: (bundle(place) / "notes").mkdir(),
        lambda place: (bundle(place) / "plans").symlink_to(place.parent),
    ],
)
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path, fill: Callable[[Path], object]) -> None:
    place = tmp_path / "out"
    fill(place)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="is left as it is; name a new folder"):
        output_place(place, (), expect_bundle)
    with pytest.raises(OutputError, match="is left as it is"):
        put_in_place(bundle(tmp_path / "staged" / "new"), place)
    assert {name: text for name, text in snapshot(tmp_path).items() if not name.startswith("staged")} == before


def test_a_bundle_with_plans_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = bundle(tmp_path / "out", "old")
    folder_of(out / "plans", "step-0123.plan", "step-0123.json", "step-0123.lock")
    neighbour = folder_of(tmp_path / ".out-old", "letters.txt")
    put_in_place(bundle(tmp_path / "new", "new"), out)
    assert json.loads((out / MANIFEST_FILE).read_text())["name"] == "new"
    assert {path.name for path in out.iterdir()} == {"step.onnx", MANIFEST_FILE}
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out-old"}
    assert (neighbour / "letters.txt").exists()


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    target = bundle(tmp_path / "elsewhere" / "target", "old")
    for link, meant in (("out", target), ("dangling", tmp_path / "elsewhere" / "fresh")):
        (tmp_path / link).symlink_to(meant)
        put_in_place(bundle(tmp_path / "new", link), tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert json.loads((meant / MANIFEST_FILE).read_text())["name"] == link


@pytest.mark.parametrize("old", ["empty", "bundle"])
def test_the_working_folder_stays_the_same_folder(tmp_path: Path, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = bundle(tmp_path / "here", "old") if old == "bundle" else folder_of(tmp_path / "here")
    monkeypatch.chdir(here)
    identity = here.stat().st_ino
    put_in_place(bundle(tmp_path / "new", "new"), Path())
    assert here.stat().st_ino == identity
    assert json.loads(Path(MANIFEST_FILE).read_text())["name"] == "new"


def test_a_loop_of_links_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(OutputError, match="cannot be written"):
        output_place(tmp_path / "one", (), expect_bundle)
    with pytest.raises(OutputError, match="cannot be written"), output_folder(tmp_path / "one"):
        pass


def test_pictures_take_the_next_free_number(tmp_path: Path) -> None:
    white, black = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "black")
    first = write_picture(tmp_path, 7, white)
    assert first.name == "0000-seed7.png"
    kept = first.read_bytes()
    (tmp_path / "0041-seed3.png").write_bytes(b"of another run")
    (tmp_path / "notes.png").write_bytes(b"no number")
    assert write_picture(tmp_path, 7, black).name == "0042-seed7.png"
    assert first.read_bytes() == kept
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]


def test_pictures_of_many_writers_at_once_are_all_kept(tmp_path: Path) -> None:
    colours = [(shade, 0, 0) for shade in range(24)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda colour: write_picture(tmp_path, 7, Image.new("RGB", (2, 2), colour)), colours))
    assert len(set(paths)) == len(colours)
    found = [Image.open(path).getpixel((0, 0)) for path in paths]
    assert found == colours


def test_pictures_are_new_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    image = Image.new("RGB", (2, 2))
    assert [write_picture(tmp_path, 1, image).name for _ in range(2)] == ["0000-seed1.png", "0001-seed1.png"]


def test_a_demonstration_replaces_a_demonstration_alone(tmp_path: Path) -> None:
    sheet, page = tmp_path / "contact-sheet.png", tmp_path / "index.html"
    page.write_text("<html>my home page</html>")
    with pytest.raises(OutputError, match=r"holds index\.html of something else"):
        demo.run_demo(tmp_path)
    assert page.read_text() == "<html>my home page</html>"
    page.write_text(f"<!doctype html><head>{demo.GENERATOR}</head>")
    sheet.write_bytes(b"")
    refuse_strange(tmp_path, (sheet.name, page.name), page.name, demo.GENERATOR)


def test_a_saved_model_is_written_again_where_it_was_saved_alone(tmp_path: Path) -> None:
    theirs = folder_of(tmp_path / "model", "model_index.json")
    with pytest.raises(OutputError, match="neither empty nor written by --save-model"):
        output_place(theirs, (), command._expect_saved, "--save-model")
    (theirs / command.SAVED).touch()
    assert output_place(theirs, (), command._expect_saved, "--save-model") == theirs


def test_a_bundle_and_the_model_beside_it_do_not_share_a_folder(tmp_path: Path, inputs: dict[str, Path]) -> None:
    out = tmp_path / "bundle"
    for save_model in (out, out / "model", tmp_path):
        with pytest.raises(SafeRedirError, match="--save-model"):
            export(inputs, out, save_model)
    assert not out.exists()
