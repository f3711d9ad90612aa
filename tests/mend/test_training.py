"""Training against a textbook loop, and the promises around it (CORRECTNESS rows 2, 15, 19, 21)."""

import json
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from mendkit.cost.textbook import textbook_losses
from mendkit.errors import MendkitError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.mend.archive import inspect_archive, load_archive
from mendkit.mend.batches import RIVALS, edit_tokens, prepare_texts, training_texts
from mendkit.mend.editor import MENDEditor
from mendkit.mend.factors import FactorCache
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.objective import batch_losses, total_loss
from mendkit.mend.preparation import statistics_examples, statistics_texts, wording_inputs
from mendkit.mend.sampler import Sampler
from mendkit.mend.scoring import forced
from mendkit.mend.training import Trainer, learning_rate_factor, train
from mendkit.mend.validation import validate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams, quick, scrambled, with_statistics


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
@pytest.mark.parametrize("cached", [True, False])
def test_losses_and_gradients_are_the_textbooks(family, cached, request):
    base = request.getfixturevalue(family)
    h = hparams(edit_lr=1e-3)
    examples = prepare_texts(base, h, EXAMPLES)
    mend = scrambled(with_statistics(base, MEND(base.sites, h).double()))
    trunk = FrozenTrunk(base)
    if cached:
        trunk.fill([text for example in examples for text in example.all()])
    factors = FactorCache(trunk, h.replace(cache_bytes=10**9))
    texts = [
        {role: getattr(e, role)[0] for role in ("paraphrases", "neighbours", "unrelated")}
        for e in examples
    ]
    rows = [[("edit", e.edit), *own.items()] for e, own in zip(examples, texts, strict=True)]
    losses = batch_losses(trunk, mend, factors.get([e.edit for e in examples]), rows)
    gradients = torch.autograd.grad(total_loss(losses, h), list(mend.parameters()))

    plain = [textbook_losses(base, mend, own) for own in rows]
    expected = {role: torch.stack([p[role] for p in plain]).mean() for role in losses}
    for role, value in expected.items():
        torch.testing.assert_close(losses[role], value, rtol=1e-9, atol=1e-11)
    for gradient, value in zip(
        gradients,
        torch.autograd.grad(total_loss(expected, h), list(mend.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(gradient, value, rtol=1e-7, atol=1e-10)


def test_the_factor_cache_keeps_the_shortest_texts_within_its_budget(llama):
    h, trunk = hparams(), FrozenTrunk(llama)
    texts = sorted(
        (e.edit for e in prepare_texts(llama, h, EXAMPLES)),
        key=lambda text: (len(text.ids), text.key),
    )
    whole = FactorCache(trunk, h)
    whole.fill(texts)
    sizes = [sum(u.nbytes + d.nbytes for u, d in whole.kept[text].values()) for text in texts]
    assert whole.bytes == sum(sizes) and len(whole.kept) == len(texts)
    for spare, kept in ((0, 2), (-1, 1), (1, 2)):
        some = FactorCache(trunk, h.replace(cache_bytes=sum(sizes[:2]) + spare))
        some.fill(texts)
        assert list(some.kept) == texts[:kept] and some.bytes == sum(sizes[:kept])


def test_every_role_weighs_as_told(llama):
    h = hparams()
    examples = prepare_texts(llama, h, EXAMPLES)
    mend = scrambled(with_statistics(llama, MEND(llama.sites, h)))
    trunk = FrozenTrunk(llama)
    factors = FactorCache(trunk, h.replace(cache_bytes=0))
    losses = batch_losses(
        trunk,
        mend,
        factors.get([e.edit for e in examples[:2]]),
        Sampler(examples, h).texts([0, 1]),
    )
    weights = dict(cedit=2.0, cpara=0.5, cneigh=3.0, cloc=0.25)
    expected = (
        2 * losses["edit"]
        + 0.5 * losses["paraphrases"]
        + 3 * losses["neighbours"]
        + 0.25 * losses["unrelated"]
    )
    torch.testing.assert_close(total_loss(losses, h.replace(**weights)), expected)
    gradient = torch.autograd.grad(losses["paraphrases"], mend.log_edit_lr)[0]
    assert float(gradient.abs().sum()) > 0  # paraphrases train the editor


def test_a_missing_role_fills_up_without_weight(llama):
    h = hparams()
    bare = prepare_texts(
        llama, h, [EXAMPLES[0].__class__(prompt="The capital of Peru is", target_new="Rome")]
    )
    examples = [*prepare_texts(llama, h, EXAMPLES[:1]), *bare]
    rows = Sampler(examples, h).texts([0, 1])
    assert [role for role, _ in rows[1]] == ["edit", "", "", ""]
    mend = scrambled(with_statistics(llama, MEND(llama.sites, h)))
    trunk = FrozenTrunk(llama)
    cache = FactorCache(trunk, h.replace(cache_bytes=0))
    both = batch_losses(trunk, mend, cache.get([e.edit for e in examples]), rows)
    first = batch_losses(trunk, mend, cache.get([examples[0].edit]), rows[:1])
    for role in ("paraphrases", "neighbours", "unrelated"):
        torch.testing.assert_close(both[role], first[role], rtol=1e-4, atol=1e-6)


def test_every_example_is_drawn_once_an_epoch(llama):
    examples = prepare_texts(llama, hparams(), EXAMPLES)
    sampler = Sampler(examples, hparams(batch_size=2))
    edits = [rows[0][1] for _ in range(5) for rows in sampler.draw().rows]
    assert set(edits[:5]) == set(edits[5:]) == {texts.edit for texts in examples}


def test_accumulating_is_one_large_batch(llama, tmp_path):
    tensors = {}
    for name, changes in {
        "large": {"batch_size": 4},
        "accumulated": {"batch_size": 2, "accumulate_bs": 2},
    }.items():
        h = hparams(
            max_iters=1,
            paraphrases_per_edit=9,
            neighbours_per_edit=9,
            unrelated_per_edit=9,
            **changes,
        )
        result = train(h, EXAMPLES[:4], EXAMPLES[:1], base=llama, run_dir=tmp_path / name)
        tensors[name] = load_archive(result.archive, base=llama).mend.state_dict()
    for name, value in tensors["large"].items():
        torch.testing.assert_close(tensors["accumulated"][name], value, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(llama, tmp_path):
    runs = {n: train(quick(seed=s), EXAMPLES, EXAMPLES[:2], base=llama, run_dir=tmp_path / n).archive
            for n, s in {"a": 1, "b": 1, "c": 2}.items()}  # fmt: skip
    files = {name: path.read_bytes() for name, path in runs.items()}
    assert files["a"] == files["b"]  # the whole file: it tells of no times
    sums = {name: inspect_archive(path)["sha256"] for name, path in runs.items()}
    assert sums["a"] == sums["b"] != sums["c"]


def test_step_sizes_move_with_their_own_learning_rate(llama, tmp_path):
    for lr_lr, moves in ((1e-2, True), (0.0, False)):
        h = quick(lr_lr=lr_lr, edit_lr=1e-3)
        mend = load_archive(
            train(h, EXAMPLES, EXAMPLES, base=llama, run_dir=tmp_path / str(moves)).archive,
            base=llama,
        ).mend
        changed = [abs(lr - 1e-3) > 1e-8 for lr in mend.edit_lrs.values()]
        assert all(changed) if moves else not any(changed)


def test_training_learns(llama, tmp_path):
    h = hparams(max_iters=100, val_interval=50, batch_size=5, lr=1e-2, edit_lr=3e-3, lr_lr=5e-2)
    history = train(h, EXAMPLES, EXAMPLES, base=llama, run_dir=tmp_path).history
    validations = [row["val.loss"] for row in history if "val.loss" in row]
    assert validations[-1] < 0.5 * validations[0]


def test_the_best_archive_is_kept_not_the_last(llama, tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.9, 0.2, 0.4])
    monkeypatch.setattr(
        "mendkit.mend.training.validate", lambda *_, at_once: {"score": next(scores), "loss": 1.0}
    )
    h = hparams(max_iters=4, val_interval=1, batch_size=2)
    result = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert result.best["step"] == 2
    assert inspect_archive(result.archive)["training"]["best"]["step"] == 2


def test_there_is_always_an_archive(llama, tmp_path):
    h = hparams(max_iters=1, val_interval=1000, batch_size=2)
    assert train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path).archive.is_file()
    scores = iter([0.9, 0.1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mendkit.mend.training.validate",
            lambda *_, at_once: {"score": next(scores), "loss": 1.0},
        )
        assert train(
            h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "worse"
        ).archive.is_file()


def test_early_stopping_stops(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mendkit.mend.training.validate", lambda *_, at_once: {"score": 0.5, "loss": 1.0}
    )
    h = hparams(max_iters=50, val_interval=1, early_stop_patience=3, batch_size=2)
    result = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert "no better score for 3 steps" in result.stopped
    assert max(row["step"] for row in result.history) == 4


def test_a_time_budget_stops_with_an_archive(llama, tmp_path):
    result = train(quick(max_seconds=1e-6), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert "time budget" in result.stopped and result.archive.is_file()


def test_statistics_may_come_from_examples_held_out_of_training(llama, tmp_path):
    h = quick(stats_held_out=True, stats_examples=2, whiten=0.1, edit_tokens="scored")
    trainer = Trainer(llama, h, EXAMPLES, EXAMPLES[:1], run_dir=tmp_path)
    assert len(trainer.train_texts) == 3 and len(trainer.stats_texts) == 2
    result = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "run")
    assert result.normaliser_examples == 2
    moments = load_archive(result.archive, base=llama).mend.moments.values()
    tokens = sum(len(edit_tokens(llama, h, e).scored) for e in EXAMPLES[3:])
    assert all(int(m["u"].count) == int(m["delta"].count) == tokens for m in moments)


def test_paired_statistics_are_of_the_answer_tokens_of_all_texts(llama, tmp_path):
    h = quick(
        stats_examples=4, whiten=0.1, whiten_pairs=True, unit_response=True, edit_tokens="scored"
    )
    trainer = Trainer(llama, h, EXAMPLES, EXAMPLES[:1], run_dir=tmp_path)
    trainer.prepare()
    chosen = statistics_examples(trainer.train_texts, h)
    assert len(chosen) == 4
    tokens = sum(len(text.scored) for e in chosen for text in e.all())
    assert all(int(m["u"].count) == tokens for m in trainer.mend.moments.values())
    (inputs, groups, first) = next(iter(wording_inputs(trainer.trunk, h, chosen, trainer.progress)))
    assert {len(u) for u in inputs.values()} == {len(groups)} == {len(first)} == {tokens}
    sizes = torch.bincount(groups[groups >= 0]).tolist()
    assert sizes == [1 + len(e.paraphrases) for e in chosen for _ in e.edit.scored]
    assert int((groups < 0).sum()) == sum(
        len(t.scored) for e in chosen for t in (*e.neighbours, *e.unrelated)
    )
    assert int(first.sum()) == sum(len(e.all()) for e in chosen)
    archive = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "run").archive
    mend = load_archive(archive, base=llama).mend  # both matrices and what is divided by survive
    assert all(
        len(m["u"].matrix) == 2 and (m["u"].response > 0).all() for m in mend.moments.values()
    )


def test_borrowed_texts_are_of_the_right_relation_and_never_name_the_subject(llama):
    others = [replace(e, relation="seat", subject=f"{e.subject} (seat)") for e in EXAMPLES[3:]]
    source = [*EXAMPLES[:3], *others]
    h = hparams(borrow=1.0, neighbours_per_edit=2, unrelated_per_edit=2)
    texts = prepare_texts(llama, h, source)
    sampler = Sampler(texts, h)
    seen: dict[str, set] = {"neighbours": set(), "unrelated": set()}
    for _ in range(40):
        for role, text in sampler.texts([0])[0]:
            if role in seen:
                seen[role].add(text)
    written = {
        role: {llama.tokenizer.decode(text.ids) for text in own} for role, own in seen.items()
    }
    assert not any("France" in text for own in written.values() for text in own)
    kin = {t for i in (1, 2) for t in (texts[i].edit, *texts[i].paraphrases, *texts[i].neighbours)}
    assert seen["neighbours"] == kin | set(texts[0].neighbours)
    assert any("Chad" in text or "Fiji" in text for text in written["unrelated"])
    assert not any("United Kingdom" in text or "Japan" in text for text in written["unrelated"])
    plain = Sampler(texts, h.replace(borrow=0.0)).texts([0])[0]
    assert {text for role, text in plain if role == "neighbours"} == set(texts[0].neighbours)


def test_hard_negatives_take_their_share_of_the_neighbours(llama, tmp_path):
    h = quick(hard_negatives=1.0, neighbours_per_edit=2, texts_per_role=1, edit_tokens="scored")
    h = h.replace(whiten=0.02, whiten_pairs=True)
    trainer = Trainer(llama, h, EXAMPLES, EXAMPLES[:1], run_dir=tmp_path)
    hard = training_texts(llama, h, EXAMPLES)[0].hard
    written = {llama.tokenizer.decode(text.ids) for text in hard}
    assert len(hard) == 2 and not any("France is" in text for text in written)
    assert trainer.train_texts[0].hard == hard and trainer.val_texts[0].hard == ()
    assert set(hard) <= set(statistics_texts(trainer.train_texts[0], h)[1])
    for share, few, many in ((1.0, 2, 2), (0.5, 0.8, 1.2), (0.0, 0, 0)):
        sampler = Sampler(trainer.train_texts, h.replace(hard_negatives=share))
        drawn = [
            [text for role, text in sampler.texts([0])[0] if role == "neighbours"]
            for _ in range(200)
        ]
        assert few <= sum(text in hard for own in drawn for text in own) / 200 <= many
        assert all(len(set(own)) == len(own) for own in drawn)
    assert train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "run").archive.is_file()


@pytest.mark.parametrize("margin", [0.0, 1.0, 30.0])
def test_the_margin_of_neighbours_is_the_hinge_of_what_each_reads_alone(llama64, margin):
    h = hparams(cmargin=0.5, margin=margin, edit_lr=1e-3, neighbours_per_edit=2, hard_negatives=0.5)
    texts = training_texts(llama64, h, EXAMPLES)
    mend = scrambled(with_statistics(llama64, MEND(llama64.sites, h).double()))
    trunk = FrozenTrunk(llama64)
    factors = FactorCache(trunk, h).get([e.edit for e in texts])
    rows = Sampler(texts, h).texts(range(len(texts)))
    losses, updates = batch_losses(trunk, mend, factors, rows), mend(factors, len(texts))
    pairs = [
        [(own[i - 1][1], text) for i, (role, text) in enumerate(own) if role == RIVALS]
        for own in rows
    ]
    assert sum(map(len, pairs)) >= len(texts) and all(
        a.ids != b.ids for own in pairs for a, b in own
    )
    read = [
        -fmean(v.logp)
        for own in forced(trunk, [[t for p in own for t in p] for own in pairs], updates)
        for v in own
    ]
    gaps = [margin + own - rival for own, rival in zip(read[::2], read[1::2], strict=True)]
    assert margin != 1.0 or min(gaps) < 0 < max(gaps)  # the hinge acts
    assert float(losses[RIVALS].detach()) == pytest.approx(
        fmean(max(0.0, gap) for gap in gaps), rel=1e-6
    )
    assert float(
        total_loss(losses, h).detach() - total_loss(losses, h.replace(cmargin=0.0)).detach()
    ) == pytest.approx(0.5 * float(losses[RIVALS].detach()), rel=1e-6)
    without = [[(role, text) for role, text in own if role not in (RIVALS, "")] for own in rows]
    without = [own + [("", own[0][1])] * (max(map(len, without)) - len(own)) for own in without]
    for role, loss in batch_losses(trunk, mend, factors, without).items():
        torch.testing.assert_close(loss, losses[role])


def test_validation_counts_ns_as_evaluation_does(llama):
    h = hparams(cmargin=1.0, edit_lr=1e-3)
    mend = scrambled(with_statistics(llama, MEND(llama.sites, h)))
    examples = [replace(e, neighbours=e.neighbours[:1]) for e in EXAMPLES]
    values = validate(FrozenTrunk(llama), mend, prepare_texts(llama, h, examples), h)
    report = evaluate(MENDEditor(llama, mend), EvaluationSet(llama, h, examples, max_new_tokens=1))
    assert (
        values["ns"] == pytest.approx(report.summary["neighbourhood.ns"].mean)
        and 0 < values["ns"] < 1
    )
    assert (
        values["loss"]
        > validate(
            FrozenTrunk(llama), mend, prepare_texts(llama, h, examples), h.replace(cmargin=0.0)
        )["loss"]
    )
    assert "ns" not in validate(
        FrozenTrunk(llama), mend, prepare_texts(llama, h.replace(cmargin=0.0), examples), h
    )


def test_swapped_edits_are_made_with_any_wording_and_the_others_are_paraphrases(llama):
    texts = prepare_texts(llama, hparams(), EXAMPLES)
    wordings = {texts[0].edit, *texts[0].paraphrases}
    seen = set()
    sampler = Sampler(texts, hparams(swap=1.0, paraphrases_per_edit=9))
    for _ in range(40):
        (role, edit), *rest = sampler.texts([0])[0]
        assert role == "edit" and {text for r, text in rest if r == "paraphrases"} == wordings - {
            edit
        }
        seen.add(edit)
    assert seen == wordings
    assert all(Sampler(texts, hparams()).texts([0])[0][0][1] == texts[0].edit for _ in range(10))


def test_without_a_subject_or_a_relation_nothing_is_borrowed(llama):
    h = hparams(borrow=1.0)
    source = [
        replace(EXAMPLES[0], subject=None),
        replace(EXAMPLES[1], relation=None),
        *EXAMPLES[2:],
    ]
    texts = prepare_texts(llama, h, source)
    sampler = Sampler(texts, h)
    for _ in range(10):
        first, second = (dict(rows) for rows in sampler.texts([0, 1]))
        assert (
            first["neighbours"] in texts[0].neighbours and first["unrelated"] in texts[0].unrelated
        )
        assert second["neighbours"] in texts[1].neighbours


def test_fewer_texts_per_role_keep_the_first(llama, tmp_path):
    trainer = Trainer(llama, quick(texts_per_role=1), EXAMPLES, EXAMPLES[:1], run_dir=tmp_path)
    assert all(
        len(own.paraphrases) == len(own.neighbours) == len(own.unrelated) == 1
        for own in trainer.train_texts
    )
    assert len(trainer.val_texts[0].paraphrases) == 2
    own = Trainer(
        llama, quick(texts_per_role=[2, 1, 1]), EXAMPLES, EXAMPLES[:1], run_dir=tmp_path
    ).train_texts[0]
    assert (len(own.paraphrases), len(own.neighbours), len(own.unrelated)) == (2, 1, 1)


def test_an_archive_is_trained_on(llama, tmp_path, caplog):
    first = train(quick(), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "first").archive
    h = quick(lr=0.0, lr_lr=0.0).replace(archive=str(first))
    second = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "second").archive
    assert "going on training" in caplog.text
    a, b = (load_archive(path, base=llama).mend.state_dict() for path in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_going_on_keeps_the_archives_sites_and_shape(llama, tmp_path):
    fewer = llama.with_sites([site.name for site in llama.sites[:2]])
    first = train(
        quick(edit_tokens="scored"), EXAMPLES, EXAMPLES[:1], base=fewer, run_dir=tmp_path / "first"
    ).archive
    h = quick().replace(archive=str(first), rank=3)
    second = load_archive(
        train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "second").archive,
        base=llama,
    )
    assert [site.name for site in second.mend.sites] == [site.name for site in fewer.sites]
    assert (second.mend.hparams.rank, second.mend.hparams.edit_tokens) == (8, "scored")
    assert second.metadata["training"]["continued_from"] == str(first)


def test_a_second_run_into_a_folder_does_not_mix_histories(llama, tmp_path):
    for _ in range(2):
        result = train(quick(), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == len(result.history)


def test_history_is_on_disk_too(llama, tmp_path):
    result = train(quick(), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == list(result.history)
    assert {"loss", "edit", "paraphrases", "neighbours", "unrelated", "grad_norm"} <= set(rows[1])


def test_nothing_to_train_on_is_an_error(llama, tmp_path):
    with pytest.raises(MendkitError, match="at least one"):
        train(quick(), [], EXAMPLES, base=llama, run_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_schedule():
    h = hparams(warmup_iters=10, schedule="cosine")
    rates = [learning_rate_factor(step, h, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=1e-2) and max(rates) > 0.97
    assert rates[-1] == pytest.approx(0.1) and rates[50] == pytest.approx(0.55, abs=0.01)
    assert learning_rate_factor(99, h.replace(schedule="constant"), 100) == 1.0
