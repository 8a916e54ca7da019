"""What came from elsewhere as JSON is read into typed, bounded structures, or refused by the name of file and field."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from small_module import small_module
from tiny_bundle import write_tiny_bundle

from saferedir.engines import Manifest, open_bundle
from saferedir.engines.errors import BundleAlteredError, BundleSchemaError, RequestError, SafeRedirError
from saferedir.engines.manifest import LARGEST_MANIFEST, MANIFEST_FILE, Envelope, Promise
from saferedir.engines.schema import manifest_schema
from saferedir.runtime.tokenizer import PromptTokenizer
from saferedir_torch.config import SafetyConfig
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.safety_module import CONFIG_FILE, SafetyModule

#: What a field may be given in place of what it holds.
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3.5, 1e308, -1e-300, 10**30, 2**63, "", "x", "16", "x" * 300, "\x1b[31m", "a\u202eb",
    "../x", "/etc/passwd", "a\\b", "\ud800", "é", [], [1], [[1, 2, 3]], {}, {"a": 1}, [None] * 100, "float32", "0" * 64,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    promise = Promise(0.001, 0.95, 3000, 0, Envelope((4, 50), ("ddim", "euler"), (1.0, 12.0)), "noise")
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", promise)


@pytest.fixture(scope="module")
def manifest(tiny: Path) -> bytes:
    return (tiny / MANIFEST_FILE).read_bytes()


def places(raw: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with every key or index in it."""
    if not isinstance(raw, dict | list):
        return []
    own = list(raw.items() if isinstance(raw, dict) else enumerate(raw))
    return [(raw, key) for key, _ in own] + [place for _, inner in own for place in places(inner)]


def mutated(text: bytes, rng: random.Random) -> bytes:
    """`text` with a value, a key or some bytes changed, left out, added or repeated."""
    way = rng.randrange(8)
    if way == 0:
        data = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if way == 1:
        return text[: rng.randrange(len(text))] + rng.choice([b"", b"\0", b"\xff\xfe", b"}", b"[" * 100_000, b"9" * 5000])
    raw = json.loads(text)
    container, key = rng.choice(places(raw))
    if way == 2:
        del container[key]
    elif way == 3 and isinstance(container, dict):
        container[rng.choice(["more", "", "\x1b[0m", "x" * 300])] = rng.choice(VALUES)
    elif way == 4 and isinstance(container, list):
        container.append(container[key])
    elif way == 5 and isinstance(container, dict):
        twin = json.dumps({key: container[key]})[1:-1]
        container["TWIN"] = 0
        return json.dumps(raw).replace('"TWIN": 0', twin).encode()
    elif way == 6:
        container[key] = "LITERAL"
        literal = rng.choice(["9" * 5000, "NaN", "-Infinity", "1e999", "1.0", "[" * 2000 + "]" * 2000, "0x1", "'x'"])
        return json.dumps(raw).replace('"LITERAL"', literal).encode()
    else:
        container[key] = rng.choice(VALUES)
    return json.dumps(raw).encode()


def says_no_more_than_it_means(text: bytes, read: Any) -> bool:
    """Whether what was read says all that `text` says, and beside it nothing but defaults."""
    return bool(msgspec.convert(json.loads(text), type(read)) == read) and _within(json.loads(text), msgspec.to_builtins(read))


