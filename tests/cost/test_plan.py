"""What a plan says, against bytes of shapes, recorded measurements, and on the command line."""

import json
from pathlib import Path

import pytest

from mendkit.__main__ import main
from mendkit.cost.plan import PLAN_TOLERANCE, Phase, Plan, check_memory, plan, plan_table
from mendkit.data.files import read_examples
from mendkit.errors import MendkitError
from mendkit.hparams import MENDHyperParams
from mendkit.mend.archive import load_archive
from mendkit.mend.batches import prepare_texts
from mendkit.mend.factors import FactorCache
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.training import train
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import save_tiny, tiny_llama

CONFIGS = Path(__file__).parents[2] / "configs"
GB = 10**9
IDLE = 0.42  # GB of a process without weights, when these were measured
MEASURED = {  # resident GB above IDLE of loading, trunk pass, … (docs/LOG.md, 2026-11-25)
    "gpt2": (40, (0.50, 0.85, 0.55, 0.60, 1.31, 1.14, 1.14)),
    "gpt2-xl": (16, (6.23, 6.63, 1.04, 1.12, 1.78, 1.68, 1.64)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plan") / "model")


def planned(folder, **changes):
    h = hparams(max_iters=3, batch_size=2, **changes).replace(model_name=str(folder))
    return plan(h, EXAMPLES, EXAMPLES[:2])


def held(found: Plan, name: str) -> dict[str, int]:
    return next(phase for phase in found.phases if phase.name == name).parts


@pytest.mark.parametrize("name", MEASURED)
def test_peaks_are_those_measured_within_the_tolerance(name):
    count, measured = MEASURED[name]
    h = MENDHyperParams.from_hparams(CONFIGS / f"{name}.yaml")
    train_facts = read_examples("facts:train", limit=count)
    found = plan(h, train_facts, read_examples("facts:validation", limit=count // 5))
    for phase, gigabytes in zip(found.phases, measured, strict=True):
        peak = IDLE + phase.peak / GB
        assert peak == pytest.approx(IDLE + gigabytes, rel=PLAN_TOLERANCE), phase.name


def test_what_is_held_is_the_shapes_bytes(folder):
    d, wide, layers, base = 32, 64, 4, tiny_llama()
    vocabulary = len(base.tokenizer)
    # Two heads of four have keys and values.
    block = 2 * d * d + 2 * d * (d // 2) + 3 * d * wide + 2 * d
    whole = 2 * vocabulary * d + layers * block + d
    kept, released = planned(folder, release_trunk=False), planned(folder)
    streamed = planned(folder, stream_trunk=True)
    assert kept.parameters == released.parameters == whole
    assert held(kept, "step")["weights"] == 4 * whole
    assert held(released, "step")["weights"] == 4 * (whole - vocabulary * d - block)
    assert held(streamed, "loading")["weights"] == held(released, "step")["weights"]
    assert (kept.released, released.streamed, streamed.streamed) == (False, False, True)
    mend = MEND(base.sites, hparams())
    state = sum(value.nbytes for value in mend.state_dict().values())
    learned = sum(value.nbytes for value in mend.parameters())
    assert held(released, "step")["hypernetwork"] == state
    assert (
        held(released, "step")["moments"] == 2 * held(released, "step")["gradients"] == 2 * learned
    )


def test_lengths_and_factors_are_those_of_the_tokenised_texts(folder):
    base, found = tiny_llama(), planned(folder, disk_cache_bytes=0)
    texts = prepare_texts(base, hparams(), EXAMPLES)
    unique = {text.key: text for example in texts for text in example.all()}.values()
    tokens = sum(len(text.ids) for text in unique)
    positions = sum(len(text.scored) for text in unique)
    assert found.texts == len(unique)
    assert found.tokens == pytest.approx(tokens, rel=0.1)
    states = held(found, "step")["trunk states"]
    assert states == pytest.approx(4 * 32 * (tokens + positions), rel=0.15)
    cache = FactorCache(FrozenTrunk(base), hparams())
    cache.fill([example.edit for example in texts])
    assert held(found, "step")["factors"] == pytest.approx(cache.bytes, rel=0.1)
    assert held(planned(folder, cache_bytes=100), "step")["factors"] == 100


@pytest.mark.parametrize("name", ["t5-3b", "bert-base", "llama-7b"])
def test_models_of_the_configurations_are_planned_without_a_network(name):
    h = MENDHyperParams.from_hparams(CONFIGS / f"{name}.yaml")
    found = plan(h, EXAMPLES, EXAMPLES[:2])
    assert found.needed - found.idle >= 2 * found.parameters
    assert name[:2] in plan_table(found).lower()


def test_an_archive_decides_sites_and_shape(folder, tmp_path):
    base = tiny_llama()
    fewer = base.with_sites([site.name for site in base.sites[:2]])
    h = hparams(max_iters=0).replace(rank=3)
    archive = train(h, EXAMPLES, EXAMPLES[:1], base=fewer, run_dir=tmp_path).archive
    state = load_archive(archive, base=base).mend.state_dict().values()
    found = planned(folder, archive=str(archive))
    assert held(found, "step")["hypernetwork"] == sum(value.nbytes for value in state)


def test_nothing_to_plan_is_an_error():
    with pytest.raises(MendkitError, match="at least one training"):
        plan(hparams(), [], EXAMPLES)


def test_training_is_refused_where_it_is_planned_to_need_more_than_is_free(folder, monkeypatch):
    seen, need, within = [], 2 * GB, 1 + PLAN_TOLERANCE
    phases = (Phase("step", {"weights": GB, "working memory": GB}), Phase("loading", {}))

    def plan_of(h: MENDHyperParams, *_):
        seen.append(h)
        return Plan("tiny", 1, False, False, 1, 1, 10**9, phases)

    def check(free: float, **options) -> None:
        seen.clear()
        monkeypatch.setattr("mendkit.cost.plan.free_memory", lambda _: int(free))
        check_memory(hparams().replace(model_name=str(folder)), EXAMPLES, EXAMPLES[:2], **options)

    monkeypatch.setattr("mendkit.cost.plan.plan", plan_of)
    check(1.01 * need / within)
    said = r"need 2\.00 GB \(step\), 1\.58 GB are free; even with release_trunk=true .* not fit"
    with pytest.raises(MendkitError, match=f"{said} .*--ignore-memory"):
        check(0.99 * need / within)
    assert any(h.release_trunk is True for h in seen)
    with pytest.raises(MendkitError):
        check(0.99 * need / within, keep_trunk=True)
    assert {(h.release_trunk, h.stream_trunk) for h in seen} == {(False, False)}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as many processes share what is free
    check(2.02 * need / within)
    with pytest.raises(MendkitError):
        check(1.98 * need / within)


def test_the_command_writes_json_and_proposes_settings_that_fit(folder, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(f"model_name: {folder}\nrank: 4\nbatch_size: 2\nmax_iters: 2\n")
    words = ["plan", str(config), "--train-limit", "8", "--validation-limit", "4"]
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["needed"] > values["idle"] > 0 and "settings" not in values
    assert [phase["name"] for phase in values["phases"]][:2] == ["loading", "trunk pass"]
    assert main([*words, "--memory", "1MB"]) == 0
    assert "release_trunk=true" in capsys.readouterr().out
