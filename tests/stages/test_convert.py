"""`convert`: published checkpoints, by the names of their tensors, and what works on them afterwards.

All state dicts are made here, 64 wide. Embeddings are compared with open_clip's own forward pass; the code that wrote
the real files runs in tests/benchmarks/parity_irra.py and parity_clip_reid.py.
"""

import json
import os

import open_clip
import pytest
import torch
import typer
from conftest import write_dataset
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import normalize
from typer.testing import CliRunner

from reidctl import tables
from reidctl.backbones.clip import ClipTokenizer
from reidctl.backbones.weights import build
from reidctl.batch import Batch, Roster
from reidctl.cli.convert import command
from reidctl.convert.assembling import convert
from reidctl.convert.heads import Told
from reidctl.convert.towers import Asked
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import build_method, load_method
from reidctl.runs import Run
from reidctl.stages import evaluate, finetune, index, interpret, search
from reidctl.stages.convert import Options, run

SIZE, WIDTH, PEOPLE = (64, 32), 64, 5
VISION = {"image_size": list(SIZE), "patch_size": 16, "width": WIDTH, "layers": 2, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 1, "layers": 2}
SENTENCES = ["A man in a red coat.", "A woman with a small blue bag and white shoes."]
SPLITS = {4: "val", 5: "val", 6: "test", 7: "test"}


@pytest.fixture(scope="module")
def theirs():
    """A CLIP by open_clip, with OpenAI's activation."""
    torch.manual_seed(3)
    return open_clip.CLIP(WIDTH, VISION, TEXT, quick_gelu=True).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("convert") / "blocks", people=8, splits=SPLITS)


def state(theirs):
    return {name: value.clone() for name, value in theirs.state_dict().items()}


def towers(theirs, prefix="base_model."):
    """The names of IRRA and its relatives, whose CLIP has no temperature."""
    return {prefix + name: value for name, value in state(theirs).items() if name not in ("logit_scale", "attn_mask")}


class Block(nn.Module):
    """OpenAI's residual attention block."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 1)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x):
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen)[0]
        inner = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](inner * torch.sigmoid(1.702 * inner))


class IrraHeads(nn.Module):
    """IRRA's heads under the names of its code, with a plain forward pass."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(WIDTH, PEOPLE)
        self.cross_attn = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        self.cross_modal_transformer = nn.ModuleDict({"resblocks": nn.ModuleList([Block(), Block(), Block()])})
        self.ln_pre_t, self.ln_pre_i, self.ln_post = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.mlm_head = nn.ModuleDict(
            {"dense": nn.Linear(WIDTH, WIDTH), "ln": nn.LayerNorm(WIDTH), "fc": nn.Linear(WIDTH, 49408)}
        )

    def forward(self, words, looks):
        seen = self.ln_pre_i(looks)
        x = self.cross_attn(self.ln_pre_t(words), seen, seen)[0].transpose(0, 1)
        for block in self.cross_modal_transformer["resblocks"]:
            x = block(x)
        inner = self.mlm_head["dense"](self.ln_post(x.transpose(0, 1)))
        return self.mlm_head["fc"](self.mlm_head["ln"](inner * torch.sigmoid(1.702 * inner)))


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(4)
    return IrraHeads().eval()


def irra(theirs, heads, **changes):
    return {**towers(theirs), **{name: value.clone() for name, value in heads.state_dict().items()}, **changes}


def rde(theirs):
    torch.manual_seed(5)

    def mlp(name):
        layers = {"layers.0": nn.Linear(WIDTH, 8), "layers.1": nn.Linear(8, 16)}
        layers |= {"bns.0": nn.BatchNorm1d(8), "bns.1": nn.BatchNorm1d(16)}
        each = {part: layer.state_dict() for part, layer in layers.items()}
        return {f"{name}.mlp.{part}.{n}": v for part, held in each.items() for n, v in held.items()}

    found = {**towers(theirs), **mlp("visul_emb_layer"), **mlp("texual_emb_layer")}
    for name in ("visul_emb_layer.linear", "visul_emb_layer.fc", "texual_emb_layer.linear"):
        found |= {f"{name}.{n}": v for n, v in nn.Linear(WIDTH, 16).state_dict().items()}
    return found


