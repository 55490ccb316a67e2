"""The categories file: label values, and other names of a category."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from segvol_pl.config.categories import load_categories, load_synonyms, synonyms_among
from segvol_pl.errors import CaseError

BOTH = "categories: {liver: [1], spleen: [2]}\nsynonyms: {liver: [hepar, jecur], spleen: lien}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "categories.yaml"
    path.write_text(text)
    return path


def test_label_values_and_synonyms_lie_in_one_file(tmp_path: Path) -> None:
    path = written(tmp_path, BOTH)
    assert load_categories(path) == {"liver": [1], "spleen": [2]}
    assert load_synonyms(path) == {"liver": ["hepar", "jecur"], "spleen": ["lien"]}


@pytest.mark.parametrize("text", ["liver: [1]\nsynonyms: [2]\n", "categories: {liver: [1]}\n"])
def test_a_file_without_the_section_has_no_synonyms(tmp_path: Path, text: str) -> None:
    """In the plain form `synonyms` is a category like any other."""
    path = written(tmp_path, text)
    assert load_synonyms(path) == {}
    assert ("synonyms" in load_categories(path)) == text.startswith("liver")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{livr: [hepar]}", "'livr' is none of its categories"),
        ("{liver: [spleen]}", "'spleen', of 'liver', is a category"),
        ("{liver: [hepar], spleen: [hepar]}", "'hepar' is listed for 'liver' and 'spleen'"),
        ("{liver: [hepar, hepar]}", "'hepar' is listed for 'liver' and 'liver'"),
        ("{liver: [hepar, 3]}", "3 is no name: quote it"),
        ("{liver: }", "None is no name"),
        ("{liver: ['']}", "'' is no name"),
        ("[hepar]", "lists none: write name"),
        ("{liver: [a], liver: [b]}", "liver is given twice"),
    ],
)
def test_synonyms_that_contradict_the_file_are_refused_in_one_line(tmp_path: Path, section: str, message: str) -> None:
    path = written(tmp_path, f"categories: {{liver: [1], spleen: [2]}}\nsynonyms: {section}\n")
    with pytest.raises(CaseError, match=message) as caught:
        load_synonyms(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_section_beside_categories_of_the_plain_form_says_where_they_belong(tmp_path: Path) -> None:
    path = written(tmp_path, "liver: [1]\nsynonyms: {liver: [hepar]}\n")
    for read in (load_categories, load_synonyms):
        with pytest.raises(CaseError, match="put the names above it into a section categories"):
            read(path)


def test_a_run_takes_the_synonyms_of_its_own_categories(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, BOTH)
    with caplog.at_level(logging.INFO):
        assert synonyms_among(path, ["liver", "aorta"]) == {"hepar": "liver", "jecur": "liver"}
    assert "left out those of spleen, which are no categories here" in caplog.text
    with pytest.raises(CaseError, match="'hepar', of 'liver', is a category here"):
        synonyms_among(path, ["liver", "hepar"])


def test_a_file_of_synonyms_alone_may_name_any_category(tmp_path: Path) -> None:
    assert synonyms_among(written(tmp_path, "synonyms: {liver: [hepar]}\n"), ["liver"]) == {"hepar": "liver"}
