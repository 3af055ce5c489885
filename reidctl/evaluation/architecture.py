"""What a built model is made of, as Markdown: a flow graph, its parts with sizes and shapes, and who reads what.

Nothing is taken from a drawing of the method. The model runs on a small batch of noise; the output of every part is cut
off from what made it, and the next part's autograd graph tells which of the cut ends it depends on. So an ablated part
is not in the graph, and a loss is joined to the very features it reads.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from reidctl.backbones.base import TextTower
from reidctl.batch import Batch
from reidctl.evaluation.efficiency import example_batch, graph_leaves
from reidctl.layers.decoupling import Decoupling
from reidctl.layers.fusion import Fusion
from reidctl.layers.mamba import Mamba
from reidctl.methods.base import Method

_BATCH = 4
_TEXT_LENGTH = 12
_SHAPES = {
    "input": ('(["', '"])'),
    "module": ('["', '"]'),
    "feature": ('("', '")'),
    "loss": ('{{"', '"}}'),
    "output": ('[["', '"]]'),
}
_INTRODUCTION = (
    "Boxes are modules, rounded boxes the features they hand on, hexagons losses, double boxes what is retrieved. An "
    "arrow is a path on which gradients flow, found by running the model: what is read as a constant has none. Dashed "
    "arrows exist in training only. A part is one box however often it runs, so a path may join arrows of different "
    "runs. Shapes are those of a batch of {batch} images and texts of {length} tokens."
)


@dataclass(frozen=True)
class _Part:
    """One row of the table: a module with everything below it, or only the parameters that it holds itself."""

    name: str
    module: nn.Module
    whole: bool
    parameters: int


def describe(method: Method) -> str:
    """Return a Markdown document about a built model: facts, a mermaid flow graph, its parts, its losses.

    The parts are disjoint and complete: their parameter counts add up to the model's. The model is not changed.

    Args:
        method: trained or not; it runs in evaluation mode on the CPU, on noise.
    """
    model = copy.deepcopy(method).cpu().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # a frozen part would have no gradient to follow
    length = min(model.backbone.context_length, _TEXT_LENGTH)
    parts = list(_parts(model))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        batch = example_batch(model, _BATCH, text_length=length)
        readers = _readers(model, batch)
        trace = _Trace(model, parts)
        trace.run(batch)
    total = sum(part.parameters for part in parts)
    sections = [
        f"# `{_code(model.name)}`: {_plain(model.summary)}",
        f"{total:,} parameters on {_plain(model.backbone.config.spec)}.",
        "\n".join(f"- {fact}" for fact in [*_facts(model), *_embedding_facts(trace)]),
        "## Flow",
        _INTRODUCTION.format(batch=_BATCH, length=length),
        trace.mermaid(),
        "## Parts",
        _parts_table(parts, trace.shapes, readers),
        "## Losses",
        _losses_table(model, trace),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _parts(model: nn.Module) -> Iterator[_Part]:
    """The disjoint parts of a model in order; a parameter with two owners belongs to the first."""
    seen: set[int] = set()

    def count(parameters: Iterable[nn.Parameter]) -> int:
        fresh = {id(parameter): parameter.numel() for parameter in parameters if id(parameter) not in seen}
        seen.update(fresh)
        return sum(fresh.values())

    def walk(name: str, module: nn.Module) -> Iterator[_Part]:
        if name and not _opens(name, module):
            yield _Part(name, module, True, count(module.parameters()))
            return
        own = count(module.parameters(recurse=False))
        if own:
            yield _Part(name, module, False, own)
        for child, inner in module.named_children():
            yield from walk(f"{name}.{child}" if name else child, inner)

    yield from (part for part in walk("", model) if part.parameters)


def _opens(name: str, module: nn.Module) -> bool:
    """Whether a module is shown as its children: our own composites, and the towers down to their stacks of blocks."""
    depth = 4 if name.split(".")[0] == "backbone" else 2
    ours = not isinstance(module, (nn.ModuleList, nn.Sequential)) and not type(module).__module__.startswith("torch.")
    return ours and name.count(".") + 1 < depth and any(True for _ in module.children())


def _readers(model: Method, batch: Batch) -> dict[str, set[int]]:
    """Which parameters each use of the model depends on: `image`, `text`, and every loss."""
    outputs = {"image": model.embed_images(batch), "text": model.embed_texts(batch)}
    for stage in model.stages:
        for name, value in model.losses(batch, stage).items():
            outputs[_loss_key(model, stage, name)] = value
    return {key: graph_leaves(value) for key, value in outputs.items()}


def _loss_key(model: Method, stage: str, name: str) -> str:
    return f"loss {name}" if len(model.stages) == 1 else f"loss {name} ({stage})"


@dataclass
class _Node:
    label: str
    kind: str
    group: str = ""
    shape: str = ""


class _Trace:
    """Runs a model with cut outputs and collects the graph."""

    def __init__(self, model: Method, parts: Sequence[_Part]) -> None:
        self.model = model
        self.nodes: dict[str, _Node] = {}
        self.edges: dict[tuple[str, str], set[str]] = {}  # with the runs that they were seen in
        self.shapes: dict[str, str] = {}
        self._leaves: list[tuple[Tensor, str]] = []
        self._run = ""
        self._role = ""
        self._roles: dict[int, str] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(self._note_shape(name))
        # A second text tower is one box, like the backbone's.
        closed = {"backbone", *(name for name, module in model.named_children() if isinstance(module, TextTower))}
        opened = {n: m for n, m in model.named_children() if _opens(n, m) and n not in closed - {"backbone"}}
        for part in parts:
            top = part.name.split(".")[0]
            if part.whole and top not in closed:
                self._watch(part, group=top if top in opened else "")
        for name, module in opened.items():
            if name != "backbone":
                module.register_forward_hook(self._cut_structure(name, name))
        self._watch_towers()

    def run(self, batch: Batch) -> None:
        """Trace both embeddings, then every loss."""
        self._roles = {id(tokens.ids): role for role, tokens in batch.texts.items()}
        for key, label, run in (
            ("image", "image embedding", self.model.embed_images),
            ("text", "text embedding", self.model.embed_texts),
        ):
            output = run(self._start(batch, key))
            self.nodes[key] = _Node(label, "output", shape=_shape(output))
            self._link(output, key)
        for stage in self.model.stages:
            found = self.model.losses(self._start(batch, "losses"), stage)
            for name, value in found.items():
                key = _loss_key(self.model, stage, name)
                self.nodes[key] = _Node(f"{key}, weight {self.model.weight(name):g}", "loss")
                self._link(value, key)
        self._drop_unread()

    def sources(self, key: str) -> list[str]:
        """Labels of the nodes with an arrow to a node."""
        return [self.nodes[source].label for source, target in self.edges if target == key]

    def inputs(self, key: str) -> list[str]:
        """Labels of the inputs that an embedding is computed from in its own run."""
        reached, ahead = {key}, [key]
        while ahead:
            target = ahead.pop()
            new = [a for (a, b), runs in self.edges.items() if b == target and key in runs and a not in reached]
            reached.update(new)
            ahead += new
        return [node.label for name, node in self.nodes.items() if name in reached and node.kind == "input"]

    def mermaid(self) -> str:
        """The graph as a fenced mermaid block."""
        ids = {key: f"n{number}" for number, key in enumerate(self.nodes)}
        lines = ["```mermaid", "flowchart TD"]
        groups = list(dict.fromkeys(node.group for node in self.nodes.values()))
        for number, group in enumerate(groups):
            if group:
                lines.append(f'    subgraph g{number}["{_quoted(group)}"]')
            for key, node in self.nodes.items():
                if node.group == group:
                    opening, closing = _SHAPES[node.kind]
                    text = _quoted(node.label) + (f"<br/>{_quoted(node.shape)}" if node.shape else "")
                    lines.append(f"    {'    ' if group else ''}{ids[key]}{opening}{text}{closing}")
            if group:
                lines.append("    end")
        for (source, target), runs in self.edges.items():
            lines.append(f"    {ids[source]} {'-.->' if runs == {'losses'} else '-->'} {ids[target]}")
        return "\n".join([*lines, "```"])

    def _start(self, batch: Batch, run: str) -> Batch:
        """The batch with a cut image, and no ends of an earlier run."""
        self._run = run
        self._leaves.clear()
        image = batch.require("image")
        self.nodes.setdefault("pixels", _Node("image", "input", shape=_shape(image)))
        return dataclasses.replace(batch, image=self._cut(image, "pixels"))

    def _watch(self, part: _Part, group: str) -> None:
        members = list(part.module) if isinstance(part.module, nn.ModuleList) else [part.module]
        for member in members:
            member.register_forward_hook(self._cut_module(part, group))

    def _watch_towers(self) -> None:
        backbone = self.model.backbone
        encode_image, encode_embedded, embed = backbone.encode_image, backbone.encode_embedded, backbone.embed_tokens
        facts = {
            side: f"{name}, {len(tower.blocks)} blocks, {sum(p.numel() for p in tower.parameters()):,} parameters"
            for side, name, tower in (
                ("image", type(backbone.image).__name__, backbone.image),
                ("text", type(backbone.text).__name__, backbone.text),
            )
        }

        def tower(side: str, features: Any, role: str) -> Any:
            key = f"backbone.{side}"
            self.nodes.setdefault(key, _Node(key, "module", shape=facts[side]))
            mark = f" ({role})" if role else ""
            return self._replace(features, lambda field: f"{side}.{field}{mark}", "", maker=key)

        def image(*args: Any, **kwargs: Any) -> Any:
            return tower("image", encode_image(*args, **kwargs), "")

        def words(ids: Tensor) -> Tensor:
            self._role = self._roles.get(id(ids), "made in the method")
            key = f"words {self._role}"
            self.nodes.setdefault(key, _Node(f"text: {self._role}", "input", shape=_shape(ids)))
            return cast(Tensor, self._cut(embed(ids), key))

        def text(*args: Any, **kwargs: Any) -> Any:
            role, self._role = self._role or "prompt", ""
            return tower("text", encode_embedded(*args, **kwargs), role)

        # On the copy, an attribute of the object hides the method of its class.
        vars(backbone).update(encode_image=image, embed_tokens=words, encode_embedded=text)
        for name, module in self.model.named_children():
            if isinstance(module, TextTower):
                self._watch_prompts(name, module)

    def _watch_prompts(self, name: str, tower: TextTower) -> None:
        """A second text tower, which reads prompts: its input is what the prompts are made of."""
        encode = tower.encode_embedded
        tokens = list(self.model.named_parameters(recurse=False))
        size = f"{type(tower).__name__}, {sum(p.numel() for p in tower.parameters()):,}"

        def prompts(embeddings: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.nodes.setdefault(name, _Node(name, "module", shape=size))
            ends = graph_leaves(embeddings)
            for own, parameter in tokens:
                if id(parameter) in ends:
                    self.nodes.setdefault(own, _Node(own, "module", shape=f"Parameter, {parameter.numel():,}"))
                    self._join(own, name)
            self._link(embeddings, name)
            return self._replace(encode(embeddings, *args, **kwargs), lambda field: f"prompt.{field}", "", maker=name)

        vars(tower).update(encode_embedded=prompts)

    def _note_shape(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if type(output) is tuple and output else output
            if isinstance(first, Tensor):
                self.shapes.setdefault(name, _shape(first))

        return hook

    def _cut_module(self, part: _Part, group: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if part.name not in self.nodes:
                size = f"{_kind(part.module)}, {part.parameters:,}"
                self.nodes[part.name] = _Node(part.name, "module", group, size)
            if isinstance(output, Tensor):
                self._link(output, part.name)
                return self._cut(output, part.name)
            if type(output) is tuple:
                for value in output:
                    self._link(value, part.name)
                return tuple(self._cut(value, part.name) for value in output)
            return self._replace(output, lambda field: f"{part.name}.{field}", group, maker=part.name)

        return hook

    def _cut_structure(self, name: str, group: str) -> Callable[..., Any]:
        """For a module whose inside is shown: only a structured output adds nodes, one per field."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            return self._replace(output, lambda field: f"{name}.{field}", group)

        return hook

    def _replace(self, output: Any, key: Callable[[str], str], group: str, *, maker: str = "") -> Any:
        """A structured output with every tensor cut: a node per field, reached from `maker` or from what it reads."""
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            fields = {item.name: getattr(output, item.name) for item in dataclasses.fields(output)}
        elif hasattr(output, "_asdict"):
            fields = output._asdict()
        else:
            return output
        new = {}
        for field, value in fields.items():
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                continue
            node = key(field)
            self.nodes.setdefault(node, _Node(node, "feature", group, _shape(value)))
            self._link(value, maker or node)
            if maker:
                self._join(maker, node)
            new[field] = self._cut(value, node)
        return output._replace(**new) if hasattr(output, "_replace") else dataclasses.replace(output, **new)

    def _cut(self, value: Any, key: str) -> Any:
        """The same values with nothing behind them."""
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        leaf = value.detach().requires_grad_()
        self._leaves.append((leaf, key))
        return leaf.clone()  # whoever writes into it writes into the clone

    def _link(self, value: Any, key: str) -> None:
        """Draw an arrow from every cut end that a value depends on."""
        if not isinstance(value, Tensor):
            return
        ends = graph_leaves(value)
        for leaf, source in self._leaves:
            if id(leaf) in ends:
                self._join(source, key)

    def _join(self, source: str, target: str) -> None:
        if source != target:  # the blocks of one stack are one box
            self.edges.setdefault((source, target), set()).add(self._run)

    def _drop_unread(self) -> None:
        """Leave out features that nothing reads; none of them feeds another one that is read."""
        read = {source for source, _ in self.edges}
        self.nodes = {key: node for key, node in self.nodes.items() if node.kind != "feature" or key in read}
        self.edges = {pair: runs for pair, runs in self.edges.items() if set(pair) <= set(self.nodes)}


