"""The README's figures are those of the result files."""

from benchmarks.readme import README, with_figures


def test_figures_in_the_readme_come_from_the_result_files() -> None:
    text = README.read_text()
    assert with_figures(text) == text
