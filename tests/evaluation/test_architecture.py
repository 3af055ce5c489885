"""The description is that of the built model: complete counts, no box for what is not there, graphs that parse."""

import re

import pytest
import torch
from methods.test_method_contract import SETTINGS, model
from torch import nn

from reidctl.evaluation.architecture import _code, _plain, _quoted, describe

ABLATED = {
    "gate": False,
    "cross_attention": "none",
    "fusion": {"width": 16, "out_dim": 16, "kind": "none", "gate": False},
}
VARIANTS = [
    *((name, {}) for name in SETTINGS),
    ("bdam", ABLATED),
    ("bdam", {"decouple": False}),
    ("bdam", {"depth": 2, "cross_attention": "interleaved", "protocol": "own_text"}),
    ("bdam", {"protocol": "visual", "clothing_loss": (), "gradnorm": None}),
    ("irra", {"weights": {"mlm": 0.0}}),
]


def table(text, heading):
    """Rows of the table under a heading, cells as they are written."""
    lines = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0].strip().splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return rows[2:]


def graph(text):
    """Nodes (id -> label), edges (source, target, dashed) and lines of the mermaid block."""
    lines = text.split("```mermaid\n", 1)[1].split("```", 1)[0].splitlines()
    nodes = {found[1]: found[2] for line in lines if (found := re.match(r'\s+(n\d+)[^"\w]+"([^"]*)"', line))}
    edges = [
        (found[1], found[3], found[2] == "-.->")
        for line in lines
        if (found := re.match(r"\s+(n\d+) (-->|-\.->) (n\d+)$", line))
    ]
    return nodes, edges, lines


def names(text):
    """Names in the graph, without sizes."""
    return {label.split("<br/>")[0] for label in graph(text)[0].values()}


def arrows(text):
    nodes, edges, _ = graph(text)
    return {(nodes[a].split("<br/>")[0], nodes[b].split("<br/>")[0]) for a, b, _ in edges}


def reads(text):
    return {row[0].strip("`"): set(row[2].replace("`", "").split(", ")) for row in table(text, "Losses")}


@pytest.mark.covers(163)
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_parameter_counts_of_the_parts_add_up_to_the_models(name, changes):
    method = model(name, **changes)
    total = sum(parameter.numel() for parameter in method.parameters())
    rows = table(describe(method), "Parts")
    counts = [int(row[2].strip("*").replace(",", "")) for row in rows]
    assert sum(counts[:-1]) == counts[-1] == total
    for row, count in zip(rows[:-1], counts, strict=False):
        named = row[0].split("`")[1]
        module = method if named == "the method" else method.get_submodule(named)
        own = " itself:" in row[0]
        assert count == sum(parameter.numel() for parameter in module.parameters(recurse=not own))


@pytest.mark.covers(163)
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_the_graph_parses_and_every_arrow_joins_nodes_that_are_there(name, changes):
    nodes, edges, lines = graph(describe(model(name, **changes)))
    assert lines[0] == "flowchart TD" and len(nodes) > 4 and len(edges) > 4
    defined = [line for line in lines if re.match(r"\s+n\d+\W*\"", line)]
    assert len(defined) == len(nodes), "a node is defined once"
    assert all(a in nodes and b in nodes and a != b for a, b, _ in edges)
    assert len({(a, b) for a, b, _ in edges}) == len(edges)
    assert {end for a, b, _ in edges for end in (a, b)} == set(nodes), "no node stands alone"
    kinds = {'(["': '"])', '["': '"]', '("': '")', '{{"': '"}}', '[["': '"]]'}
    for line in defined:
        opening, closing = re.fullmatch(r'\s+n\d+(\W*?")[^"]*("\W*)', line).groups()
        assert kinds[opening] == closing
    known = len(defined) + len(edges) + 1
    groups = sum(line.strip().startswith("subgraph") for line in lines)
    assert groups == sum(line.strip() == "end" for line in lines)
    assert known + 2 * groups == len(lines), "nothing else is in the block"


@pytest.mark.covers(163)
def test_bdam_shows_streams_cross_attention_gates_fusion_protocol_and_what_losses_read():
    text = describe(model("bdam", depth=2))
    shown, joined = names(text), arrows(text)
    for part in ("decoupling.identity_blocks", "decoupling.clothing_blocks", "decoupling.identity_cross",
                 "decoupling.gate", "fusion.gate", "fusion.body"):  # fmt: skip
        assert part in shown
    for stream, other in (("identity", "clothing"), ("clothing", "identity")):
        assert (f"decoupling.{other}_blocks", f"decoupling.{stream}_cross") in joined
        assert (f"decoupling.{other}_cross", f"decoupling.{stream}_blocks") not in joined
        assert (f"decoupling.norm_{other}", "decoupling.gate") in joined
    assert ("decoupling.gate", "decoupling.identity") in joined
    assert ("decoupling.clothing", "fusion.align_image") not in joined
    assert reads(text) == {
        "info": {"fusion.feature"},
        "triplet": {"decoupling.identity"},
        "aln": {"text.hidden (clothing)", "clothing_head"},
        "grl": {"critic"},  # the text is its fixed target
        "decouple": {"decoupling.identity", "decoupling.clothing"},
    }
    for fact in ("of 2 self-attention block", "1 block(s) per stream, after the stack", "sigmoid, per channel",
                 "fusion: mamba, 2 layers, sequence tokens, text first", "softmax over the two", "image\\_only",
                 "SelfBlock x 2", "MambaStack of 2"):  # fmt: skip
        assert fact in text


