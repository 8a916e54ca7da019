"""Writes the README's figures and all tables of `FIGURES.md` from the files in `benchmarks/results`: none is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import engine_figures, method_figures, robustness_figures, summary_figures
from benchmarks.markdown import read_result
from benchmarks.report import RESULTS

README = Path(__file__).parents[1] / "README.md"
FIGURES = Path(__file__).with_name("FIGURES.md")
BEGIN, END = "<!-- figures: python -m benchmarks.readme -->", "<!-- end of figures -->"


#: A section, and the results that it needs.
Sections = Mapping[Callable[[], str], tuple[str, ...]]


def main() -> None:
    README.write_text(with_figures(README.read_text()))
    FIGURES.write_text(figures())
    print(README, FIGURES, sep="\n")


def with_figures(text: str) -> str:
    """`text` with what stands between the two markers replaced by the current figures."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{summary()}\n{END}{after}"


def summary() -> str:
    """What the README shows, in Markdown."""
    return _measured(
        {
            summary_figures.in_short: ("forgetting_church", "forgetting_ink", "forgetting_weapons"),
            summary_figures.methods: ("peers_church", "peers_ink", "peers_weapons"),
            robustness_figures.what_gets_through: (),
        }
    )


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
        robustness_figures.what_gets_through: (),
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
    }
    title = "# Figures\n\nEvery table, written by `python -m benchmarks.readme` from the files in [results](results)."
    return f"{title}\n\n{_measured(sections)}\n"


def _measured(sections: Sections) -> str:
    measured = {path.stem for path in RESULTS.glob("*.json")}
    written = []
    missing = sorted({name for needed in sections.values() for name in needed} - measured)
    for write, needed in sections.items():
        if measured.issuperset(needed):
            also = summary_figures.ALSO if write is summary_figures.in_short else ()
            written.append(write() + _module([*needed, *(name for name in also if name in measured)]))
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