def _within(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and _within(value, whole[key]) for key, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(_within(*pair) for pair in zip(part, whole, strict=True))
    return bool(part == whole)


def test_2000_mutations_of_a_manifest_are_refused_by_name_or_mean_what_they_say(tiny: Path, manifest: bytes) -> None:
    rng, opened = random.Random(0), 0
    try:
        for _ in range(2000):
            text = mutated(manifest, rng)
            try:
                read = Manifest.from_json(text, str(tiny / MANIFEST_FILE))
                (tiny / MANIFEST_FILE).write_bytes(text)
                assert open_bundle(tiny).manifest == read
            except SafeRedirError as error:
                assert MANIFEST_FILE in str(error) or str(tiny) in str(error)
                assert str(error).isprintable(), text
                continue
            opened += 1
            assert says_no_more_than_it_means(text, read), text
    finally:
        (tiny / MANIFEST_FILE).write_bytes(manifest)
    assert 20 < opened < 600


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(max_batch="sixteen"), r"Expected `int`, got `str` - at `\$\.max_batch`"),
        (lambda raw: raw.update(max_batch=-1), r">= 1 - at `\$\.max_batch`"),
        (lambda raw: raw.update(max_batch=0), r">= 1 - at `\$\.max_batch`"),
        (lambda raw: raw.update(max_batch=32), r"<= 31 - at `\$\.max_batch`"),
        (lambda raw: raw["safety"].update(cooldown="2"), r"`\$\.safety\.cooldown`"),
        (lambda raw: raw["scheduler"].update(beta_start=None), r"`\$\.scheduler\.beta_start`"),
        (lambda raw: raw["safety"]["concepts"][0].update(threshold="0.5"), r"`\$\.safety\.concepts\[\d\]\.threshold`"),
        (lambda raw: raw["safety"]["concepts"][0].update(threshold=1.5), r"`\$\.safety\.concepts\[\d\]\.threshold`"),
        (lambda raw: raw["safety"]["concepts"][0].update(threshold=None), "threshold of church is None"),
        (lambda raw: raw["safety"]["concepts"][0].update(alpha_scale=0), r"`\$\.safety\.concepts\[\d\]\.alpha_scale`"),
        (lambda raw: raw["safety"]["concepts"][0].pop("alpha_scale"), "missing required field `alpha_scale`"),
        (lambda raw: raw["safety"]["promise"].update(rate=2), r"<= 1.* - at `\$\.safety\.promise\.rate`"),
        (lambda raw: raw["safety"]["promise"].update(pictures=0), r"`\$\.safety\.promise\.pictures`"),
        (lambda raw: raw["safety"]["promise"].update(steps=25), "unknown field `steps`"),
        (
            lambda raw: raw["safety"]["promise"]["envelope"].update(steps=[9, 4]),
            "steps goes from 9 to 4",
        ),
        (lambda raw: raw["safety"]["promise"]["envelope"].update(steps=[0, 4]), r"`\$\.safety\.promise\.envelope\.steps\[0\]`"),
        (lambda raw: raw["safety"]["promise"]["envelope"].update(guidance_scale=[12, 1]), "guidance_scale goes from 12 to 1"),
        (lambda raw: raw["safety"]["promise"]["envelope"].update(guidance_scale=[-1, 1]), r"envelope\.guidance_scale\[0\]`"),
        (lambda raw: raw["safety"]["promise"]["envelope"].update(samplers=[]), r"`\$\.safety\.promise\.envelope\.samplers`"),
        (lambda raw: raw["safety"]["concepts"][1].update(name="church"), "concepts occur twice: church"),
        (lambda raw: raw["safety"]["concepts"][1].update(name="x" * 300), "length <= 100"),
        (lambda raw: raw["safety"]["concepts"][1].update(name="\x1b[31mred"), r"concepts\[\d\]\.name"),
        (lambda raw: raw.update(controller=[]), r"`\$\.controller`"),
        (lambda raw: raw["model"].update(further_sizes=[[1, 2, 3]]), r"`\$\.model\.further_sizes\[0\]`"),
        (lambda raw: raw["model"].update(further_sizes=[[4, 4]]), "sizes of latents occur twice"),
        (lambda raw: raw["model"].update(latent_height=4096, latent_width=4096), "a latent of 67108864 values"),
        (lambda raw: raw.update(model=None), "one of model and scheduler is null"),
        (lambda raw: raw.update(model=None, scheduler=None), "model is null"),
        (lambda raw: raw["files"].update({"../x": {"sha256": "0" * 64, "bytes": 0}}), r"at `key` in `\$\.files`"),
        (lambda raw: raw["engines"]["step"].update(file="a/b.onnx"), r"`\$\.engines\[\.\.\.\]\.file`"),
        (lambda raw: raw["files"]["step.onnx"].update(sha256="ABC"), r"`\$\.files\[\.\.\.\]\.sha256`"),
        (lambda raw: raw.update(schema_version=0), r"`\$\.schema_version`"),
        (lambda raw: raw.update(schema_version=-5), r"`\$\.schema_version`"),
        (lambda raw: raw.update(schema_version=True), r"Expected `int`, got `bool` - at `\$\.schema_version`"),
        (lambda raw: raw.update(schema_version=5), "schema_version is 5; expected 6"),
        (lambda raw: raw.update(colour="red"), "unknown field `colour`"),
        (lambda raw: raw.pop("precision"), "missing required field `precision`"),
    ],
)
def test_a_field_of_the_wrong_type_or_value_is_named(manifest: bytes, change: Change, says: str) -> None:
    raw = json.loads(manifest)
    change(raw)
    with pytest.raises(BundleAlteredError, match=f"^here: .*{says}|^here: {says}"):
        Manifest.from_json(json.dumps(raw).encode(), "here")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "truncated"),
        (b"\xff\xfe{", "malformed|UTF-8"),
        (b'{"schema_version": 6, "name": "\xff"}', "UTF-8"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "schema_version"),
        (b'{"schema_version": 6, "model": ' + b"[" * 100_000, "nested too deeply|got `array`"),
        (b'{"schema_version": 6, "schema_version": 6}', "missing required field|there twice"),
        (b" " * (LARGEST_MANIFEST + 1), "expected at most"),
    ],
)
def test_text_that_is_no_manifest_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(BundleAlteredError, match=f"^here.*({says})"):
        Manifest.from_json(text, "here")


