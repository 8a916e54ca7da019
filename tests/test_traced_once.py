"""A trace that tests share is known by all that it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from traced_once import key_of, traced_once

from saferedir.export.engine_graph import Graph, graph


class Doubling(nn.Module):
    """A layer, and a factor that is no parameter."""

    def __init__(self, seed: int = 0, factor: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
        self.factor = factor

    def forward(self, latent: Tensor) -> Tensor:
        result: Tensor = self.layers(latent) * self.factor
        return result


class Tripling(Doubling):
    def forward(self, latent: Tensor) -> Tensor:
        result: Tensor = self.layers(latent) * self.factor * 1.5
        return result


def made(module: nn.Module, tokens: int = 3) -> Graph:
    return graph(module, {"latent": torch.randn(2, tokens, 4)}, ("result",))


def test_the_same_graph_has_the_same_key() -> None:
    assert key_of("one", made(Doubling()), 18) == key_of("one", made(Doubling()), 18)


def test_whatever_differs_gives_another_key() -> None:
    changed = Doubling()
    with torch.no_grad():
        changed.layers[8].bias[3] += 1e-3
    graphs = [made(Doubling()), made(Doubling(1)), made(Doubling(factor=3.0)), made(Tripling()), made(changed),
              made(Doubling(), tokens=5)]  # fmt: skip
    keys = {key_of("one", own, 18) for own in graphs}
    assert len(keys | {key_of("two", graphs[0], 18), key_of("one", graphs[0], 22)}) == len(graphs) + 2


def test_a_method_that_was_replaced_gives_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("one", made(Doubling()), 18)
    monkeypatch.setattr(Doubling, "forward", lambda self, latent: self.layers(latent))
    assert key_of("one", made(Doubling()), 18) != before


def test_it_is_traced_once(tmp_path: Path) -> None:
    traced: list[str] = []

    def trace(name: str, graph: Graph, opset: int) -> Any:
        traced.append(name)
        return onnx.helper.make_model(onnx.helper.make_graph([], name, [], []))

    for folder in (tmp_path, tmp_path):  # as two processes would
        assert traced_once(trace, folder)("one", made(Doubling()), 18).graph.name == "one"
    assert traced == ["one"]
