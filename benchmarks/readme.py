"""Writes the README's figures from the files in `benchmarks/results`, so that no figure there is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import engine_figures, method_figures, robustness_figures
from benchmarks.markdown import read_result
from benchmarks.report import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: python -m benchmarks.readme -->", "<!-- end of figures -->"


def main() -> None:
    README.write_text(with_figures(README.read_text()))
    print(README)


def with_figures(text: str) -> str:
    """`text` with what stands between the two markers replaced by the current figures."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{figures()}\n{END}{after}"


def figures() -> str:
    """The tables of which there are results, in Markdown."""
    sections = {
        method_figures.forgetting: ("forgetting_church", "forgetting_ink", "forgetting_weapons"),
        method_figures.benign: ("benign",),
        method_figures.base: ("base_quality",),
        method_figures.unfamiliar: ("unfamiliar",),
        method_figures.splits: ("splits",),
        method_figures.several: ("interference",),
        method_figures.added: ("added",),
        method_figures.detection: ("detection",),
        method_figures.ablation: ("ablation",),
        method_figures.strength_choice: ("strength_choice",),
        method_figures.strength: ("strength",),
        method_figures.cooldown: ("cooldown",),
        robustness_figures.attacks: ("attacks_church",),
        robustness_figures.generalisation: ("generalisation",),
        robustness_figures.what_gets_through: ("attacks_church",),
        robustness_figures.peers: ("peers_church", "peers_ink", "peers_weapons"),
        robustness_figures.transfer: ("transfer",),
        robustness_figures.relation: ("relation",),
        engine_figures.cost: ("speed", "speed_ort-cuda"),
        engine_figures.safety_cost: ("safety_cost",),
        engine_figures.optimisers: ("optimisers",),
        engine_figures.parity: ("parity",),
        engine_figures.families: ("families",),
        engine_figures.precision: ("precision",),
        method_figures.ladder: ("oracle_church",),
    }
    measured = {path.stem for path in RESULTS.glob("*.json")}
    return "\n\n".join(write() + _module(needed) for write, needed in sections.items() if measured.issuperset(needed))


def _module(names: Sequence[str]) -> str:
    """What is said below a table with results of another safety module than the shipped one."""
    modules = {name: result["module"] for name in names if "module" in (result := read_result(name))}
    said = "; ".join(f"`{name}` was measured on the safety module {module}" for name, module in modules.items())
    return f"\n\n{said}." if said else ""


if __name__ == "__main__":
    main()