def test_a_field_that_is_there_twice_is_refused(manifest: bytes) -> None:
    with pytest.raises(BundleAlteredError, match="the field 'name' is there twice"):
        Manifest.from_json(b'{"name": "tiny",' + manifest[1:], "here")


def test_a_newer_schema_asks_for_an_upgrade_whatever_else_it_says() -> None:
    with pytest.raises(BundleSchemaError, match=r"schema 7.*upgrade"):
        Manifest.from_json(b'{"schema_version": 7, "new": {}}', "here")


def test_the_committed_schema_is_current() -> None:
    committed = Path(__file__).parents[1] / "engines" / "bundle.schema.json"
    assert json.loads(committed.read_text()) == json.loads(json.dumps(manifest_schema())), (
        "write it anew: saferedir inspect --schema"
    )


def test_500_mutations_of_a_safety_modules_configuration_are_refused_by_name_or_mean_what_they_say(tmp_path: Path) -> None:
    small_module().save(tmp_path)
    path, rng, loaded = tmp_path / CONFIG_FILE, random.Random(0), 0
    original = path.read_bytes()
    for _ in range(500):
        text = mutated(original, rng)
        path.write_bytes(text)
        try:
            module = SafetyModule.load(tmp_path)
        except RequestError as error:
            assert str(tmp_path) in str(error)
            assert str(error).isprintable()
            continue
        loaded += 1
        assert says_no_more_than_it_means(text, module.config)
    assert 10 < loaded < 200


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("streams", [{"name": "prompt", "tokens": 9, "width": 10**12}], "<= 65536"),
        ("streams", [{"name": "prompt", "tokens": 9, "width": 16}] * 2, "streams occur twice: prompt"),
        ("streams", [], "streams"),
        ("features", 8192, "is of shape"),
        ("heads", "four", "heads"),
        ("heads", 5, "does not divide"),
        ("convolutions", [8, 8, 12], "multiple of 8"),
        ("branches", [1, 1], "do not add up"),
        ("latent_channels", float("nan"), "malformed"),
        ("concepts", [], "concepts"),
        ("cooldown", -1, ">= 0"),
        ("promise", {"rate": 0.1}, "missing required field"),
        ("persistence", 1.5, "unknown field"),
    ],
)
def test_a_configuration_that_its_weights_do_not_have_is_refused_before_memory_is_taken(
    tmp_path: Path, field: str, value: Any, says: str
) -> None:
    small_module().save(tmp_path)
    raw = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(raw | {field: value}))
    with pytest.raises(RequestError, match=f"(config.json|model.safetensors).*{says}"):
        SafetyModule.load(tmp_path)


def test_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    small_module().save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for dtype, says in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int64, "I64")):
        name = next(iter(tensors))
        save_file({**tensors, name: tensors[name].to(dtype)}, path)
        with pytest.raises(RequestError, match=f"{name} is of type {says}, expected one of F16"):
            SafetyModule.load(tmp_path)
    save_file({**tensors, "more": torch.zeros(1)}, path)
    with pytest.raises(RequestError, match="more is unknown"):
        SafetyModule.load(tmp_path)


def test_the_shipped_configuration_is_read_and_written_alike(tmp_path: Path) -> None:
    config = SafetyConfig.load(SHIPPED_SAFETY / CONFIG_FILE)
    config.save(tmp_path / CONFIG_FILE)
    assert SafetyConfig.load(tmp_path / CONFIG_FILE) == config
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == json.loads((SHIPPED_SAFETY / CONFIG_FILE).read_text())


def test_300_mutations_of_a_tokenizer_file_are_refused_or_read(tiny: Path) -> None:
    rng, original, read = random.Random(0), (tiny / "tokenizer.json").read_bytes(), 0
    for _ in range(300):
        try:
            tokens = PromptTokenizer(mutated(original, rng), 6)("a church and a cat")
        except BundleAlteredError as error:
            assert str(error).startswith("tokenizer.json")
            continue
        read += 1
        assert tokens.ids.shape == (6,)
    assert 10 < read < 250


def test_a_panic_of_the_tokenizer_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    class PanicException(BaseException):  # as pyo3's, which cannot be imported
        pass

    class Panicking:
        @staticmethod
        def from_str(_: str) -> None:
            raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("saferedir.runtime.tokenizer.Tokenizer", Panicking)
    with pytest.raises(BundleAlteredError, match="is not a tokenizer file: called `Option"):
        PromptTokenizer((tiny / "tokenizer.json").read_bytes(), 6)