def clip_reid(theirs, cameras=0, trained=7, **more):
    """CLIP-ReID's names: neither temperature nor table of words, but the sentence's own embeddings."""
    torch.manual_seed(6)
    own = state(theirs)
    table = own["token_embedding.weight"]
    ids = torch.zeros(77, dtype=torch.long)
    tokens = ClipTokenizer()(["A photo of a X X X X person."]).ids[0]
    ids[: len(tokens)] = tokens
    found = {f"image_encoder.{n.removeprefix('visual.')}": v for n, v in own.items() if n.startswith("visual.")}
    text = ("transformer.", "positional_embedding", "ln_final.", "text_projection")
    found |= {f"text_encoder.{name}": value for name, value in own.items() if name.startswith(text)}
    found |= {
        "prompt_learner.cls_ctx": torch.randn(PEOPLE, 4, WIDTH),
        "prompt_learner.token_prefix": table[ids[None, :5]],
        "prompt_learner.token_suffix": table[ids[None, 9:]],
        "classifier.weight": torch.randn(PEOPLE, WIDTH),
        "classifier_proj.weight": torch.randn(PEOPLE, WIDTH),
    }
    for name in ("bottleneck", "bottleneck_proj"):
        norm = nn.BatchNorm1d(WIDTH)
        norm.num_batches_tracked.fill_(trained)
        found |= {f"{name}.{n}": v for n, v in norm.state_dict().items()}
    return found | ({"cv_embed": torch.randn(cameras, WIDTH)} if cameras else {}) | more


def saved(tmp_path, weights, name="best.pth"):
    torch.save({"model": weights, "epoch": 3, "num_epoch": 60}, tmp_path / name)
    return tmp_path / name


def read(path, *, form="auto", told=None, words=None, **asked):
    return convert(path, form=form, asked=Asked(**{"image_size": SIZE, **asked}), told=told or Told(), words=words)


def pictures():
    torch.manual_seed(7)
    return torch.randn(2, 3, *SIZE)


def assert_same_towers(theirs, method):
    """Images and texts embed as by open_clip's own forward pass."""
    with torch.no_grad():
        image = normalize(theirs.encode_image(pictures()), dim=-1)
        text = normalize(theirs.encode_text(open_clip.get_tokenizer("ViT-B-16")(SENTENCES)), dim=-1)
        batch = Batch(image=pictures(), texts={"full": method.backbone.tokenize(SENTENCES)})
        assert torch.allclose(method.embed_images(batch)[:, :WIDTH], image, atol=1e-5)
        assert torch.allclose(method.embed_texts(batch)[:, :WIDTH], text, atol=1e-5)


@pytest.mark.covers(41)
@pytest.mark.parametrize("wrapper", ["", "module.", "model.module."])
def test_irra_embeds_as_open_clip_and_guesses_words_as_its_code(tmp_path, theirs, heads, wrapper):
    weights = {wrapper + name: value for name, value in irra(theirs, heads).items()}
    found = read(saved(tmp_path, weights))
    method = found.method
    assert (found.form.name, method.name, found.persons, method.config.mlm_layers) == ("irra", "irra", PEOPLE, 3)
    assert (found.taken, found.dropped, found.initial) == (len(weights), {}, [])
    assert_same_towers(theirs, method)
    words, looks = torch.randn(2, 9, WIDTH), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        expected = heads(words, looks)
        assert torch.allclose(method.mlm.logits(method.mlm(words, looks)), expected, atol=1e-4)
        assert torch.equal(method.classifier(words[0]), heads.classifier(words[0]))
    assert method.backbone.config.quick_gelu and method.backbone.config.interpolation == "bilinear"


def test_half_precision_becomes_float32_with_the_same_numbers(tmp_path, theirs, heads):
    halved = {name: value.half() for name, value in irra(theirs, heads).items()}
    method = read(saved(tmp_path, halved)).method
    own = method.state_dict()
    assert all(value.dtype == torch.float32 for value in own.values())
    assert torch.equal(own["classifier.weight"], halved["classifier.weight"].float())


def test_irra_without_a_head_gets_no_loss_for_it_and_says_so(tmp_path, theirs, heads):
    bare = {name: value for name, value in irra(theirs, heads).items() if name.startswith("base_model.")}
    found = read(saved(tmp_path, bare), form="irra", told=Told(persons=9))
    assert found.method.config.weights == {"id": 0.0, "mlm": 0.0} and found.persons == 9
    assert found.initial == ["classifier.weight", "classifier.bias"]
    assert sum("no head" in note for note in found.notes) == 2
    assert_same_towers(theirs, found.method)


