"""Files of the first format (tests/oracles/old, made at 5c0057d) still load, and are verified."""

from pathlib import Path

import pytest
import torch

from mendkit.errors import ArchiveError
from mendkit.mend.archive import load_archive
from mendkit.mend.edit import Edit
from mendkit.mend.editor import EditSession, MENDEditor
from tests.oracles.claims import EXAMPLES

OLD = Path(__file__).parents[1] / "oracles" / "old"


def old_editor(llama) -> MENDEditor:
    archive = load_archive(OLD / "archive.safetensors", base=llama)
    return MENDEditor(archive.base, archive.mend)


def test_an_old_archive_edit_and_journal_give_the_same_weight_change(llama, tmp_path):
    expected = torch.load(OLD / "dense.pt")
    edit = Edit.load(OLD / "edit.safetensors", llama)
    again = Edit.load(edit.save(tmp_path / "edit"), llama)  # in the format of today
    made_now = old_editor(llama).edit(EXAMPLES[0])
    with EditSession.load(OLD / "journal.safetensors", old_editor(llama)) as session:
        assert [edit.active for edit in session.journal] == [True, False]
        for made in (edit, again, made_now, session.journal[0]):
            assert made.examples == EXAMPLES[:1] and made.dense().keys() == expected.keys()
            for name, change in made.dense().items():
                torch.testing.assert_close(change, expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("place", [-5, 600], ids=["a tensor", "the metadata"])
def test_a_damaged_old_archive_is_refused(llama, tmp_path, place):
    content = bytearray((OLD / "archive.safetensors").read_bytes())
    content[place] ^= 1
    path = tmp_path / "archive.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"archive\.safetensors"):
        load_archive(path, base=llama)