def _facts(model: Method) -> list[str]:
    """What the graph does not say in words, read off the built modules."""
    facts = []
    for name, module in model.named_children():
        if isinstance(module, Decoupling):
            facts += _decoupling_facts(name, module)
        elif isinstance(module, Fusion):
            facts += _fusion_facts(name, module)
    protocol = getattr(model.config, "protocol", None)
    if protocol is not None:
        facts.append(f"protocol: {_plain(protocol)}")
    facts.append(f"texts that the gallery side reads: {', '.join(map(_plain, model.gallery_texts)) or 'none'}")
    facts.append(f"text that plays the query in training: {_plain(model.target_text)}")
    return facts


def _embedding_facts(trace: _Trace) -> list[str]:
    return [
        f"the {side} embedding is computed from: {', '.join(map(_plain, trace.inputs(side)))}"
        for side in ("image", "text")
    ]


def _decoupling_facts(name: str, module: Decoupling) -> list[str]:
    crosses = len(module.identity_cross)
    place = {"after": "after the stack", "interleaved": "after every block"}.get(module.cross_attention, "")
    return [
        f"{_plain(name)}: two streams, identity and clothing, of {len(module.identity_blocks)} self-attention block(s)",
        f"cross-attention: {f'{crosses} block(s) per stream, {place}' if crosses else 'none'}",
        f"gate between the streams: {'sigmoid, per channel' if module.gate is not None else 'none'}",
    ]