@pytest.mark.covers(163)
def test_an_ablated_model_lacks_the_boxes():
    full, text = describe(model("bdam")), describe(model("bdam", **ABLATED))
    gone = {"decoupling.gate", "decoupling.identity_cross", "decoupling.clothing_cross", "fusion.gate", "fusion.body"}
    assert gone <= names(full) and not gone & names(text)
    assert not [row for row in table(text, "Parts") if row[0].strip("`") in gone]
    assert names(full) - names(text) == gone | {"decoupling.pooled_clothing"} - names(text)
    for fact in (
        "cross-attention: none",
        "gate between the streams: none",
        "fusion: no sequence model",
        "one half each",
    ):
        assert fact in text
    bare = describe(model("bdam", decouple=False))
    assert not [name for name in names(bare) if name.startswith(("decoupling", "clothing_head", "critic"))]
    assert ("image.hidden_patches", "fusion.align_image") in arrows(bare)


@pytest.mark.covers(163)
def test_interleaved_cross_attention_feeds_the_next_block():
    text = describe(model("bdam", depth=2, cross_attention="interleaved"))
    assert ("decoupling.identity_cross", "decoupling.identity_blocks") in arrows(text)
    assert "2 block(s) per stream, after every block" in text


@pytest.mark.covers(163)
@pytest.mark.parametrize("kind", ["simple", "transformer"])
def test_the_kind_of_fusion_is_that_of_the_built_module(kind):
    text = describe(model("bdam", fusion={"width": 16, "out_dim": 16, "kind": kind, "layers": 3, "align": False}))
    built = {
        "simple": ("fusion: simple, of the two", "Linear, 528"),
        "transformer": ("3 layers", "TransformerEncoder of 3"),
    }
    assert all(words in text for words in built[kind]) and "Mamba" not in text.split("## Flow")[1]
    assert "one linear map" in text


@pytest.mark.covers(163)
@pytest.mark.parametrize(
    ("protocol", "gallery"), [("image_only", "image"), ("own_text", "image, text: identity"), ("visual", "image")]
)
def test_what_an_embedding_is_computed_from_is_found_by_running_it(protocol, gallery):
    text = describe(model("bdam", protocol=protocol))
    assert f"- the image embedding is computed from: {gallery}\n" in text
    assert "- the text embedding is computed from: text: full\n" in text
    training = {(a, b) for a, b, dashed in graph(text)[1] if dashed}
    nodes = graph(text)[0]
    assert all(not nodes[b].startswith(("image embedding", "text embedding")) for _, b in training)
    assert {b for _, b in training} >= {key for key, label in nodes.items() if label.startswith("loss ")}


@pytest.mark.covers(163)
def test_a_part_that_nothing_reads_says_so():
    rows = {row[0].strip("`"): row for row in table(describe(model("bdam", clothing_loss=())), "Parts")}
    assert rows["clothing_head"][4] == "**nothing**" and rows["clothing_head"][3] == "–"
    assert rows["fusion.body"][4] == "image, text, info"


@pytest.mark.covers(163)
def test_other_methods_have_a_graph_of_their_named_parts():
    text = describe(model("irra"))
    assert {"backbone.image", "backbone.text", "classifier", "mlm.cross_attn", "mlm.classifier"} <= names(text)
    assert reads(text)["mlm"] == {"mlm.classifier"} and "text.pooled (made in the method)" in reads(text)["sdm"]
    assert reads(describe(model("irra", weights={"mlm": 0.0}))).keys() == {"sdm", "id"}
    clip = describe(model("clip"))
    assert reads(clip) == {"itc": {"image.cls", "text.pooled (full)"}}
    blocks = next(row for row in table(clip, "Parts") if row[0] == "`backbone.image.visual.transformer`")
    assert blocks[1] == "Transformer of 2" and blocks[3] == "4x9x32"


@pytest.mark.covers(163)
def test_a_frozen_tower_is_described_like_a_trained_one():
    method = model("clip")
    free = describe(method)
    for parameter in method.backbone.parameters():
        parameter.requires_grad_(False)
    assert describe(method) == free


@pytest.mark.covers(163)
def test_the_model_stays_as_it_was_and_the_text_is_the_same_each_time():
    method = model("bdam").train()
    random, weights = torch.get_rng_state(), {key: value.clone() for key, value in method.state_dict().items()}
    first = describe(method)
    assert method.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[key]) for key, value in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert not any(module._forward_hooks for module in method.modules()) and "encode_image" not in vars(method.backbone)
    assert describe(method) == first


class Odd(nn.Linear):
    pass


Odd.__name__ = 'Odd"]|`#<b>'


@pytest.mark.covers(163)
def test_names_from_the_model_are_escaped(monkeypatch):
    method = model("clip")
    method.add_module('a|b"]`#<i>', Odd(32, 32))
    plain = type(method).embed_images

    def embed(self, batch):
        image = plain(self, batch)
        return image + 0 * getattr(self, 'a|b"]`#<i>')(image)

    monkeypatch.setattr(type(method), "embed_images", embed)
    text = describe(method)
    rows = table(text, "Parts")
    assert all(len(row) == 5 for row in rows)
    assert rows[-2][0] == "`a\\|b\"]'#<i>`" and rows[-2][1] == 'Odd"\\]\\|\\`\\#&lt;b&gt;'
    nodes, _, lines = graph(text)
    assert any(
        label.startswith("a|b#quot;]#96;#35;#lt;i#gt;<br/>Odd#quot;]|#96;#35;#lt;b#gt;") for label in nodes.values()
    )
    assert all(line.count('"') in (0, 2) for line in lines)


def test_escapes_by_hand():
    assert _quoted('a "b" #1 <c>\n`d`') == "a #quot;b#quot; #35;1 #lt;c#gt; #96;d#96;"
    assert _plain("a|b*c_d<e>&\nf[g]") == "a\\|b\\*c\\_d&lt;e&gt;&amp; f\\[g\\]"
    assert _code("a`b|c\nd") == "a'b\\|c d"
