"""Writes the README's figures and all tables of `FIGURES.md` from the files in `benchmarks/results`: none is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import engine_figures, method_figures, robustness_figures, service_figures, summary_figures
from benchmarks.markdown import read_result
from benchmarks.report import RESULTS

README = Path(__file__).parents[1] / "README.md"
FIGURES = Path(__file__).with_name("FIGURES.md")
#: What stands in the README between the line that names it and the next end.
BEGIN, END = "<!-- figures: {} -->", "<!-- end of figures -->"


#: A section, and the results that it needs.
Sections = Mapping[Callable[[], str], tuple[str, ...]]


def main() -> None:
    README.write_text(with_figures(README.read_text()))
    FIGURES.write_text(figures())
    print(README, FIGURES, sep="\n")


def with_figures(text: str) -> str:
    """`text` with what stands between each pair of markers replaced by the current figures."""
    concepts = summary_figures.CONCEPTS
    tables = [f"{table}_{concept}" for table in ("forgetting", "attacks") for concept in concepts]
    blocks: dict[str, Sections] = {
        "works": {summary_figures.works: (*tables, "envelope", "unfamiliar")},
        "costs": {summary_figures.costs: ("speed", "safety_cost")},
        "limits": {summary_figures.what_it_does_not_do: ()},
    }
    for name, sections in blocks.items():
        begin = BEGIN.format(name)
        before, found, rest = text.partition(begin)
        assert found, begin
        _, _, after = rest.partition(END)
        text = f"{before}{begin}\n{_measured(sections)}\n{END}{after}"
    return text


def figures() -> str:
    """All tables of which there are results, in Markdown."""
    sections: Sections = {
        method_figures.forgetting: ("forgetting_church", "forgetting_ink", "forgetting_weapons"),
        method_figures.settings: ("settings",),
        method_figures.envelope: ("envelope",),
        method_figures.base: ("base_quality",),
        method_figures.unfamiliar: ("unfamiliar",),
        method_figures.several: ("interference",),
        method_figures.added: ("added",),
        method_figures.ablation: ("ablation",),
        method_figures.statistic: ("statistic",),
        robustness_figures.attacks: ("attacks_church",),
        robustness_figures.amplified: ("amplified",),
        robustness_figures.peers: ("peers_church", "peers_ink", "peers_weapons"),
        robustness_figures.transfer: ("transfer",),
        robustness_figures.relation: ("relation",),
        engine_figures.cost: ("speed",),
        engine_figures.safety_cost: ("safety_cost",),
        engine_figures.optimisers: ("optimisers",),
        engine_figures.parity: ("parity",),
        engine_figures.families: ("families",),
        engine_figures.precision: ("precision",),
        method_figures.ladder: ("oracle_church",),
        service_figures.equality: ("equality",),
        service_figures.batching: ("batching",),
        service_figures.service: ("service",),
        service_figures.faults: ("faults", "partial_images"),
        service_figures.endurance: ("contract", "soak", "replicas"),
    }
    title = "# Figures\n\nEvery table, written by `python -m benchmarks.readme` from the files in `benchmarks/results`."
    return f"{title}\n\n{_measured(sections)}\n"


def _measured(sections: Sections) -> str:
    measured = {path.stem for path in RESULTS.glob("*.json")}
    written = []
    missing = sorted({name for needed in sections.values() for name in needed} - measured)
    for write, needed in sections.items():
        if measured.issuperset(needed):
            written.append(write() + _module(needed))
    if missing:
        written.append(f"Not measured on this module yet: {', '.join(f'`{name}`' for name in missing)}.")
    return "\n\n".join(written)


def _module(names: Sequence[str]) -> str:
    """What is said below a table with results of another safety module than the shipped one."""
    modules = {name: result["module"] for name in names if "module" in (result := read_result(name))}
    said = "; ".join(f"`{name}` was measured on the safety module {module}" for name, module in modules.items())
    return f"\n\n{said}." if said else ""


if __name__ == "__main__":
    main()