def _fusion_facts(name: str, module: Fusion) -> list[str]:
    body = module.body
    scan = [layer for layer in body.modules() if isinstance(layer, Mamba)] if body is not None else []
    sequence = module.sequence + (" (one token: no recurrence)" if scan and module.sequence == "vector" else "")
    layers = f", {len(cast(Any, body).layers)} layers" if hasattr(body, "layers") else ""
    ways = ", both directions" if any(layer.bidirectional for layer in scan) else ""
    reads = f", sequence {sequence}, {module.order.replace('_', ' ')}"
    if module.kind == "simple":
        reads = ", of the two vectors"
    deep = isinstance(module.align_image, nn.Sequential)
    return [
        f"{_plain(name)}: {module.kind if body is not None else 'no sequence model'}{layers}{ways}{reads}",
        f"gate between image and text: {'softmax over the two' if module.gate is not None else 'none, one half each'}",
        f"alignment before the fusion: {'feed-forward' if deep else 'one linear map'}",
    ]


def _parts_table(parts: Sequence[_Part], shapes: Mapping[str, str], readers: Mapping[str, set[int]]) -> str:
    lines = ["| part | class | parameters | output | read by |", "|:--|:--|--:|:--|:--|"]
    for part in parts:
        members = list(part.module.parameters()) if part.whole else list(part.module.parameters(recurse=False))
        inside = {id(parameter) for parameter in members}
        users = [key.removeprefix("loss ") for key, read in readers.items() if inside & read]
        name = f"`{_code(part.name or 'the method')}`"
        if not part.whole:
            name += " itself: " + ", ".join(f"`{_code(n)}`" for n, _ in part.module.named_parameters(recurse=False))
        shape = _part_shape(part, shapes) if part.whole else "–"
        reading = ", ".join(map(_plain, users)) or "**nothing**"
        lines.append(f"| {name} | {_plain(_kind(part.module))} | {part.parameters:,} | {shape} | {reading} |")
    lines.append(f"| **all** | | **{sum(part.parameters for part in parts):,}** | | |")
    return "\n".join(lines)


