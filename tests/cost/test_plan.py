"""What a plan says, against closed forms from a model's shapes, and on the command line."""

import json

import pytest
import torch

from mendkit.__main__ import main
from mendkit.cost.dryrun import MAPPED, ROWS, SIZES, DryRun, Machine
from mendkit.cost.plan import PLANNED, Phase, Plan, check_memory, plan, shape_model
from mendkit.errors import MendkitError, ModelError
from mendkit.hparams import MENDHyperParams
from mendkit.mend.batches import prepare_texts
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import save_tiny, tiny_llama
from tests.test_configs import CONFIGS

MACHINE = Machine(
    {(dtype, rows): 1e9 for dtype in PLANNED for rows in ROWS}, dict.fromkeys(SIZES, 1e9), 1e9
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plan") / "model")


def planned(folder, **changes):
    h = hparams(max_iters=3, batch_size=2, whiten_pairs=False, **changes).replace(
        model_name=str(folder)
    )
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
    block = (
        2 * d * d + 2 * d * (d // 2) + 3 * d * wide + 2 * d
    )  # two heads of four have keys and values
    whole = 2 * vocabulary * d + layers * block + d
    kept, released = planned(folder, release_trunk=False), planned(folder)
    assert kept.parameters == released.parameters == whole
    assert kept.phase("step").parts["weights"] == 4 * whole
    assert released.phase("step").parts["weights"] == 4 * (whole - vocabulary * d - block)
    assert (
        released.released and not released.streamed and planned(folder, stream_trunk=True).streamed
    )
    h = hparams(whiten_pairs=False)
    texts = {t.key: t for e in prepare_texts(base, h, EXAMPLES) for t in e.all()}.values()
    assert released.texts == len(texts) and released.tokens == sum(len(t.ids) for t in texts)
    assert released.phase("step").parts["trunk states"] == 4 * d * released.tokens
    assert released.phase("step").parts["references"] == 4 * d * sum(len(t.scored) for t in texts)


def test_nothing_to_plan_is_an_error():
    with pytest.raises(MendkitError, match="at least one training"):
        plan(hparams(), [], EXAMPLES, machine=MACHINE)


def test_training_is_refused_where_it_is_planned_to_need_more_than_is_free(folder, monkeypatch):
    idle, seen, need = 10**9, [], 2 * 10**9
    phases = (
        Phase("step", {"weights": 3 * 10**9}, 10**9, 1.0),
        Phase("one edit", {"weights": 9 * 10**9}, 0, 1.0, times=0),
    )
    own = Plan("tiny", 1, False, False, False, 1, 1, phases, idle)

    def plan_of(h: MENDHyperParams, *_, **__):
        seen.append(h)
        return own

    def check(free: float, **options) -> None:
        seen.clear()
        monkeypatch.setattr("mendkit.cost.plan.free_memory", lambda _: int(free))
        check_memory(hparams().replace(model_name=str(folder)), EXAMPLES, EXAMPLES[:2], **options)

    monkeypatch.setattr("mendkit.cost.plan.plan", plan_of)
    check(need / 1.14)
    said = r"need 2\.00 GB \(step\), 1\.72 GB are free; even with release_trunk=true .* not fit .*--ignore-memory"
    with pytest.raises(MendkitError, match=said):
        check(need / 1.16)
    assert any(h.release_trunk is True for h in seen)
    with pytest.raises(MendkitError):
        check(need / 1.16, keep_trunk=True)
    assert {(h.release_trunk, h.stream_trunk) for h in seen} == {(False, False)}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as many processes share what is free
    check(2 * need / 1.14)
    with pytest.raises(MendkitError):
        check(2 * need / 1.16)


def test_where_there_is_no_plan_training_is_not_refused(monkeypatch, caplog):
    monkeypatch.setattr("mendkit.cost.plan.free_memory", lambda _: 1)
    monkeypatch.setattr("mendkit.cost.plan.read_config", lambda *_, **__: None)  # of the hub
    check_memory(MENDHyperParams.from_hparams(CONFIGS / "bert-base.yaml"), EXAMPLES, EXAMPLES[:2])
    assert (
        "whether memory is enough is not known" in caplog.text and "is a classifier" in caplog.text
    )


def test_the_command_writes_json(folder, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"model_name: {folder}\nrank: 4\nbatch_size: 2\nmax_iters: 2\nwhiten_pairs: false\n"
    )
    assert (
        main(["plan", str(config), "--train-limit", "8", "--validation-limit", "4", "--json"]) == 0
    )
    values = json.loads(capsys.readouterr().out)
    assert (
        values["peak"] >= values["needed"] >= values["training_needed"] > values["idle"] > 0
        and values["seconds"] > 0
    )
    assert [phase["name"] for phase in values["phases"]][:2] == ["loading", "trunk pass"]
