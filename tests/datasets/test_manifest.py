"""Own data as a table or a folder: every way to write it, and what is refused."""

import hashlib
import json
import os
import tracemalloc

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from reidctl import tables
from reidctl.datasets import manifest
from reidctl.datasets.base import Options, measure
from reidctl.datasets.formats import csv_table, folder
from reidctl.datasets.manifest import Complaints, facts_of, list_of, open_table, text_of
from reidctl.errors import DataError, UsageError
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

ROWS = [
    {
        "image": "a/1.png", "person": "0007", "split": "train", "role": "", "camera": "c1", "outfit": "o1",
        "captions": ["A man, tall.", 'He says "hi".'], "identity_text": "Tall.", "clothing_text": "Red.",
        "conditioned_on": "image", "attributes": {"hat": "yes"},
    },
    {
        "image": "b.png", "person": "8", "split": "test", "role": "query", "camera": "", "outfit": "",
        "captions": ["Käthe; two\nlines."], "identity_text": "", "clothing_text": "", "conditioned_on": "",
        "attributes": {},
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A rendered cloth-changing dataset: its folder, images and captions."""
    folder = tmp_path_factory.mktemp("rendered")
    config = SynthConfig(people=12, images_per_person=4, size=(64, 32), seed=1, variant="cloth-changing")
    write_dataset(config, folder, workers=1)
    return folder, *(tables.read_table(folder / f"{name}.parquet", name) for name in ("images", "captions"))


def read(path, **options):
    return csv_table.read(path, Options(**options))


def table(folder, text, name="t.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def facts(draft):
    return [
        (e.key, e.split, e.person, e.role, e.camera, e.outfit, dict(e.attributes), list(e.texts)) for e in draft.entries
    ]


# --- one table, four kinds of file


@pytest.mark.covers(7)
def test_csv_tsv_json_lines_and_parquet_give_the_same_entries(tmp_path):
    flat = [
        {**{k: v for k, v in row.items() if k != "attributes"}, "captions": json.dumps(row["captions"]),
         "attributes.hat": row["attributes"].get("hat", "")}
        for row in ROWS
    ]  # fmt: skip
    pd.DataFrame(flat).to_csv(tmp_path / "t.csv", index=False)
    pd.DataFrame(flat).to_csv(tmp_path / "t.tsv", index=False, sep="\t", lineterminator="\r\n")
    table(tmp_path, "\n".join(json.dumps(row) for row in ROWS), "t.jsonl")
    schema = pa.schema([(k, pa.string()) for k in ROWS[0]]).set(6, pa.field("captions", pa.list_(pa.string())))
    schema = schema.set(10, pa.field("attributes", pa.map_(pa.string(), pa.string())))
    rows = [{**row, "attributes": list(row["attributes"].items())} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "t.parquet")
    found = [facts(read(tmp_path / name)) for name in ("t.csv", "t.tsv", "t.jsonl", "t.parquet")]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0][0] == (
        "a/1.png", "train", "0007", None, "c1", "o1", {"hat": "yes"},
        [("full", "A man, tall.", "image"), ("full", 'He says "hi".', "image"), ("identity", "Tall.", "image"),
         ("clothing", "Red.", "image")],
    )  # fmt: skip
    assert found[0][1][7] == [("full", "Käthe; two\nlines.", "image")]


@pytest.mark.covers(7)
def test_what_is_written_is_read_back(rendered, tmp_path):
    source, images, captions = rendered
    for number, write in enumerate((csv_table.write, csv_table.write_parquet)):
        path = write(images, captions, source, tmp_path / str(number))
        draft = read(path, name="synthped-a")
        found = measure(draft, Options())
        for column in ("split", "role", "camera_id", "outfit_id", "person_id", "sha256", "width", "height"):
            assert list(found.images[column].fillna("")) == list(images[column].fillna("")), column
        kept = [{k: v for k, v in row.items() if v} for row in images["attributes"]]
        assert list(found.images["attributes"]) == kept
        for kind in ("full", "identity", "clothing"):
            texts, old = (frame.loc[frame["kind"] == kind] for frame in (found.captions, captions))
            assert list(texts["text"]) == list(old["text"]) and set(texts["conditioned_on"]) == {"image"}
        assert draft.problems == [] and draft.dataset == "synthped-a"


def test_a_folder_with_a_manifest_is_named_after_the_folder(rendered, tmp_path):
    source, images, captions = rendered
    csv_table.write(images, captions, source, tmp_path / "mine")
    assert read(tmp_path / "mine").dataset == "mine"
    (tmp_path / "mine" / "manifest.tsv").write_text("image\tperson\n")
    with pytest.raises(DataError, match=r"found: manifest\.csv, manifest\.tsv"):
        read(tmp_path / "mine")


@pytest.mark.covers(7)
def test_a_written_folder_keeps_people_and_pixels(rendered, tmp_path):
    source, images, captions = rendered
    out = folder.write(images, captions, source, tmp_path / "people")
    found = measure(folder.read(out, Options(name="synthped-a")), Options())
    by_hash = dict(zip(images["sha256"], images["person_id"], strict=True))
    assert {h: p for h, p in zip(found.images["sha256"], found.images["person_id"], strict=True)} == by_hash


def test_two_people_in_one_folder_name_are_refused(rendered, tmp_path):
    source, images, captions = rendered
    images = images.head(2).assign(person_id=["synthped-a:a/b", "synthped-a:a_b"])
    with pytest.raises(UsageError, match="share the folder a_b"):
        folder.write(images, captions, source, tmp_path)


def test_written_names_follow_the_ids_and_never_climb():
    rows = [("d:../../x.png", "p.png"), ("d:x.png", "p.png"), ("d:q/x", "p.jpg"), ("d:..", "p.png")]
    frame = pd.DataFrame([{"image_id": i, "path": p, "dataset": "d"} for i, p in rows])
    assert csv_table.file_names(frame) == ["x.png", "x~2.png", "q/x.jpg", "image.png"]


# --- what a user would expect


def test_integer_people_of_parquet_with_holes_in_other_columns_stay_whole(tmp_path):
    pd.DataFrame({"image": ["a.png", "b.png"], "person": [7, 8], "camera": [1.0, None]}).to_parquet(
        tmp_path / "t.parquet"
    )
    assert [(e.person, e.camera) for e in read(tmp_path / "t.parquet").entries] == [("7", "1"), ("8", None)]


def test_column_names_may_have_capitals_and_path_means_image(tmp_path):
    draft = read(table(tmp_path, "Path, Person ,Caption,Note\na.png,1,Hi.,x\n"))
    assert facts(draft)[0][::7] == ("a.png", [("full", "Hi.", "image")]) and "Columns not used: Note." in draft.notes


def test_rows_of_one_image_are_joined_whatever_its_name_looks_like(tmp_path):
    text = "image,person,split,camera,caption\na.png,1,train,c1,One.\n"
    text += "./a.png,1,,,Two.\nb\\c.png,2,test,,\nb//c.png,2,,c2,\n"
    draft = read(table(tmp_path, text))
    assert [(e.key, e.split, e.camera, len(e.texts)) for e in draft.entries] == [
        ("a.png", "train", "c1", 2), ("b/c.png", "test", "c2", 0),
    ]  # fmt: skip
    assert draft.notes == ["2 further row(s) of images listed before; their texts were joined."]


def test_an_empty_split_column_is_no_split_column(tmp_path):
    rows = "".join(f"{i}.png,{i},\n" for i in range(10))
    draft = read(table(tmp_path, "image,person,split\n" + rows))
    assert pd.Series([e.split for e in draft.entries]).value_counts().to_dict() == {"train": 7, "test": 2, "val": 1}


def test_an_empty_split_is_that_of_the_person_or_refused(tmp_path):
    draft = read(table(tmp_path, "image,person,split\na.png,1,val\nb.png,1,\n"))
    assert [e.split for e in draft.entries] == ["val", "val"] and "1 image(s) without a split" in draft.notes[0]
    path = table(tmp_path, "image,person,split\na.png,1,val\nb.png,2,\n")
    with pytest.raises(DataError, match=r"`split` is empty for 1 image\(s\).*b\.png"):
        read(path)
    draft = read(path, lenient=True)
    assert [e.key for e in draft.entries] == ["a.png"] and len(draft.problems) == 1


def test_a_lenient_reader_lists_every_problem_and_keeps_the_rest(tmp_path):
    lines = [
        b"image,person,split,captions", b"a.png,1,train,", b"../b.png,1,train,", b"c.png,,train,", b"d.png,1,dev,",
        b"e.png,1,train,[oops", b"f.png,K\xe4the,train,", b"g.png,1\0,train,", b"a.png,2,train,", b"h,1,train,,,,",
        b"i.png,3,test,\"[\"\"Fine.\"\"]\"", b'j.png,4,test,"open',
    ]  # fmt: skip
    draft = read(table(tmp_path, b"\n".join(lines)), lenient=True)
    assert [e.key for e in draft.entries] == ["a.png", "i.png"]
    pieces = [
        "leads outside",
        "`person` is empty",
        "got 'dev'",
        "not a JSON list",
        "0xE4",
        "NUL",
        "differs",
        "7 cells",
        "not closed",
    ]
    assert len(draft.problems) == len(pieces)
    for piece, problem in zip(
        pieces, sorted(draft.problems, key=lambda p: [x in p for x in pieces].index(True)), strict=True
    ):
        assert piece in problem


def test_endless_problems_are_counted(tmp_path):
    draft = read(table(tmp_path, "image,person\nok.png,1\n" + "a.png,\n" * 1500), lenient=True)
    assert len(draft.problems) == 1001 and draft.problems[-1] == "500 further rows are not as documented."


# --- recognising


@pytest.mark.parametrize("name, text", [
    ("t.csv", "path;person;split\n"), ("t.tsv", "image\tperson\tsplit\n"),
    ("t.jsonl", '{"image": "a", "person": 1, "split": "test"}'), ("manifest.csv", "image,person,split\n"),
])  # fmt: skip
def test_a_table_is_recognised_by_its_columns(tmp_path, name, text):
    path = table(tmp_path, text, name)
    root = tmp_path if name.startswith("manifest") else path
    found = csv_table.probe(root)
    assert found.folder == root and found.variant == f"table {name} of images and people with split"


def test_other_files_and_folders_are_no_tables(tmp_path):
    assert csv_table.probe(tmp_path) is None
    for name, content in (("a.csv", "id,text\n1,2\n"), ("b.csv", b"\xff\xfe"), ("c.parquet", "no"), ("d.json", "[]")):
        assert csv_table.probe(table(tmp_path, content, name)) is None


def test_folders_are_recognised_last(tmp_path):
    assert folder.probe(tmp_path) is None and folder.probe(tmp_path / "nowhere") is None
    picture(tmp_path / "anna" / "1.png")
    assert "asked last" in folder.probe(tmp_path).variant and "1 sub-folders" in folder.probe(tmp_path).variant
    picture(tmp_path / "1.png")
    assert "flat folder" in folder.probe(tmp_path).variant


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8)).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- hostile files


@pytest.mark.parametrize("content, message", [
    (b"image,person\n../../etc/passwd,1\n", "data row 1: the path '../../etc/passwd' leads outside"),
    (b"image,person\n/etc/passwd,1\n", "leads outside"),
    (b"image,person\n..\\..\\x,1\n", "leads outside"),
    (b"image,person\na/../../../x,1\n", "leads outside"),
    (b"image,person\na/../x.png,1\n", "relative to the folder; `..` and absolute paths are not allowed .got 'a/../x"),
    (b"image,person\nC:\\data\\0.png,1\n", "is an absolute path of Windows. Write the path as it continues below"),
    (b"image,person\nC:/data/0.png,1\n", "is an absolute path of Windows"),
    (b"image,person\n\\\\server\\0.png,1\n", "is an absolute path of Windows"),
    (b"image,person\ra.png,1\r", "line ends of old Macs .a carriage return alone.*Save it as CSV UTF-8"),
    (b"image,person\r" + b"a.png,1\r" * 150_000, "line ends of old Macs"),
    (b"image,person\na.png,1\rb.png,2\n", "data row 1: a carriage return stands alone"),
    (b"PK\x03\x04" + bytes(500), "is an Excel workbook .*Save it as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old Excel workbook"),
    (b"\x1f\x8b\x08", "is compressed"),
    (b"PAR1", "is Parquet under another name"),
    (b"image,person\n", r"t\.csv has no rows"),
    (b"image,person\n,\n", r"t\.csv has no rows"),
    (b"sep=;\n", "is empty"),
    (b"image,person\n..,1\n", "leads outside|not a file"),
    # 22 bytes of header, 12 of the first row, 9 before the letter
    (b"image,person,caption\r\na.png,1,ok\r\nb.png,1,K\xe4the\r\n", r"line 3 is not UTF-8 \(byte 43 of .* is 0xE4\)"),
    (b"image,person\na.png,1\0\n", r"NUL byte at offset 20 \(line 2\)"),
    ("image,person\na.png,1\n".encode("utf-16"), "UTF-16"),
    ("image,person\na.png,1\n".encode("utf-16-be"), "NUL byte"),
    (b'image,person,caption\na.png,1,"open\nb.png,2,x\n', "data row 1: a quotation mark is not closed before the end"),
    (b'image,person,caption\na.png,1,"Tall" man\n', "data row 1: not a regular row"),
    (b'image,person,caption\na.png,1,"' + b"x\n" * 70_000, "field is longer than 131,072 characters; is a quot"),
    (b"image,person\na.png,1,b,c\n", "data row 1: 4 cells, but the header has 2"),
    (b"image,image,person\na,b,1\n", "column.s. image twice"),
    (b"image,person,split\na.png,1,query\n", "Use|use the column `role`"),
    (b"x" * 5000 + b",y,z\n", "lacks the column `image`; it has: x{40}…, y, z"),
    (b"y," * 5000 + b"\n", "column.s. y twice"),
    (b"image,person\n" + b"a" * 5000 + b",1\n", "`image` has 5,000 characters"),
    (b"\n\n", "is empty"),
    (b"", "is empty"),
])  # fmt: skip
def test_a_hostile_csv_is_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read(table(tmp_path, content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("content, message", [
    (b"[1]\n", "data row 1 must be an object, not list"),
    (b"{oops\n", "data row 1 is not valid JSON"),
    (b"[" * 100_000, "data row 1 is not valid JSON"),
    (b'{"image": "a.png", "person": 1}\n{"image": "b.png"}\n', "data row 2: `person` is empty"),
    (b'{"image": {}, "person": 1}\n', "`image` must be a text, not dict"),
    (b'{"image": "a.png", "person": "\\u0000"}\n', "`person` holds a NUL byte"),
    (b'{"image": "a.png", "person": "\\ud800"}\n', "half a character"),
    (b'{"image": "a.png", "person": 1, "captions": [1]}\n', "`captions` must be a list of texts"),
    (b'{"image": "a.png", "person": 1, "attributes": 5}\n', "`attributes` is not an object"),
    (b'{"image": "a.png", "person": ' + b"9" * 5000 + b"}\n", "data row 1 holds a number of thousands of"),
    (b"", "has no rows"),
])  # fmt: skip
def test_hostile_json_lines_are_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(table(tmp_path, content, "t.jsonl"))


def test_a_path_that_is_absolute_but_inside_is_not_called_outside(tmp_path):
    path = table(tmp_path, f"image,person\n{tmp_path}/a.png,1\n")
    with pytest.raises(DataError, match=r"relative to the folder; `\.\.` and absolute paths are not allowed") as caught:
        read(path)
    assert "outside" not in str(caught.value)
    with pytest.raises(DataError, match="leads outside"):
        read(path, images=folder_of(tmp_path / "imgs"))


def folder_of(path):
    path.mkdir()
    return path


def test_a_missing_folder_of_images_is_named_and_not_its_first_image(tmp_path):
    path = table(tmp_path, "image,person\na.png,1\n")
    with pytest.raises(DataError, match=r"The images' folder .*nowhere is missing"):
        read(path, images=tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train,val", "train,"])
def test_fractions_for_a_table_with_splits_are_refused(tmp_path, split):
    first, second = split.split(",")
    path = table(tmp_path, f"image,person,split\na.png,1,{first}\nb.png,1,{second}\n")
    with pytest.raises(UsageError, match=r"t\.csv has splits, so `fractions` has no meaning.*Leave --fractions out"):
        read(path, fractions=(0.5, 0.2, 0.3))


def test_a_workbook_is_named_whatever_its_suffix(tmp_path):
    for name in ("t.xlsx", "t.csv", "t.tsv", "t.jsonl"):
        with pytest.raises(DataError, match="is an Excel workbook"):
            read(table(tmp_path, b"PK\x03\x04rest", name))


@pytest.mark.parametrize("first, separator", [("sep=;", ";"), ("SEP=,", ","), ('"sep=;"', ";"), ("sep=\t", "\t")])
def test_the_separator_that_excel_names_in_the_first_line_is_honoured(tmp_path, first, separator):
    lines = [first, separator.join(["image", "person", "a,b;c"]).replace("a,b;c", "note"), separator.join("x1n")]
    assert [(e.key, e.person) for e in read(table(tmp_path, "\r\n".join(lines))).entries] == [("x", "1")]


def test_rows_of_empty_cells_are_passed_over_counted_and_keep_their_number(tmp_path):
    text = ",,\nimage,person,split\n,,\na.png,1,test\n   \n , ,\n,,,,,\n\nb.png,2,dev\n"
    draft = read(table(tmp_path, text), lenient=True)
    assert [e.key for e in draft.entries] == ["a.png"] and "4 row(s) of empty cells passed over." in draft.notes
    assert "data row 6: `split` is none of" in draft.problems[0] and len(draft.problems) == 1


def test_a_lenient_reader_of_a_table_without_rows_leaves_it_to_the_checks(tmp_path):
    assert read(table(tmp_path, "image,person\n"), lenient=True).entries == []


def test_one_person_is_no_people(tmp_path):
    assert "1 person split" in read(table(tmp_path, "image,person\na.png,1\n")).notes[0]
    draft = read(table(tmp_path, "image,person\nok.png,1\n" + "a.png,\n" * 1001), lenient=True)
    assert draft.problems[-1] == "1 further row is not as documented."


def test_a_hundred_megabytes_in_one_field_are_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("wb") as stream:
        stream.write(b"image,person,caption\na.png,1,")
        for _ in range(100):
            stream.write(b"x" * (1 << 20))
        stream.write(b"\nb.png,2,fine\n")
    tracemalloc.start()
    with pytest.raises(DataError, match="line 2 is longer than 1 MiB"):
        read(path)
    assert [e.key for e in read(path, lenient=True).entries] == ["b.png"]
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_file_above_the_limit_is_refused_unread(tmp_path):
    path = table(tmp_path, "image,person\na.png,1\n")
    os.truncate(path, 5 << 30)  # sparse: no disk is used
    with pytest.raises(DataError, match=r"has 5\.0 GiB; the limit is 4 GiB"):
        read(path)
    os.truncate(path, 2 << 30)
    with pytest.raises(DataError, match="line 3 is longer than 1 MiB"):
        read(path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    text = "A caption. " * 40
    path = table(tmp_path, "image,person,caption\n" + f"a.png,1,{text}\n" * 20_000)
    assert path.stat().st_size > 8 << 20
    tracemalloc.start()
    assert len(read(path).entries) == 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_one_image_with_thousands_of_texts_is_refused(tmp_path):
    rows = "".join(f"a.png,1,{i}\n" for i in range(1001))
    with pytest.raises(DataError, match=r"data row 1001: a\.png has more than 1,000 texts"):
        read(table(tmp_path, "image,person,caption\n" + rows))


def test_damaged_parquet_is_refused_in_one_sentence(tmp_path):
    pd.DataFrame({"image": ["a.png"] * 500, "person": range(500)}).to_parquet(tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[:-20], b"image,person\n"):
        with pytest.raises(DataError, match="not a readable Parquet file"):
            read(table(tmp_path, content, "t.parquet"))
    pq.write_table(pa.table({"image": ["a"], "person": ["x" * 200_000]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="field is longer than 131,072"):
        read(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": ["a"], "person": [b"\xff"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="`person` must be a text, not bytes"):
        read(tmp_path / "t.parquet")


def test_a_long_error_stays_one_short_sentence(tmp_path):
    names = [f"column{i}" for i in range(100)]
    draft = read(table(tmp_path, ",".join(["image", "person", *names]) + "\na.png,1\na.png,1\nb.png,2\n"))
    assert draft.notes[1].endswith("column19, and 80 more.")


def test_links_in_circles_are_refused_by_name(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "y")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    picture(tmp_path / "anna" / "1.png")
    with pytest.raises(DataError, match=r"x is a link back to .* or round in a circle"):
        folder.read(tmp_path, Options())
    draft = folder.read(tmp_path, Options(lenient=True))
    assert len(draft.entries) == 1 and len(draft.problems) == 2
    (tmp_path / "t.csv").symlink_to(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"t\.csv is not a file"):
        read(tmp_path / "t.csv")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    draft = read(table(tmp_path, "image,person\nloop.png,1\n", "u.csv"))
    with pytest.raises(DataError, match=r"Image .*loop\.png"):
        measure(draft, Options())


def test_a_json_list_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"one object per line and name it \.jsonl"):
        read(table(tmp_path, "[]", "t.json"))


# --- cells


@pytest.mark.parametrize(
    "value, text", [(" a ", "a"), (7, "7"), (7.0, "7"), (0.5, "0.5"), (None, ""), (float("nan"), ""), (True, "true")]
)
def test_a_cell_is_the_text_a_user_expects(value, text):
    assert text_of(value, "row", "column") == text


def test_lists_and_objects_may_be_written_as_json():
    assert list_of('["a", " "]', "row", "c") == list_of(["a", None], "row", "c") == ["a"]
    assert facts_of('{"hat": true, "x": ""}', "row", "c") == facts_of([("hat", "true")], "row", "c") == {"hat": "true"}


def test_trailing_cells_may_be_absent_and_blank_lines_are_no_rows(tmp_path):
    found = open_table(table(tmp_path, "\nimage,person,caption\n\na,1\n\n"), Complaints())
    assert found.columns == ["image", "person", "caption"] and list(found.rows) == [(1, {"image": "a", "person": "1"})]


def test_the_limits_leave_room_for_real_tables():
    assert manifest.MAX_FILE >= 2 << 30 and manifest.MAX_FIELD >= 100_000
