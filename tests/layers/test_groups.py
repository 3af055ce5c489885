"""Batches that know their people by group."""

from dataclasses import replace

import pytest
import torch

from reidctl.batch import Batch
from reidctl.layers.groups import GroupedBatch, grouped, split_parts
from reidctl.parts import Parts, join

# Of 5 people 0 to 4 in datasets 0 to 2; person 3 is in two of them, and nobody is of dataset 1.
PERSON, DOMAIN = [3, 4, 3, 0, 4, 3], [2, 0, 0, 2, 0, 2]


def batch():
    image = torch.arange(6.0).view(6, 1, 1, 1)
    return Batch(image=image, person=torch.tensor(PERSON), domain=torch.tensor(DOMAIN))


def listed(tensors):
    return [tensor.tolist() for tensor in tensors]


def rows_of(found, *, groups=3):
    """The parts of a batch whose features are its pictures."""
    rows = found.group_rows()
    image = found.image.flatten(1)
    return Parts({"image": image, "person": found.person, **rows}, dict.fromkeys(rows, "person"))


def test_people_and_samples_are_listed_by_group_and_a_person_of_two_groups_is_in_both():
    found = grouped(batch(), 3, 5)
    assert listed(found.people()) == [[3, 4], [], [0, 3]]
    assert {name: rows.tolist() for name, rows in found.group_rows().items()} == {
        "group0": [1, 2, 4], "group1": [], "group2": [0, 3, 5]
    }  # fmt: skip
    assert found.label.tolist() == [13, 4, 3, 10, 4, 13] and found.owner.tolist() == [3, 4, 10, 13]
    assert torch.equal(found.image, batch().image) and len(found) == 6


def test_one_group_reads_no_dataset_and_needs_no_rows():
    found = grouped(replace(batch(), domain=None), 1, 5)
    assert listed(found.people()) == [[0, 3, 4]] and found.group_rows() == {}
    assert found.label.tolist() == PERSON
    assert list(split_parts(rows_of(found), 1)) == [(0, slice(None))]


def test_a_part_and_a_copy_know_the_people_who_are_left():
    whole = grouped(batch(), 3, 5)
    part = whole.take([5, 1])
    assert isinstance(part, GroupedBatch) and listed(part.people()) == [[4], [], [3]]
    assert listed(part.group_rows().values()) == [[1], [], [0]]
    captioned = replace(whole, has_text=torch.tensor([True, False, False, True, False, False])).pairs()
    assert listed(captioned.people()) == [[], [], [0, 3]] and captioned.sizes == (0, 0, 2)
    moved = whole.to("meta")
    assert moved.owners == whole.owners and moved.sizes == whole.sizes
    assert {moved.label.device.type, moved.owner.device.type, moved.order.device.type} == {"meta"}


def test_a_batch_that_no_group_holds_is_refused():
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"group {wrong}, and there are 3"):
            grouped(replace(batch(), domain=torch.tensor([0, 1, 2, wrong, 0, 0])), 3, 5)
    with pytest.raises(ValueError, match="no `domain`"):
        grouped(replace(batch(), domain=None), 3, 5)
    with pytest.raises(ValueError, match="no `person`"):
        grouped(replace(batch(), person=None), 1, 5)


def test_joined_parts_have_the_rows_of_each_group_and_leave_out_groups_without_any():
    halves = [rows_of(grouped(batch(), 3, 5).take(rows)) for rows in ([0, 2, 3], [1, 4, 5])]
    assert set(halves[0]) == set(halves[1])
    joined = join(halves)
    found = {group: joined["image"][rows].flatten().tolist() for group, rows in split_parts(joined, 3)}
    assert found == {0: [2.0, 1.0, 4.0], 2: [0.0, 3.0, 5.0]}
