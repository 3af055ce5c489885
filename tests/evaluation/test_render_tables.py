import itertools
import re

import pytest
from markdown_it import MarkdownIt

from reidctl.evaluation.comparison import Context, compare
from reidctl.evaluation.render import (
    Grid,
    caption,
    escape_latex,
    escape_markdown,
    interval,
    latex,
    markdown,
    one_line,
    percent,
)
from reidctl.naming import LABELS, label

HOSTILE = [
    "a_b&%$#{}~^\\",
    "one | two || three",
    "line\nbreak\r\nand\ttab",
    "`code` ``more``",
    "**bold** _it_ ~~gone~~ <b>tag</b> <script>alert(1)</script> &amp; &#65;",
    "[a](http://x.y) ![p](q) [ref]: https://x.y www.example.org mail@x.y <https://x.y>",
    "\\input{/etc/passwd} \\write18{ls} \\end{document} % rest",
    "\\\\[5pt] \\\\* & \\hline",
    "[2pt] at the start",
    "* star",
    "- dash",
    "1. one",
    "12) twelve",
    "# head",
    "=== ---",
    "--- -- ,, '' ?` !` << >>",
    "$x^2$ $$ \\( \\[",
    "\u202egnirts \u2028 \x1b[31mred\x07 \x00",
    "Zürich 人物 Ω ×",
    "",
    "\\",
    "trailing \\",
    "^^41 ^^M",
]
EVALUATED = {
    "t2i:a_b": {
        "direction": "t2i",
        "dataset": "a_b",
        "queries": 1234,
        "skipped": 1,
        "gallery": 5678,
        "people": 90,
        "rows": {
            "standard": {"rank1": [0.5, 0.25, 0.75], "mAP": [0.3333, None, None], "rSum": [1.5, 1.0, 2.0]},
            "chance": {"rank1": [0.001, None, None]},
        },
    }
}


