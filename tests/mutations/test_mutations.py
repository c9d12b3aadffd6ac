"""The table of planted bugs must not rot: make mutations runs it."""

import ast

import pytest

from tests.mutations.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_bug_can_still_be_planted(mutation: Mutation) -> None:
    mutated = mutation.mutate((ROOT / mutation.file).read_text())
    ast.parse(mutated)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_test_still_exists(mutation: Mutation) -> None:
    path, _, test = mutation.tests.partition("::")
    source = (ROOT / path).read_text()
    assert not test or f"def {test.partition('[')[0]}(" in source


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_documentation_has_its_row(mutation: Mutation) -> None:
    rows = (ROOT / "docs" / "testing.md").read_text().splitlines()
    row = f"| {mutation.name} | `{mutation.file}` | `{mutation.tests.partition('[')[0]}"
    assert [line for line in rows if line.startswith(row)]


def test_text_that_is_not_unique_is_refused() -> None:
    mutation = Mutation("name", "file", "a", "b", "tests")
    assert mutation.mutate("xay") == "xby"
    for text in ("", "aa"):
        with pytest.raises(ValueError, match="name: file has the text"):
            mutation.mutate(text)
