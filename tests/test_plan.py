"""What a plan says, against closed forms from a model's shapes, and on the command line."""

import json

import pytest
import torch

from mendkit.__main__ import main
from mendkit.dryrun import MAPPED, ROWS, SIZES, DryRun, Machine
from mendkit.errors import MendkitError, ModelError
from mendkit.hparams import MENDHyperParams
from mendkit.plan import PLANNED, plan, shape_model
from mendkit.texts import prepare_texts
from tests.claims import EXAMPLES
from tests.test_configs import CONFIGS
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


def test_small_blocks_stay_until_they_are_trimmed_and_large_ones_go():
    small, large = MAPPED // 4 - 1, MAPPED // 4  # numbers, of 4 bytes each
    with DryRun() as run:
        del_me = torch.empty(small, device="meta")
        del del_me
        assert (run.live, run.peak) == (0, 4 * small)
        before = run.restart(trimmed=False)
        big = torch.empty(large, device="meta")
        assert (before, run.live, run.peak) == (0, 4 * large, 4 * (small + large))
        del big
        run.restart()
        assert (run.live, run.peak) == (0, 0)


def test_fused_adam_takes_no_working_memory_and_counts_as_moved():
    value = torch.nn.Parameter(torch.empty(1000, device="meta"))
    with DryRun([value]) as run:
        state = [[torch.empty_like(value)] for _ in range(3)]
        before = run.restart()
        torch._fused_adam_(
            [value], *state, [], [torch.zeros((), device="meta")],
            lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        assert run.peak == before + 4 and sum(run.work().bytes.values()) > 4 * 4 * 1000


def test_a_classifier_has_no_plan_and_an_encoder_decoder_has_shapes():
    h = MENDHyperParams.from_hparams(CONFIGS / "bert-base.yaml")
    with pytest.raises(ModelError, match="is a classifier"):
        plan(h, EXAMPLES, EXAMPLES[:2], machine=MACHINE)
    base, exact = shape_model(MENDHyperParams.from_hparams(CONFIGS / "t5-3b.yaml"), EXAMPLES)
    assert (base.family, base.start_id, exact) == ("seq2seq", 0, False)


def test_what_is_held_is_the_shapes_bytes(folder):
    d, wide, layers, base = 32, 64, 4, tiny_llama()
    vocabulary = len(base.tokenizer)
    block = 2 * d * d + 2 * d * (d // 2) + 3 * d * wide + 2 * d  # two heads of four have keys and values
    whole = 2 * vocabulary * d + layers * block + d
    kept, released = planned(folder, release_trunk=False), planned(folder)
    assert kept.parameters == released.parameters == whole
    assert kept.phase("step").parts["weights"] == 4 * whole
    assert released.phase("step").parts["weights"] == 4 * (whole - vocabulary * d - block)
    assert released.released and not released.streamed and planned(folder, stream_trunk=True).streamed
    h = hparams(whiten_pairs=False)
    texts = {t.key: t for e in prepare_texts(base, h, EXAMPLES) for t in e.all()}.values()
    assert released.texts == len(texts) and released.tokens == sum(len(t.ids) for t in texts)
    assert released.phase("step").parts["trunk states"] == 4 * d * released.tokens
    assert released.phase("step").parts["references"] == 4 * d * sum(len(t.scored) for t in texts)


def test_nothing_to_plan_is_an_error():
    with pytest.raises(MendkitError, match="at least one training"):
        plan(hparams(), [], EXAMPLES, machine=MACHINE)


def test_the_command_writes_json(folder, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(f"model_name: {folder}\nrank: 4\nbatch_size: 2\nmax_iters: 2\nwhiten_pairs: false\n")
    assert main(["plan", str(config), "--train-limit", "8", "--validation-limit", "4", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (
        values["peak"] >= values["needed"] >= values["training_needed"] > values["idle"] > 0 and values["seconds"] > 0
    )
    assert [phase["name"] for phase in values["phases"]][:2] == ["loading", "trunk pass"]