def parsed(text):
    """Headings, table rows and list items of a page as a Markdown reader shows them, and every kind of token."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {token.type for token in tokens} | {child.type for token in inline for child in token.children}
    return ["".join(child.content for child in token.children) for token in inline], kinds


PLAIN_KINDS = {
    *(f"{name}_{side}" for name in ("table", "thead", "tbody", "tr", "th", "td") for side in ("open", "close")),
    *(f"{name}_{side}" for name in ("heading", "bullet_list", "list_item", "paragraph") for side in ("open", "close")),
    *("inline", "text", "text_special"),
}


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_hostile_text_letter_by_letter_and_nothing_else(text):
    page = markdown({"title": f"x {text}", "columns": ["name", text], "rows": [[text, 1]], "notes": [text, "end"]})
    shown, kinds = parsed(page)
    whole = one_line(text)
    wanted = [one_line(f"x {text}"), "name", whole, whole, "1", *([whole] if whole else []), "end"]
    assert shown == wanted
    assert kinds <= PLAIN_KINDS
    assert page.count("\n|") == 3


@pytest.mark.parametrize("text", HOSTILE)
def test_an_escaped_address_is_no_link_for_readers_that_look_for_them(text):
    escaped = escape_markdown(text)
    assert not re.search(r"(?i)\bhttps?:|\bwww\.|\w@\w", escaped)


# What may stand in the output of `escape_latex`: these, letters, and characters that mean nothing to TeX.
LATEX_TOKEN = re.compile(
    r"\\text(backslash|asciitilde|asciicircum|less|greater|bar|quoteright|quoteleft)\{\}|\\char34\{\}"
    r"|\\[&%$#_{}]|\{[\[\]*,-]\}|[^\\{}$&#%_^~]"
)


def test_latex_text_consists_of_harmless_tokens_only():
    for text in (*HOSTILE, *map("".join, itertools.product("\\{}[]*-%a ", repeat=3))):
        escaped = escape_latex(text)
        assert "".join(match.group() for match in LATEX_TOKEN.finditer(escaped)) == escaped
        assert not re.search(r"--|,,|''|``|[?!]`|<<|>>|\n", escaped)
        assert not re.match(r"[\[*]", escaped)


NAMED = {"backslash": "\\", "asciitilde": "~", "asciicircum": "^", "less": "<", "greater": ">", "bar": "|"}
NAMED |= {"quoteright": "'", "quoteleft": "`"}


def typeset(escaped):
    """What TeX would print for the output of `escape_latex`."""
    text = re.sub(r"\\text(\w+)\{\}", lambda m: f"\x01{ord(NAMED[m.group(1)])}\x02", escaped)
    text = re.sub(r"\\char34\{\}", '"', text)
    text = re.sub(r"\\([&%$#_{}])", lambda m: f"\x01{ord(m.group(1))}\x02", text)
    text = text.replace("{", "").replace("}", "")
    return re.sub("\x01(\\d+)\x02", lambda m: chr(int(m.group(1))), text)


@pytest.mark.parametrize("text", [*HOSTILE, 'say "so"'])
def test_latex_prints_the_text_as_it_was(text):
    assert typeset(escape_latex(text)) == one_line(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_latex_table_keeps_its_form_whatever_is_in_it(text):
    page = latex({"title": text, "columns": [text, "b"], "rows": [[text, text], ["x", 1]], "notes": [text]})
    assert page.count("\\begin{tabular}") == page.count("\\end{tabular}") == 1
    body = page.split("\\toprule\n")[1].split("\\bottomrule")[0].strip().splitlines()
    assert len(body) == 4 and body[1] == "\\midrule"
    for line in (body[0], *body[2:]):
        assert line.endswith(" \\\\") and len(re.findall(r"(?<!\\)&", line)) == 1
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", re.sub(r"\\\\", "", page)):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0


def test_an_evaluation_is_rendered_in_percent_with_its_intervals_and_counts():
    page = markdown(EVALUATED, split="test", notes=["A note."])
    assert page.splitlines() == [
        "### a\\_b, text to image (test): 1,234 queries, 5,678 images, 90 people, 1 query without a match skipped; "
        "ties at their expected value; percent, 95 % intervals over people",
        "",
        "|  | rank1 | mAP | rSum |",
        "|---|---:|---:|---:|",
        "| model | 50.0 [25.0, 75.0] | 33.3 | 150.0 [100.0, 200.0] |",
        "| chance | 0.1 | - | - |",
        "",
        "- A note.",
    ]


def test_an_evaluation_is_rendered_as_a_booktabs_table_whose_caption_names_the_protocol():
    assert latex(EVALUATED, split="val").splitlines() == [
        "% \\usepackage{booktabs}",
        "",
        "\\begin{table}",
        "\\centering",
        "\\caption{a\\_b, text to image (val): 1,234 queries, 5,678 images, 90 people, 1 query without a match "
        "skipped; ties at their expected value; percent, 95 \\% intervals over people.}",
        "\\begin{tabular}{lrrr}",
        "\\toprule",
        " & rank1 & mAP & rSum \\\\",
        "\\midrule",
        "model & 50.0 [25.0, 75.0] & 33.3 & 150.0 [100.0, 200.0] \\\\",
        "chance & 0.1 & - & - \\\\",
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]


def test_fractions_are_percent_counts_are_whole_and_p_values_are_not_rounded_to_zero():
    table = {
        "title": "differences",
        "columns": ["metric", "value", "other", "difference", "low", "high", "p_value", "queries", "equal"],
        "rows": [
            ["rank1", 0.5, 0.75, -0.25, -0.3, -0.2, 0.0002, 1234, True],
            ["mAP", 0.5, None, float("nan"), None, None, 0.0421, 5, False],
        ],
    }
    assert markdown(table).splitlines()[2:] == [
        "| metric | value | other | difference | p\\_value | queries | equal |",
        "|---|---:|---:|---:|---:|---:|---|",
        "| rank1 | 50.0 | 75.0 | -25.0 [-30.0, -20.0] | \\<0.001 | 1,234 | yes |",
        "| mAP | 50.0 | - | - | 0.042 | 5 | no |",
    ]
    assert "$-$25.0 [$-$30.0, $-$20.0]" in latex(table) and "$<$0.001" in latex(table)


def test_value_and_drop_each_take_their_own_interval():
    columns = ["setting", "value", "low", "high", "drop", "drop_low", "drop_high"]
    row = dict(zip(columns, ["typos", 0.5, 0.4, 0.6, 0.1, 0.05, 0.15], strict=True))
    for rows in ([row], [list(row.values())]):
        page = markdown({"columns": columns, "rows": rows})
        assert page.splitlines()[-1] == "| typos | 50.0 [40.0, 60.0] | 10.0 [5.0, 15.0] |"


def test_rows_without_a_cell_for_a_column_are_shown_with_a_dash_and_an_empty_table_without_a_frame():
    assert markdown({"columns": ["a", "b"], "rows": [{"a": "x"}]}).splitlines()[-1] == "| x | - |"
    assert markdown({"title": "t", "columns": ["a"], "rows": [], "notes": ["nothing"]}) == "### t\n\n- nothing\n"


def test_a_comparison_is_rendered_with_banner_lines_and_footnotes():
    found = compare(EVALUATED["t2i:a_b"], dataset="a_b", direction="t2i", context=Context())
    page = markdown(found.as_dict())
    assert "- Weights: " in page and "- 1\\. " in page
    assert len([line for line in page.splitlines() if line.startswith("| ")]) == 1 + len(found.rows)
    assert latex(found.as_dict()).count("\\par ") == len(found.as_dict()["notes"]) - 1


def test_the_banner_stands_above_the_numbers():
    table = {"title": "t", "columns": ["a"], "rows": [["1"]], "notes": ["first", "NOT COMPARABLE: a_b.", "last"]}
    assert markdown(table).splitlines()[2] == "**NOT COMPARABLE: a\\_b.**"
    assert markdown(table).splitlines()[-2:] == ["- first", "- last"]
    page = latex(table)
    assert page.index("\\caption") < page.index("\\textbf{NOT COMPARABLE: a\\_b.}") < page.index("\\toprule")
    assert page.count("NOT COMPARABLE") == 1 and page.index("\\bottomrule") < page.index("first")


def test_several_tables_follow_each_other_and_the_output_depends_on_nothing_else():
    tables = [Grid("first", ("a",), (("1",),)), {"title": "second", "columns": ["b"], "rows": [["2"]]}]
    for draw in (markdown, latex):
        page = draw(tables)
        assert page == draw(tables)
        assert page.index("first") < page.index("second")


def test_the_rows_of_an_evaluation_have_names_for_people():
    assert {name: LABELS[name] for name in ("standard", "histogram", "oracle", "shuffled", "chance")} == {
        "standard": "model",
        "histogram": "colour histogram",
        "oracle": "oracle, all attributes",
        "shuffled": "label-shuffle control",
        "chance": "chance",
    }
    assert len(set(LABELS.values())) == len(LABELS)


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "12.3"), (1.0, "100.0"), (None, "-"), (float("nan"), "-"), (float("inf"), "-")]
)
def test_percent_has_one_decimal_and_a_dash_where_there_is_nothing(value, text):
    assert percent(value) == text
    assert interval(value, None, None) == text


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ("standard", "model"),
        ("rerank-20/6/0.3", "model, re-ranked 20/6/0.3"),
        ("cloth-changing+rerank-50/15/0.3", "model, cloth-changing, re-ranked 50/15/0.3"),
        ("somebody's", "somebody's"),
        ("a rerank-b", "a rerank-b"),
    ],
)
def test_a_condition_is_named_for_people(condition, text):
    assert label(condition) == text


def test_a_caption_without_people_or_split_leaves_them_out():
    facts = {"direction": "x2y", "dataset": "d", "queries": 1, "skipped": 2, "gallery": 3, "rows": {}}
    assert caption(facts).startswith("d, x2y: 1 query, 3 images, 2 queries without a match skipped; ties")
