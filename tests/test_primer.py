"""The examples of docs/prompts.md print what the page says."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "prompts.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _as_it_was():
    """The examples seed torch's generator; other tests go on with theirs."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def printed(code, names):
    """What a block prints when it is run with the names of those before it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "docs/prompts.md", "exec"), names)
    return out.getvalue()


@pytest.mark.covers(111)
def test_the_examples_of_the_primer_print_what_stands_below_them():
    names = {}
    found = [(printed(code, names), said) for code, said in EXAMPLE.findall(PAGE)]
    assert [said for _, said in found] == [output for output, _ in found]


@pytest.mark.covers(111)
def test_every_question_of_the_primer_has_an_example_with_an_output():
    sections = re.findall(r"^## \d\. (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert len(sections) == 5
    for heading, text in sections[:3]:
        assert any(said for _, said in EXAMPLE.findall(text)), heading


@pytest.mark.covers(111)
def test_no_python_of_the_primer_is_left_out():
    assert len(EXAMPLE.findall(PAGE)) == PAGE.count("```python")


@pytest.mark.covers(111)
def test_links_within_the_primer_have_a_target():
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
