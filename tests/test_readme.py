"""The README's figures are those of the result files, and so are all tables."""

from benchmarks.readme import FIGURES, README, figures, with_figures


def test_figures_in_the_readme_come_from_the_result_files() -> None:
    text = README.read_text()
    assert with_figures(text) == text


def test_all_tables_come_from_the_result_files() -> None:
    assert FIGURES.read_text() == figures()
