"""Where in the model's source a node comes from: kept in the graph, and named where tracing, translation or building fails."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from saferedir.engines.errors import BundleError, ExportError
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.export.engine_graph import graph
from saferedir.export.onnx_export import to_onnx
from saferedir.export.source_lines import position_in, source_line
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY

LATENT = torch.zeros(2, 4, 4)


class Layered(nn.Module):
    """A layer of PyTorch's, whose node should be said to come from here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, latent: Tensor) -> Tensor:
        found: Tensor = self.norm(latent) @ latent  # normed here
        return found


class Lacking(nn.Module):
    """Computes what ONNX has no operator for."""

    def forward(self, latent: Tensor) -> Tensor:
        return torch.special.bessel_j0(latent)  # lacking here


class Branching(nn.Module):
    """Decides by what it is given."""

    def forward(self, latent: Tensor) -> Tensor:
        if latent.sum() > 0:  # branching here
            return latent
        return latent * 2


class Raising(nn.Module):
    """Fails on its own account."""

    def forward(self, latent: Tensor) -> Tensor:
        return latent.view(3, 7)  # raising here


def position(word: str) -> str:
    """The position of the line of this file that says `word` here."""
    lines = Path(__file__).read_text().splitlines()
    return f"{Path(__file__).name}:{1 + next(number for number, line in enumerate(lines) if f'# {word} here' in line)}"


def traced(module: nn.Module) -> onnx.ModelProto:
    model: onnx.ModelProto = to_onnx("one", {"one": graph(module, {"latent": LATENT}, ("found",))})
    return model


def test_a_node_knows_its_line(tmp_path: Path) -> None:
    model = traced(Layered())
    assert {source_line(model, node.name) for node in model.graph.node} == {position("normed")}
    onnx.save(model, tmp_path / "layered.onnx")
    assert source_line(tmp_path / "layered.onnx", model.graph.node[0].name) == position("normed")
    assert source_line(model, "no such node") is None


def test_graphs_say_nothing_of_the_machine_they_were_made_on() -> None:
    text = traced(Layered()).SerializeToString()
    assert str(Path(__file__).parent).encode() not in text
    assert b"site-packages" not in text


@pytest.mark.parametrize(
    ("module", "says", "word"),
    [
        (Lacking(), "cannot be written as ONNX: ONNX has no operator for prims.bessel_j0, at", "lacking"),
        (Branching(), "cannot be traced: Could not guard on data-dependent expression", "branching"),
        (Raising(), "cannot be traced: shape", "raising"),
    ],
    ids=["lacking", "branching", "raising"],
)
def test_what_cannot_be_exported_is_named_with_its_line(module: nn.Module, says: str, word: str) -> None:
    with pytest.raises(ExportError) as caught:
        traced(module)
    assert str(caught.value).startswith(f"one {says}")
    assert str(caught.value).endswith(f", at {position(word)}")
    assert "\n" not in str(caught.value)


def test_a_layer_of_a_package_is_named_from_the_package_on() -> None:
    trace = (
        f'  File "{torch.__file__}", line 12, in a\n  File "{Path(torch.nn.__file__).parent}/modules/linear.py", line 3, in b'
    )
    assert position_in(trace) == "torch/nn/modules/linear.py:3"
    assert position_in(f'File "{onnx.__file__}", line 12, in a\n{trace}') == "onnx/__init__.py:12"
    assert position_in("nothing of the kind") is None


def test_the_command_says_it_in_its_own_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saferedir.export.model_graphs.TextEncoderGraph.forward", lambda _, input_ids: input_ids.view(3, 7))
    with pytest.raises(BundleError, match=r"text_encoder cannot be traced: .*, at test_source_lines\.py:\d+"):
        export_folder(SHIPPED_MODEL, SHIPPED_SAFETY, tmp_path / "bundle", BundleOptions(name="one"), on_step=lambda *_: None)
    assert not list(tmp_path.iterdir())
