"""The documentation says what the command line does."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from reidctl.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
STOP = ("|", ">", ">>", "2>", "&&", "||", ";", "&", "<")


def leaves(node=None, path=()):
    node = node or get_command(app)
    children = getattr(node, "commands", {})
    return [leaf for name, child in children.items() for leaf in leaves(child, (*path, name))] or [path]


def command_lines(text):
    """Every `reidctl ...` in the code blocks and code spans of a page, as words after `reidctl`."""
    blocks = BLOCK.findall(text)
    spans = re.findall(r"`(reidctl [^`\n]+)`", BLOCK.sub("", text))
    for line in [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans:
        yield from _split(line)


def _split(line):
    line = line.strip().removeprefix("$ ")
    if not re.match(r"(\w+=\S* +)*reidctl\b", line) or "..." in line or "…" in line:
        return
    words = shlex.split(line, comments=True)
    while words:
        end = next((i for i, word in enumerate(words) if word in STOP), len(words))
        part = words[:end]
        while part and re.fullmatch(r"\w+=.*", part[0]):
            part = part[1:]
        if part and part[0] == "reidctl":
            yield part[1:]
        words = words[end + 1 :]


def parse(words):
    node, words = get_command(app), list(words)
    while hasattr(node, "commands"):
        if not words or words[0] == "--help":
            return
        assert words[0] in node.commands, f"there is no command `{words[0]}`"
        node = node.commands[words.pop(0)]
    if "--help" not in words and words:
        node.make_context("reidctl", words)


CASES = [(page, words) for page in PAGES for words in command_lines(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=[f"{page.name}: {' '.join(words)[:60]}" for page, words in CASES]
)
def test_a_documented_command_line_parses(page, words):
    parse(words)


def test_the_reader_of_command_lines_finds_them_and_the_check_refuses_wrong_ones():
    text = (
        "Use `reidctl doctor`.\n```bash\n$ reidctl data synth \\\n  --people 3 && REIDCTL_RUN=x reidctl index | cat\n"
        "pip install . # reidctl\n```\n"
    )
    assert list(command_lines(text)) == [["data", "synth", "--people", "3"], ["index"], ["doctor"]]
    with pytest.raises(Exception, match="No such option"):
        parse(["index", "--nonsense"])
    with pytest.raises(AssertionError):
        parse(["retrain"])


def readme():
    path = ROOT / "README.md"
    assert path.is_file(), "there is no README.md"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", leaves(), ids=" ".join)
def test_every_command_is_documented(path):
    readme()
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert "reidctl " + " ".join(path) in pages


@pytest.mark.parametrize("command", ["make demo", "make test", "pip install ."])
def test_the_readme_shows_how_to_start(command):
    assert command in readme()


CLAIM = re.compile(
    r"\b(?:reproduc\w*|replicat\w*|match\w*|achiev\w*)\b[^.]{0,60}"
    r"\b(?:papers?|published (?:results?|numbers?)|sota|state[- ]of[- ]the[- ]art)\b",
    re.IGNORECASE,
)
DENIAL = re.compile(r"\b(?:not|never|no|nothing|cannot|without|neither|nor)\b|n't\b", re.IGNORECASE)


def claims(text):
    """Sentences that say a paper was reproduced, unless they deny it."""
    sentences = re.split(r"(?<=[.!?|])\s+|\n\s*\n|\n(?=[-*#|])", text)
    return [found for found in sentences if CLAIM.search(" ".join(found.split())) and not DENIAL.search(found)]


@pytest.mark.covers(235)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_claims_to_reproduce_a_paper(page):
    assert not claims(page.read_text(encoding="utf-8"))


@pytest.mark.covers(235)
def test_the_readme_says_that_nothing_published_is_reproduced():
    assert claims("It reproduces the\nresults of the paper.") and not claims(
        "It does not reproduce the paper's numbers."
    )
    assert re.search(r"not (?:be )?reproduc|reproduces? (?:no|none)", readme(), re.IGNORECASE)


def test_the_readme_speaks_about_privacy():
    assert re.search(r"^#+ .*privacy", readme(), re.IGNORECASE | re.MULTILINE)
    assert re.search(r"biometric", readme(), re.IGNORECASE)


def test_pictures_and_files_that_pages_link_to_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_changelog_speaks_about_this_version():
    from reidctl import __version__

    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert "Unreleased" in headings or __version__ in headings


def tracked():
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


REGISTRY = re.compile(
    r"https?://[^\s\"'<>)]*(?:" + "|".join(("pypi", "debian", "npm" + "js", "pythonhosted")) + ")", re.IGNORECASE
)


def test_no_file_names_the_address_of_a_package_registry():
    found = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "ignore")
        if REGISTRY.search(text):
            found.append(str(path.relative_to(ROOT)))
    assert not found


def test_constraints_are_exact_versions_and_nothing_else():
    for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+( *;.*)?|#.*|", line), line