@pytest.mark.covers(41)
def test_rde_finds_both_embeddings_and_drops_what_its_code_never_calls(tmp_path, theirs):
    weights = rde(theirs)
    found = read(saved(tmp_path, weights))
    assert (found.form.name, found.method.name, found.method.config.width) == ("rde", "rde", 16)
    unused = {name for name in weights if "mlp.bns.1." in name or name.startswith("visul_emb_layer.linear")}
    assert set(found.dropped) == unused and len(unused) == 12 and found.taken == len(weights) - 12
    own = found.method.state_dict()
    for ours, name in (
        ("tse_image.linear.weight", "visul_emb_layer.fc.weight"),
        ("tse_image.hidden.bias", "visul_emb_layer.mlp.layers.0.bias"),
        ("tse_image.norm.running_var", "visul_emb_layer.mlp.bns.0.running_var"),
        ("tse_text.linear.weight", "texual_emb_layer.linear.weight"),
        ("tse_text.out.weight", "texual_emb_layer.mlp.layers.1.weight"),
    ):
        assert torch.equal(own[ours], weights[name]), ours
    bge = {"full": found.method.backbone.tokenize(SENTENCES)}
    with torch.no_grad():
        vectors = found.method.embed_images(Batch(image=pictures(), texts=bge))[:, :WIDTH]
        expected = normalize(theirs.encode_image(pictures()), dim=-1) / 2**0.5
    assert torch.allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("prefix", ["base_model.", ""])
def test_a_clip_trained_on_luperson_is_a_clip_with_openais_activation(tmp_path, theirs, prefix):
    found = read(saved(tmp_path, towers(theirs, prefix)), form="auto" if prefix else "mllm4text")
    assert (found.form.name, found.method.name) == ("mllm4text", "clip")
    assert_same_towers(theirs, found.method)


@pytest.mark.covers(41, 106)
def test_a_plain_clip_has_its_file_as_spec_and_its_activation_is_said_to_be_a_guess(tmp_path, theirs):
    save_file(state(theirs), tmp_path / "clip.safetensors")
    found = read(tmp_path / "clip.safetensors")
    assert (found.form.name, found.method.name) == ("open-clip", "clip")
    assert set(found.dropped) == {"logit_scale"}
    assert found.method.backbone.config.spec.endswith(str(tmp_path / "clip.safetensors"))
    assert not found.method.backbone.config.quick_gelu
    assert any("taken as GELU" in note and "-quickgelu" in note for note in found.notes)


class Archive(nn.Module):
    """Holds a CLIP under its names, as OpenAI's TorchScript files do."""

    def __init__(self, model):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return x


@pytest.mark.covers(41)
def test_openais_archive_is_read_without_running_it(tmp_path, theirs):
    torch.jit.trace(Archive(theirs), torch.zeros(1)).save(str(tmp_path / "ViT.pt"))
    found = read(tmp_path / "ViT.pt")
    assert found.form.name == "open-clip" and found.method.backbone.config.quick_gelu
    assert not any("activation" in note for note in found.notes)
    assert_same_towers(theirs, found.method)


def test_open_clips_other_layout_and_a_named_model_are_read(tmp_path):
    torch.manual_seed(3)
    micro = build("clip:micro")
    weights = {n.removeprefix("image.").removeprefix("text."): v for n, v in micro.state_dict().items()}
    save_file(weights, tmp_path / "micro.safetensors")
    with pytest.raises(UsageError, match=r"32 wide.*--model"):
        read(tmp_path / "micro.safetensors")
    found = read(tmp_path / "micro.safetensors", model="micro")
    batch = Batch(image=pictures())
    with torch.no_grad():
        expected = normalize(micro.eval().encode_image(pictures()).cls[:, 0], dim=-1)
        assert torch.equal(found.method.embed_images(batch), expected)


