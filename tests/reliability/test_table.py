from tests.reliability import table


def test_the_readme_shows_the_recorded_counts(repo):
    rows = table.read()
    assert rows
    assert table.markdown(rows) in (repo / "README.md").read_text(), "python tests/reliability/table.py prints it anew"
