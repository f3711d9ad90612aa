"""What a plan says, against closed forms from a model's shapes, and on the command line."""

import json

import pytest
import torch

from mendkit.__main__ import main
from mendkit.dryrun import ROWS, SIZES, DryRun, Machine
from mendkit.errors import MendkitError
from mendkit.plan import PLANNED, plan
from mendkit.texts import prepare_texts
from tests.claims import EXAMPLES
from tests.test_mend import hparams
from tests.tiny import save_tiny, tiny_llama

MACHINE = Machine({(dtype, rows): 1e9 for dtype in PLANNED for rows in ROWS}, dict.fromkeys(SIZES, 1e9), 1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plan") / "model")


def planned(folder, **changes):
    h = hparams(max_iters=3, batch_size=2, whiten_pairs=False, **changes).replace(model_name=str(folder))
    return plan(h, EXAMPLES, EXAMPLES[:2], machine=MACHINE)


def test_a_product_is_counted_by_its_shapes():
    with DryRun() as run:
        out = torch.ones(32, 10, device="meta") @ torch.ones(10, 7, device="meta")
        assert run.work().flops == {(torch.float32, 32): 2 * 32 * 10 * 7}
        assert run.live == 4 * 32 * 7  # the factors are freed, the product lives
        assert run.peak == 4 * (32 * 10 + 10 * 7 + 32 * 7)
        assert out.to("cpu").shape == (32, 7)


def test_what_is_held_is_the_shapes_bytes(folder):
    d, wide, layers, base = 32, 64, 4, tiny_llama()
    vocabulary = len(base.tokenizer)
    block = 2 * d * d + 2 * d * (d // 2) + 3 * d * wide + 2 * d  # two heads of four have keys and values
    whole = 2 * vocabulary * d + layers * block + d
    kept, released = planned(folder, release_trunk=False), planned(folder)
    assert kept.parameters == released.parameters == whole
    assert kept.parts["weights"] == 4 * whole
    assert released.parts["weights"] == 4 * (whole - vocabulary * d - block)
    assert released.released and not released.streamed and planned(folder, stream_trunk=True).streamed
    h = hparams(whiten_pairs=False)
    texts = {t.key: t for e in prepare_texts(base, h, EXAMPLES) for t in e.all()}.values()
    assert released.texts == len(texts) and released.tokens == sum(len(t.ids) for t in texts)
    assert released.parts["trunk states"] == 4 * d * released.tokens
    assert released.parts["references"] == 4 * d * sum(len(t.scored) for t in texts)


def test_nothing_to_plan_is_an_error():
    with pytest.raises(MendkitError, match="at least one training"):
        plan(hparams(), [], EXAMPLES, machine=MACHINE)


def test_the_command_writes_json(folder, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(f"model_name: {folder}\nrank: 4\nbatch_size: 2\nmax_iters: 2\nwhiten_pairs: false\n")
    assert main(["plan", str(config), "--train-limit", "8", "--validation-limit", "4", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["peak"] >= values["training_peak"] > values["idle"] > 0 and values["seconds"] > 0
    assert [phase["name"] for phase in values["phases"]][:2] == ["loading", "trunk pass"]