@pytest.mark.covers(41)
def test_clip_reid_compares_images_and_prompts_as_its_code(tmp_path, theirs):
    save_file(state(theirs), tmp_path / "words.safetensors")
    weights = clip_reid(theirs)
    found = read(saved(tmp_path, weights), words=tmp_path / "words.safetensors")
    method = found.method
    assert (found.form.name, method.name, found.persons) == ("clip-reid", "clip-reid", PEOPLE)
    assert set(found.dropped) == {"prompt_learner.token_prefix", "prompt_learner.token_suffix"}
    assert method.backbone.mean == (0.5, 0.5, 0.5)
    assert_same_towers(theirs, method)
    visual = theirs.visual
    hooked = []
    visual.ln_post.register_forward_hook(lambda module, given, made: hooked.append(made))
    with torch.no_grad():
        projected = theirs.encode_image(pictures())
        hidden = hooked[0] if hooked[0].dim() == 2 else hooked[0][:, 0]
        expected = normalize(torch.cat([hidden, projected], dim=-1), dim=-1)
        assert torch.allclose(method.embed_tasks(Batch(image=pictures()))["i2i"], expected, atol=1e-5)
        assert torch.allclose(method.prompt_features(torch.arange(PEOPLE)), prompts(theirs, weights), atol=1e-5)
    assert torch.equal(method.state_dict()["necks.0.proj.classifier.weight"], weights["classifier_proj.weight"])


def prompts(theirs, weights):
    """TextEncoder of its code, in plain words: sentence, positions, Transformer, norm, the end token, projection."""
    every = (PEOPLE, -1, -1)
    prefix, suffix = (weights[f"prompt_learner.token_{part}"].expand(*every) for part in ("prefix", "suffix"))
    x = torch.cat([prefix, weights["prompt_learner.cls_ctx"], suffix], dim=1) + theirs.positional_embedding
    x = theirs.ln_final(theirs.transformer(x, attn_mask=theirs.attn_mask))
    end = len(ClipTokenizer()(["A photo of a X X X X person."]).ids[0]) - 1
    return x[:, end] @ theirs.text_projection


def test_without_a_table_of_words_only_the_sentences_own_are_known(tmp_path, theirs):
    weights = clip_reid(theirs)
    found = read(saved(tmp_path, weights))
    assert any("image to image works" in note and "--words" in note for note in found.notes)
    with torch.no_grad():
        assert torch.allclose(found.method.prompt_features(torch.arange(PEOPLE)), prompts(theirs, weights), atol=1e-5)
    save_file({n: v + 0.1 for n, v in state(theirs).items()}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"not those of .*best\.pth: \d+ of \d+ differ"):
        read(tmp_path / "best.pth", words=tmp_path / "other.safetensors")


def test_cameras_keep_their_vectors_under_their_names(tmp_path, theirs):
    weights = clip_reid(theirs, cameras=3)
    path = saved(tmp_path, weights)
    found = read(path, told=Told(cameras=("m/c2", "m/c10", "m/c1")))
    assert found.method.roster.cameras == ("m/c1", "m/c10", "m/c2")
    expected = weights["cv_embed"][[2, 1, 0]]
    assert torch.equal(found.method.state_dict()["camera_vectors"], expected)
    unnamed = read(path)
    assert any("--cameras" in note for note in unnamed.notes)
    assert torch.equal(unnamed.method.state_dict()["camera_vectors"], weights["cv_embed"])
    with pytest.raises(UsageError, match=r"names 2 cameras; .* vectors of 3"):
        read(path, told=Told(cameras=("m/c1", "m/c2")))
    with pytest.raises(UsageError, match="tells no cameras apart"):
        read(saved(tmp_path, clip_reid(theirs), "plain.pth"), told=Told(cameras=("m/c1",)))


def test_a_file_of_stage_one_is_told_from_one_of_stage_two(tmp_path, theirs):
    first, second = (read(saved(tmp_path, clip_reid(theirs, trained=count))) for count in (0, 7))
    assert any("stage 1" in note for note in first.notes) and not any("stage 1" in note for note in second.notes)


def test_our_own_mta_clip_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    roster = Roster(("a", "b"), ((0, 1, 2), (3, 4)))
    settings = {"n_id_tokens": 2, "sga": {"groups": 4, "gamma_init": 0.1}, "unfreeze_blocks": "all"}
    own = build_method("mta-clip", settings, build("clip:micro"), 5, roster).eval()
    path = saved(tmp_path, {f"module.{name}": value for name, value in own.state_dict().items()})
    found = read(path, model="micro")
    assert found.form.name == "mta-clip" and found.method.config.sga.groups == 4
    assert found.method.roster.people == roster.people and any("No code of MTA-CLIP" in note for note in found.notes)
    batch = Batch(image=pictures())
    with torch.no_grad():
        for task, vectors in own.embed_tasks(batch).items():
            assert torch.equal(found.method.embed_tasks(batch)[task], vectors)
        for group in (0, 1):
            assert torch.equal(found.method.group_texts(group), own.group_texts(group))