def _part_shape(part: _Part, shapes: Mapping[str, str]) -> str:
    """The shape of a part's output; of a container that is not called itself, that of its last module that is."""
    if part.name in shapes:
        return shapes[part.name]
    inside = [f"{part.name}.{name}" for name, _ in part.module.named_modules() if name]
    return next((shapes[name] for name in reversed(inside) if name in shapes), "–")


def _losses_table(model: Method, trace: _Trace) -> str:
    keys = [key for key, node in trace.nodes.items() if node.kind == "loss"]
    if not keys:
        return ""
    lines = ["| loss | weight | reads |", "|:--|--:|:--|"]
    for key in keys:
        name = key.removeprefix("loss ")
        reads = ", ".join(f"`{_code(label)}`" for label in trace.sources(key)) or "nothing that is trained"
        lines.append(f"| `{_code(name)}` | {model.weight(name.split(' (')[0]):g} | {reads} |")
    return "\n".join(lines)


def _kind(module: nn.Module) -> str:
    """A module's class in a few words."""
    if isinstance(module, nn.ModuleList):
        names = list(dict.fromkeys(type(member).__name__ for member in module))
        return f"{'/'.join(names)} x {len(module)}"
    if isinstance(module, nn.Sequential):
        return ", ".join(type(member).__name__ for member in module)
    for stack in ("layers", "resblocks"):
        blocks = getattr(module, stack, None)
        if isinstance(blocks, nn.ModuleList):
            return f"{type(module).__name__} of {len(blocks)}"
    return type(module).__name__


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _plain(text: str) -> str:
    """Text that is neither Markdown nor HTML, and no end of a table's cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)


def _code(text: str) -> str:
    """Text for between backticks in a table's cell."""
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")


def _quoted(text: str) -> str:
    """Text for between quotes in mermaid, where # begins an entity and a backtick Markdown."""
    text = " ".join(text.split()).replace("#", "#35;")
    for sign, name in (('"', "quot"), ("<", "lt"), (">", "gt"), ("`", "96")):
        text = text.replace(sign, f"#{name};")
    return text
