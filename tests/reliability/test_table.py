from tests.reliability import table


def test_the_readme_shows_the_recorded_counts(repo):
    rows = table.read()
    assert rows
    text = (repo / "tests" / "README.md").read_text()
    assert table.markdown(rows) in text, "python tests/reliability/table.py prints the new table"


def test_a_run_that_takes_another_time_leaves_the_table_as_it_is():
    rows = table.read()
    assert table.markdown({promise: row | {"seconds": 1e6} for promise, row in rows.items()}) == table.markdown(rows)