def test_clip_reids_names_with_prompts_of_datasets_are_an_mta_clip(tmp_path, theirs):
    weights = clip_reid(theirs)
    for name in [name for name in weights if name.startswith(("classifier", "bottleneck"))]:
        value, (head, _, rest) = weights.pop(name), name.partition(".")
        parts = value.split([3, 2]) if head.startswith("classifier") else (value, value.clone())
        weights |= {f"{head}.{number}.{rest}": part for number, part in enumerate(parts)}
    weights |= {
        "prompt_learner.shared_ctx": torch.randn(3, WIDTH),
        "prompt_learner.domain_ctx": torch.randn(2, 6, WIDTH),
    }
    found = read(saved(tmp_path, weights))
    hcp = found.method.config.hcp
    assert (found.form.name, hcp.n_shared, hcp.n_domain, found.method.config.sga.enabled) == ("mta-clip", 3, 6, False)
    assert found.method.roster.people == ((0, 1, 2), (3, 4))
    assert torch.equal(found.method.context.domain, weights["prompt_learner.domain_ctx"])


# Sizes


def test_the_image_size_is_what_the_code_trains_with_where_the_table_fits_it(tmp_path, theirs, heads):
    weights = irra(theirs, heads)
    table = torch.randn(1 + 24 * 8, WIDTH)
    weights["base_model.visual.positional_embedding"] = table
    found = read(saved(tmp_path, weights), image_size=None)
    backbone = found.method.backbone
    assert (backbone.image_size, backbone.grid, backbone.config.stride) == ((384, 128), (24, 8), None)
    assert any("384x128" in note for note in found.notes)
    weights["base_model.visual.positional_embedding"] = torch.randn(1 + 31 * 10, WIDTH)
    backbone = read(saved(tmp_path, weights), image_size=None).method.backbone
    assert (backbone.image_size, backbone.grid, backbone.config.stride) == ((384, 128), (31, 10), 12)


def test_a_square_table_is_resampled_to_the_size_that_is_asked_for(tmp_path, theirs):
    weights = state(theirs)
    weights["visual.positional_embedding"] = torch.randn(1 + 49, WIDTH)
    path = saved(tmp_path, weights)
    assert read(path, image_size=None).method.backbone.image_size == (112, 112)
    found = read(path)
    assert found.method.backbone.grid == (4, 2) and any("from 7x7 to 4x2" in note for note in found.notes)
    expected = build_resampled(path)
    assert torch.equal(found.method.backbone.image.visual.positional_embedding, expected)


def build_resampled(path):
    from reidctl.backbones.checkpoints import resize_positions

    return resize_positions(torch.load(path, weights_only=True)["model"]["visual.positional_embedding"], (7, 7), (4, 2))


def test_a_table_of_no_known_size_asks_for_one(tmp_path, theirs, heads):
    weights = irra(theirs, heads)
    weights["base_model.visual.positional_embedding"] = torch.randn(1 + 13, WIDTH)
    with pytest.raises(DataError, match=r"13 patches, which is no square and not what 384x128") as caught:
        read(saved(tmp_path, weights), image_size=None)
    assert "--image-size" in caught.value.hint


# Refusals


def missing(theirs, heads):
    return {name: value for name, value in irra(theirs, heads).items() if "resblocks.1.mlp" not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"extra.weight": torch.zeros(1), "extra.bias": torch.zeros(1)},
            r"2 of the \d+ tensors .* extra\.weight, extra",
        ),
        ({"mlm_head.ln.weight": torch.zeros(3)}, r"1 of another shape \(mlm\.ln\.weight \(3,\) for \(64,\)\)"),
        ({"base_model.visual.layer1.0.conv1.weight": torch.zeros(1)}, "ResNet image tower"),
    ],
)
def test_tensors_that_do_not_fit_are_counted_and_named(tmp_path, theirs, heads, change, message):
    with pytest.raises(DataError, match=message):
        read(saved(tmp_path, irra(theirs, heads, **change)))


def test_missing_tensors_and_missing_towers_are_counted(tmp_path, theirs, heads):
    with pytest.raises(DataError, match="12 missing"):
        read(saved(tmp_path, missing(theirs, heads)))
    bare = {name: value for name, value in irra(theirs, heads).items() if not name.startswith("base_model.token")}
    with pytest.raises(DataError, match="lacks 1 of 6 tensors that tell its sizes"):
        read(saved(tmp_path, bare))


