"""What a plan says, against bytes of shapes, recorded measurements, and on the command line."""

import json
from pathlib import Path

import pytest

from mendkit.__main__ import main
from mendkit.cost.plan import PLAN_TOLERANCE, Plan, check_memory, plan, plan_table
from mendkit.data.files import read_examples
from mendkit.errors import MendkitError
from mendkit.hparams import MENDHyperParams
from mendkit.mend.hypernetwork import MEND
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import save_tiny, tiny_llama

CONFIGS = Path(__file__).parents[2] / "configs"
GB = 10**9
IDLE = 0.42  # GB of a process without weights, when these were measured
MEASURED = {  # resident GB above IDLE: trunk pass, statistics, training (docs/LOG.md, 2026-11-25)
    "gpt2": (40, (0.85, 0.60, 1.31)),
    "gpt2-xl": (16, (6.63, 1.12, 1.78)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plan") / "model")


def planned(folder, **changes):
    h = hparams(max_iters=3, batch_size=2, **changes).replace(model_name=str(folder))
    return plan(h, EXAMPLES, EXAMPLES[:2])


@pytest.mark.parametrize("name", MEASURED)
def test_peaks_are_those_measured_within_the_tolerance(name):
    count, measured = MEASURED[name]
    h = MENDHyperParams.from_hparams(CONFIGS / f"{name}.yaml")
    train_facts = read_examples("facts:train", limit=count)
    found = plan(h, train_facts, read_examples("facts:validation", limit=count // 5))
    for (phase, parts), gigabytes in zip(found.phases.items(), measured, strict=True):
        peak = IDLE + sum(parts.values()) / GB
        assert peak == pytest.approx(IDLE + gigabytes, rel=PLAN_TOLERANCE), phase


def test_what_is_held_is_the_shapes_bytes(folder):
    d, wide, layers, base = 32, 64, 4, tiny_llama()
    vocabulary = len(base.tokenizer)
    # Two heads of four have keys and values.
    block = 2 * d * d + 2 * d * (d // 2) + 3 * d * wide + 2 * d
    whole = 2 * vocabulary * d + layers * block + d
    kept, released = planned(folder, release_trunk=False), planned(folder)
    streamed = planned(folder, stream_trunk=True)
    assert kept.parameters == released.parameters == whole
    last = released.phases["training"]
    assert kept.phases["training"]["weights"] == 4 * whole
    assert last["weights"] == 4 * (whole - block)
    assert streamed.phases["trunk pass"]["weights"] == last["weights"]
    assert (kept.trunk, released.trunk, streamed.trunk) == ("kept", "released", "streamed")
    mend = MEND(base.sites, hparams())
    assert last["hypernetwork"] == sum(value.nbytes for value in mend.state_dict().values())
    learned = sum(value.nbytes for value in mend.parameters())
    assert last["moments"] == 2 * last["gradients"] == 2 * learned


@pytest.mark.parametrize("name", ["t5-3b", "bert-base", "llama-7b"])
def test_models_of_the_configurations_are_planned_without_a_network(name):
    h = MENDHyperParams.from_hparams(CONFIGS / f"{name}.yaml")
    found = plan(h, EXAMPLES, EXAMPLES[:2])
    assert found.peak >= 2 * found.parameters
    assert name[:2] in plan_table(found).lower()


def test_training_is_refused_where_it_is_planned_to_need_more_than_is_free(folder, monkeypatch):
    seen, need, within = [], 2 * GB, 1 + PLAN_TOLERANCE
    phases = {"training": {"weights": GB + 1, "working memory": GB - 1}, "trunk pass": {}}

    def plan_of(h: MENDHyperParams, *_):
        seen.append(h)
        return Plan("tiny", 1, "kept", 1, 1, GB, phases)

    def check(free: float, **options) -> None:
        seen.clear()
        monkeypatch.setattr("mendkit.cost.plan.free_memory", lambda _: int(free))
        check_memory(hparams().replace(model_name=str(folder)), EXAMPLES, EXAMPLES[:2], **options)

    monkeypatch.setattr("mendkit.cost.plan.plan", plan_of)
    check(1.01 * need / within)
    said = r"2\.00 GB \(training\), and 1\.58 GB are free\. The largest part is weights: "
    said += "set `stream_trunk: true`"
    with pytest.raises(MendkitError, match=f"{said}.*--ignore-memory"):
        check(0.99 * need / within)
    assert seen[-1].release_trunk == "auto"
    with pytest.raises(MendkitError):
        check(0.99 * need / within, keep_trunk=True)
    assert (seen[-1].release_trunk, seen[-1].stream_trunk) == (False, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as many processes share what is free
    check(2.02 * need / within)
    with pytest.raises(MendkitError):
        check(1.98 * need / within)


def test_the_command_prints_a_table_or_json(folder, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(f"model_name: {folder}\nrank: 4\nbatch_size: 2\nmax_iters: 2\n")
    words = ["plan", str(config), "--train-limit", "8", "--validation-limit", "4"]
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["needed"] > values["idle"] > 0
    assert list(values["phases"]) == ["trunk pass", "statistics", "training"]
    assert main(words) == 0
    assert "trunk released" in capsys.readouterr().out
