"""Single networks: which files are asked for, in which order, and what is refused."""

import logging
import warnings

import pytest
import torch

from errors import UserError
from guidance.parts import part_source, read_part
from guidance.weights import Source

HUB, FOLDER = Source("some/one", False, "one", "--key some/one"), Source("/here", True, "here", "--key here")


def network(*there, missing=()):
    """A class whose files are to be had as `there` says, (variant, from the cache alone) each, and that draws random weights."""

    class Network:
        asked = []

        @classmethod
        def from_pretrained(cls, where, variant, dtype, local_files_only, output_loading_info):
            cls.asked.append((variant, local_files_only))
            torch.rand(5)
            warnings.warn("as libraries do", stacklevel=1)
            logging.getLogger("some.library").error("as libraries do")
            if (variant, local_files_only) not in there:
                raise OSError(f"nothing under {variant}\nand a second line")
            return (where, variant, dtype), {"missing_keys": set(missing)}

    return Network


@pytest.mark.parametrize(
    ("source", "dtype", "there", "asked"),
    (
        (FOLDER, torch.float32, (None, True), [(None, True)]),
        (FOLDER, torch.float32, ("fp16", True), [(None, True), ("fp16", True)]),
        (FOLDER, torch.float16, ("fp16", True), [("fp16", True)]),
        (FOLDER, torch.bfloat16, (None, True), [("fp16", True), (None, True)]),
        (HUB, torch.float32, ("fp16", True), [(None, True), ("fp16", True)]),
        (HUB, torch.float32, (None, False), [(None, True), ("fp16", True), (None, False)]),
    ),
)
def test_the_cache_and_the_right_precision_are_asked_first(source, dtype, there, asked):
    kind = network(there)
    assert read_part(kind, source, dtype) == (source.path_or_id, there[0], dtype)
    assert kind.asked == asked


def test_the_random_numbers_of_others_do_not_move():
    torch.manual_seed(3)
    read_part(network((None, True)), FOLDER, torch.float32)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


def test_the_libraries_say_nothing(caplog, recwarn):
    with pytest.raises(UserError):
        read_part(network(), HUB, torch.float32)
    assert not caplog.records and not recwarn.list
    logging.getLogger("some.library").error("afterwards they may")
    assert caplog.records


def test_what_cannot_be_had_is_said_in_one_line():
    with pytest.raises(UserError) as caught:
        read_part(network(), FOLDER, torch.float16)
    assert str(caught.value) == "--key here: /here cannot be read as a Network: nothing under None"
    with pytest.raises(
        UserError, match="^--key some/one: some/one cannot be .*None; check the id, connect once to download it"
    ):
        read_part(network(), HUB, torch.float32)
    with pytest.raises(UserError, match="^--key here: /here is not a Network: it has no weights a, b, c$"):
        read_part(network((None, True), missing="dcba"), FOLDER, torch.float32)


def test_where_a_part_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what lies beside the repository has no say
    assert part_source(tmp_path, "x/y", "--key") == Source(str(tmp_path), True, tmp_path.name, "--key")
    assert part_source(None, "x/y", "--key") == Source("x/y", False, "x/y", "--key")
    for wrong in ("nowhere", "a/b/c", "../x", "/no/where"):
        with pytest.raises(UserError, match=f"--key: {wrong}: no such folder, and not a hub id"):
            part_source(wrong, "x/y", "--key")