@pytest.mark.parametrize(
    ("form", "message"),
    [("clip-reid", r"\d+ of the \d+ tensors .* no place in CLIP-ReID"), ("mllm4text", "no place in MLLM4Text")],
)
def test_another_code_than_the_one_that_wrote_it_is_refused(tmp_path, theirs, heads, form, message):
    with pytest.raises(DataError, match=message) as caught:
        read(saved(tmp_path, irra(theirs, heads)), form=form)
    assert "--from" in caught.value.hint


def test_people_that_contradict_the_file_and_unknown_forms_are_usage_errors(tmp_path, theirs, heads):
    path = saved(tmp_path, irra(theirs, heads))
    with pytest.raises(UsageError, match=r"--persons 9, but .* 5 people"):
        read(path, told=Told(persons=9))
    with pytest.raises(UsageError, match="--from tbps` is not known"):
        read(path, form="tbps")
    with pytest.raises(UsageError, match="--words is for"):
        read(path, words=path)


def test_files_that_hold_code_or_nothing_are_refused_and_nothing_is_written(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    torch.save({"model": {"base_model.visual.proj": Bomb()}}, tmp_path / "bomb.pth")
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pth")
    torch.save({"model": {"encoder.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    for name, message in (
        ("bomb.pth", "would run code"),
        ("empty.pth", "no tensors by name"),
        ("other.pth", r"1 tensors of no known code \(first: encoder.weight\)"),
        ("absent.pth", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            run(Run(tmp_path / "run"), tmp_path / name, Options())
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "run").exists()


# The run


@pytest.fixture(scope="module")
def converted(tmp_path_factory, theirs, heads):
    folder = tmp_path_factory.mktemp("converted")
    path = saved(folder, irra(theirs, heads))
    return Run(folder / "run"), path, run(Run(folder / "run"), path, Options(image_size=SIZE))


def test_the_record_says_what_is_known_and_what_is_not(converted):
    one, path, record = converted
    assert (record["stage"], record["status"], record["source"], record["form"]) == (
        "finetune", "done", "convert", "irra",
    )  # fmt: skip
    assert (record["train_people"], record["selected_on"]) == (PEOPLE, "unknown")
    assert "whom it was trained on" in record["seen_note"] and "test split" in record["seen_note"]
    assert record["start"] == str(path.resolve())
    assert any("whom it was trained on" in note for note in record["notes"])
    assert any("chooses on the test split" in note for note in record["notes"])
    assert len(tables.read_table(one.table("finetune", "seen"), "seen")) == 0
    assert json.loads((one.path / "finetune" / "stage.json").read_text())["settings"]["convert"]["image_size"] == [
        64,
        32,
    ]
    assert load_method(one.stage_dir("finetune")).name == "irra"


def test_the_same_file_and_options_are_up_to_date_and_others_are_not(converted, tmp_path, theirs, heads):
    one, path, _ = converted
    assert run(one, path, Options(image_size=SIZE))["status"] == "up-to-date"
    assert run(one, path, Options(image_size=SIZE, persons=PEOPLE))["status"] == "done"
    assert run(one, path, Options(image_size=SIZE))["status"] == "done"
    other = saved(tmp_path, irra(theirs, heads, **{"classifier.bias": torch.ones(PEOPLE)}))
    assert run(Run(tmp_path / "run"), path, Options(image_size=SIZE))["status"] == "done"
    assert run(Run(tmp_path / "run"), other, Options(image_size=SIZE))["status"] == "done"


def test_search_evaluate_and_interpret_work_on_it(converted, data):
    one, _, _ = converted
    assert index.run(one, data=data)["status"] == "done"
    hits = search.run(one, text="A person wears a red shirt.", top=3)["results"]
    assert len(hits) == 3
    record = evaluate.run(one, data=data)
    assert 0 <= record["metrics"]["t2i"]["rank1"] <= 1
    assert interpret.run(one, data=data, samples=1)["status"] == "done"


def test_a_training_starts_from_its_towers(converted, data, tmp_path):
    one, _, record = converted
    recipe = {
        "method": {"name": "irra", "mlm_layers": 1},
        "backbone": {"spec": record["towers"]["spec"], "image_size": list(SIZE), "start": str(one.path)},
        "train": {"epochs": 0, "batch": 6, "instances": 2, "device": "cpu", "workers": 0},
    }
    finetune.run(Run(tmp_path / "run"), recipe, data=data)
    before, after = (load_method(each.stage_dir("finetune")) for each in (one, Run(tmp_path / "run")))
    own = dict(after.backbone.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in before.backbone.named_parameters())


def test_a_run_with_a_training_of_its_own_is_left_alone(tmp_path, converted, data):
    _, path, _ = converted
    one = Run(tmp_path / "run")
    recipe = {"method": {"name": "clip"}, "backbone": {"spec": "clip:micro"}, "train": {"epochs": 0, "device": "cpu"}}
    before = finetune.run(one, recipe, data=data)
    with pytest.raises(UsageError, match="was trained there"):
        run(one, path, Options(image_size=SIZE))
    assert one.record("finetune")["fingerprint"] == before["fingerprint"]
    assert run(one, path, Options(image_size=SIZE), force=True)["form"] == "irra"


def test_the_command_says_what_was_taken_and_what_to_type_next(tmp_path, theirs):
    app = typer.Typer()
    app.command()(command)
    runner = CliRunner()
    path, folder, taken = saved(tmp_path, rde(theirs)), tmp_path / "run", len(rde(theirs)) - 12
    given = [str(path), "--run", str(folder), "--image-size", "64", "32", "--quiet"]
    shown = runner.invoke(app, given, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "is rde: rde" in shown.stdout and f"tensors: {taken} taken, 12 dropped, 0 missing" in shown.stdout
    assert "dropped visul_emb_layer.linear.weight: its code never calls this layer" in shown.stdout
    assert "to train on: reidctl finetune --method rde --set 'backbone.start=" in shown.stdout
    assert "--set 'backbone.image_size=[64, 32]'" in shown.stdout
    again = json.loads(runner.invoke(app, [*given, "--json"], catch_exceptions=False).stdout)
    assert (again["status"], again["form"], again["taken"]) == ("up-to-date", "rde", taken)
    assert again["towers"]["grid"] == [4, 2] and again["towers"]["activation"] == "QuickGELU"


@pytest.mark.covers(106)
def test_a_plain_clip_leaves_towers_for_backbone_spec(tmp_path):
    torch.manual_seed(3)
    micro = build("clip:micro", image_size=(64, 48))  # 4x3 patches: no square
    weights = {n.removeprefix("image.").removeprefix("text."): v for n, v in micro.state_dict().items()}
    torch.save(weights, tmp_path / "micro.pt")
    one = Run(tmp_path / "run")
    record = run(one, tmp_path / "micro.pt", Options(model="micro", image_size=(64, 48)))
    assert record["start"] is None and "finetune/clip.safetensors" in record["outputs"]
    towers = build(f"clip:micro/{one.path}/finetune/clip.safetensors", image_size=(64, 48))
    own = towers.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in micro.state_dict().items())
    # The file tells the grid of its table, so that another image size can be asked for.
    assert build(f"clip:micro/{one.path}/finetune/clip.safetensors").grid == (4, 2)


def test_whoever_measures_it_or_its_descendants_is_told_that_nobody_knows_whom_it_saw(converted, data, tmp_path):
    one, _, record = converted
    notes = evaluate.run(one, data=data, force=True)["notes"]
    assert notes[0] == record["seen_note"] and not any("another dataset" in note for note in notes)
    recipe = {
        "method": {"name": "clip"},
        "backbone": {"spec": record["towers"]["spec"], "image_size": list(SIZE), "start": str(one.path)},
        "train": {"epochs": 0, "batch": 6, "instances": 2, "device": "cpu", "workers": 0},
    }
    assert finetune.run(Run(tmp_path / "run"), recipe, data=data)["seen_note"] == record["seen_note"]
    assert record["seen_note"] in evaluate.run(Run(tmp_path / "run"), data=data)["notes"]


def test_a_wrong_rule_for_parameters_leaves_the_old_training_as_it_was(data, tmp_path):
    recipe = {"method": {"name": "clip"}, "backbone": {"spec": "clip:micro"}, "train": {"epochs": 0, "device": "cpu"}}
    one = Run(tmp_path / "run")
    before = finetune.run(one, recipe, data=data)
    recipe["train"]["groups"] = [{"match": "no such name", "factor": 2.0}]
    with pytest.raises(UsageError, match="found in no name"):
        finetune.run(one, recipe, data=data)
    assert one.record("finetune")["fingerprint"] == before["fingerprint"]
