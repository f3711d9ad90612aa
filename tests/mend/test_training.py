"""Training against a textbook loop, and the promises around it (CORRECTNESS rows 2, 15, 19, 21)."""

import json
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from mendkit.data.examples import EditExample
from mendkit.errors import HyperParamError
from mendkit.evaluation.evaluate import EvaluationSet, evaluate
from mendkit.mend.archive import inspect_archive, load_archive
from mendkit.mend.batches import RIVALS, Sampler, edit_tokens, prepare_texts, training_texts
from mendkit.mend.distributed import Team
from mendkit.mend.editor import MENDEditor
from mendkit.mend.factors import FactorCache
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.preparation import Preparation, scan_blocks
from mendkit.mend.steps import Learner, batch_losses, learning_rate_factor, total_loss
from mendkit.mend.training import train
from mendkit.mend.validation import best_edit_lr, forced, strength_curve, validate
from mendkit.models.trunk import FrozenTrunk
from mendkit.runs import file_sha256
from tests.oracles.claims import EXAMPLES, hparams, quick, scrambled, with_statistics
from tests.oracles.tiny import save_tiny


def scrambled_mend(base, h) -> MEND:
    return scrambled(with_statistics(base, MEND(base.sites, h).to(base.dtype)))


def prepared(base, h) -> Preparation:
    return Preparation(base, h, EXAMPLES, EXAMPLES[:1], team=Team())


def scores(monkeypatch, values) -> None:
    """Let validations score these in turn."""
    turns = iter(values)
    monkeypatch.setattr(
        "mendkit.mend.training.validate", lambda *_, at_once: {"score": next(turns), "loss": 1.0}
    )


# ---------------------------------------- losses


def test_every_role_weighs_as_told_and_a_missing_one_nothing(llama):
    h = hparams()
    bare = EditExample(prompt="The capital of Peru is", target_new="Rome")
    examples = prepare_texts(llama, h, [EXAMPLES[0], bare])
    mend, trunk = scrambled_mend(llama, h), FrozenTrunk(llama)
    cache, rows = FactorCache(trunk, h), Sampler(examples, h).texts([0, 1])
    assert [role for role, _ in rows[1]] == ["edit"]
    both = batch_losses(trunk, mend, cache.get([e.edit for e in examples]), rows)
    first = batch_losses(trunk, mend, cache.get([examples[0].edit]), rows[:1])
    for role in ("paraphrases", "neighbours", "unrelated"):
        torch.testing.assert_close(both[role], first[role], rtol=1e-4, atol=1e-6)
    weights = {"edit": 2.0, "paraphrases": 0.5, "neighbours": 3.0, "unrelated": 0.25}
    expected = sum(weight * both[role] for role, weight in weights.items())
    told = h.replace(cedit=2.0, cpara=0.5, cneigh=3.0, cloc=0.25)
    torch.testing.assert_close(total_loss(both, told), expected)
    gradient = torch.autograd.grad(both["paraphrases"], mend.log_edit_lr)[0]
    assert float(gradient.abs().sum()) > 0  # paraphrases train the editor


@pytest.mark.parametrize("margin", [1.0, 30.0])
def test_the_margin_of_neighbours_is_the_hinge_of_what_each_reads_alone(llama64, margin):
    h = hparams(cmargin=0.5, margin=margin, edit_lr=1e-3, neighbours_per_edit=2, hard_negatives=0.5)
    texts, mend = training_texts(llama64, h, EXAMPLES), scrambled_mend(llama64, h)
    trunk = FrozenTrunk(llama64)
    factors = FactorCache(trunk, h).get([e.edit for e in texts])
    rows = Sampler(texts, h).texts(range(len(texts)))
    losses, updates = batch_losses(trunk, mend, factors, rows), mend(factors, len(texts))
    pairs = []
    for drawn in rows:
        places = [i for i, (role, _) in enumerate(drawn) if role == RIVALS]
        pairs.append([drawn[at][1] for i in places for at in (i - 1, i)])
    assert sum(map(len, pairs)) >= 2 * len(texts)
    read = [-fmean(v.logp) for value in forced(trunk, pairs, updates) for v in value]
    gaps = [margin + right - rival for right, rival in zip(read[::2], read[1::2], strict=True)]
    assert margin != 1.0 or min(gaps) < 0 < max(gaps)  # the hinge acts
    hinge = fmean(max(0.0, gap) for gap in gaps)
    assert float(losses[RIVALS].detach()) == pytest.approx(hinge, rel=1e-6)
    difference = total_loss(losses, h) - total_loss(losses, h.replace(cmargin=0.0))
    assert float(difference.detach()) == pytest.approx(0.5 * hinge, rel=1e-6)


def test_validation_counts_ns_as_evaluation_does(llama):
    h = hparams(cmargin=1.0, edit_lr=1e-3)
    mend, trunk = scrambled_mend(llama, h), FrozenTrunk(llama)
    examples = [replace(e, neighbours=e.neighbours[:1]) for e in EXAMPLES]
    texts = prepare_texts(llama, h, examples)
    values = validate(trunk, mend, texts, h)
    report = evaluate(MENDEditor(llama, mend), EvaluationSet(llama, h, examples, max_new_tokens=1))
    assert values["ns"] == pytest.approx(report.summary["neighbourhood.ns"].mean)
    assert 0 < values["ns"] < 1
    assert values["loss"] > validate(trunk, mend, texts, h.replace(cmargin=0.0))["loss"]
    plain = prepare_texts(llama, h.replace(cmargin=0.0), examples)
    assert "ns" not in validate(trunk, mend, plain, h)


def test_schedule():
    h = hparams(warmup_iters=10, schedule="cosine")
    rates = [learning_rate_factor(step, h, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=1e-2) and max(rates) > 0.97
    assert rates[-1] == pytest.approx(0.1) and rates[50] == pytest.approx(0.55, abs=0.01)
    assert learning_rate_factor(99, h.replace(schedule="constant"), 100) == 1.0


# ---------------------------------------- caches and draws


def test_every_example_is_drawn_once_an_epoch(llama):
    examples = prepare_texts(llama, hparams(), EXAMPLES)
    sampler = Sampler(examples, hparams(batch_size=2))
    edits = [rows[0][1] for _ in range(5) for rows in sampler.draw().rows]
    assert set(edits[:5]) == set(edits[5:]) == {texts.edit for texts in examples}


def test_borrowed_texts_are_of_the_right_relation_and_never_name_the_subject(llama):
    others = [replace(e, relation="seat", subject=f"{e.subject} (seat)") for e in EXAMPLES[3:]]
    h = hparams(borrow=1.0, neighbours_per_edit=2, unrelated_per_edit=2)
    texts = prepare_texts(llama, h, [*EXAMPLES[:3], *others])
    sampler = Sampler(texts, h)
    seen: dict[str, set] = {"edit": set(), "paraphrases": set()}
    seen |= {"neighbours": set(), "unrelated": set()}
    for _ in range(40):
        for role, text in sampler.texts([0])[0]:
            seen[role].add(text)
    read = llama.tokenizer.decode
    borrowed = [read(text.ids) for role in ("neighbours", "unrelated") for text in seen[role]]
    assert not any("France" in text for text in borrowed)
    kin = {t for i in (1, 2) for t in (texts[i].edit, *texts[i].paraphrases, *texts[i].neighbours)}
    assert seen["neighbours"] == kin | set(texts[0].neighbours)
    unrelated = {read(text.ids) for text in seen["unrelated"]}
    assert any("Chad" in text or "Fiji" in text for text in unrelated)
    assert not any("United Kingdom" in text or "Japan" in text for text in unrelated)
    bare = [replace(EXAMPLES[0], subject=None), *EXAMPLES[1:]]
    texts = prepare_texts(llama, h, bare)
    sampler = Sampler(texts, h)
    for _ in range(10):  # without a subject nothing is borrowed
        assert dict(sampler.texts([0])[0])["neighbours"] in texts[0].neighbours


def test_hard_negatives_take_their_share_of_the_neighbours(llama):
    h = quick(hard_negatives=1.0, neighbours_per_edit=2, texts_per_role=1)
    texts = training_texts(llama, h, EXAMPLES)
    hard = texts[0].hard
    written = {llama.tokenizer.decode(text.ids) for text in hard}
    assert len(hard) == 2 and not any("France is" in text for text in written)
    for share, few, many in ((1.0, 2, 2), (0.5, 0.8, 1.2), (0.0, 0, 0)):
        sampler = Sampler(texts, h.replace(hard_negatives=share))
        drawn = [dict.fromkeys(t for r, t in sampler.texts([0])[0] if r == "neighbours")
                 for _ in range(200)]  # fmt: skip
        assert few <= sum(text in hard for texts_of in drawn for text in texts_of) / 200 <= many


def test_swapped_edits_are_made_with_any_wording_and_the_others_are_paraphrases(llama):
    texts = prepare_texts(llama, hparams(), EXAMPLES)
    wordings, seen = {texts[0].edit, *texts[0].paraphrases}, set()
    sampler = Sampler(texts, hparams(swap=1.0, paraphrases_per_edit=9))
    for _ in range(40):
        (role, edit), *rest = sampler.texts([0])[0]
        paraphrases = {text for other, text in rest if other == "paraphrases"}
        assert role == "edit" and paraphrases == wordings - {edit}
        seen.add(edit)
    assert seen == wordings


# ---------------------------------------- statistics


def test_statistics_may_come_from_examples_held_out_of_training(llama, tmp_path):
    some = dict(texts_per_role=[2, 1, 1], stats_held_out=True, stats_examples=2)
    h = quick(whiten=0.1, edit_tokens="scored", **some)
    ready = prepared(llama, h)
    assert len(ready.train) == 3 and len(ready.held_out) == 2
    first = ready.train[0]
    assert [len(first.paraphrases), len(first.neighbours), len(first.unrelated)] == [2, 1, 1]
    result = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert result.normaliser_examples == 2
    moments = load_archive(result.archive, base=llama).mend.moments.values()
    tokens = sum(len(edit_tokens(llama, h, e).scored) for e in EXAMPLES[3:])
    assert all(int(m["u"].count) == int(m["delta"].count) == tokens for m in moments)


def test_paired_statistics_are_of_the_answer_tokens_of_all_texts(llama):
    paired = dict(whiten_pairs=True, unit_response=True, edit_tokens="scored", hard_negatives=0.5)
    ready = prepared(llama, quick(stats_examples=4, whiten=0.1, **paired))
    chosen = ready.statistics_examples()
    texts = [text for example in chosen for text in example.all()]
    tokens = sum(len(text.scored) for text in texts)
    (inputs, groups, first) = next(iter(ready.wording_inputs(chosen)))
    assert {len(u) for u in inputs.values()} == {len(groups)} == {len(first)} == {tokens}
    sizes = torch.bincount(groups[groups >= 0]).tolist()
    assert sizes == [1 + len(e.paraphrases) for e in chosen for _ in e.edit.scored]
    beside = [t for e in chosen for t in (*e.neighbours, *e.unrelated, *e.hard)]
    assert int((groups < 0).sum()) == sum(len(text.scored) for text in beside)
    assert int(first.sum()) == len(texts)
    mend, _ = ready.make({})
    assert all(int(m["u"].count) == tokens for m in mend.moments.values())


# ---------------------------------------- where the step sizes start


@pytest.mark.parametrize("unit", [1.0, 2.0**12])
def test_the_best_start_is_the_least_loss_of_the_grid_whatever_the_scale(llama, unit):
    h = hparams(edit_lr="auto", cedit=0.5)
    mend, powers = with_statistics(llama, MEND(llama.sites, h)), range(-24, 12)
    mend.edit_lr_unit.fill_(unit)
    editor, strengths = MENDEditor(llama, mend), [2 ** (k / 2) / unit for k in powers]
    kept = dict(neighbours=EXAMPLES[0].neighbours[:1], unrelated=EXAMPLES[0].unrelated[:1])
    some = [replace(e, paraphrases=e.paraphrases[:1], **kept) for e in EXAMPLES]
    losses = [row["loss"] for row in strength_curve(editor, some, strengths=strengths)]
    expected = 2 ** (powers[losses.index(min(losses))] / 2)
    texts, trunk = prepare_texts(llama, h, some), FrozenTrunk(llama)
    assert best_edit_lr(trunk, mend, texts, h) * unit == pytest.approx(expected)


def test_no_step_is_best_where_none_lowers_the_loss(llama):
    h = hparams(edit_lr="auto", cedit=0.0)
    mend = with_statistics(llama, MEND(llama.sites, h))
    with pytest.raises(HyperParamError, match="edit_lr: auto found no step"):
        best_edit_lr(FrozenTrunk(llama), mend, prepare_texts(llama, h, EXAMPLES), h)


def test_a_measured_start_trains_as_the_same_number_given(llama, tmp_path):
    found = train(quick(edit_lr="auto"), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "a")
    archive = inspect_archive(found.archive)
    assert archive["hparams"]["edit_lr"] == found.edit_lr != 1e-4
    given = quick(edit_lr=found.edit_lr)
    other = train(given, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "b").archive
    assert found.archive.read_bytes() == other.read_bytes()
    more = quick(edit_lr="auto", archive=str(other))  # an archive's steps have started
    third = train(more, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "c")
    assert third.edit_lr == found.edit_lr


def test_a_scan_of_data_without_neighbours_leaves_their_columns_empty(llama):
    examples = [replace(example, neighbours=()) for example in EXAMPLES]
    rows = scan_blocks(llama, hparams(whiten=0.05), examples, examples[:3])
    assert all(row["auc"] is row["neighbours"] is None and row["paraphrases"] for row in rows)


def test_a_scan_tells_which_share_of_an_edit_other_texts_get(llama):
    h, block = hparams(whiten=0.05), 1
    rows = scan_blocks(llama, h, EXAMPLES, EXAMPLES[:3])
    assert [row["block"] for row in rows] == [0, 1, 2, 3]

    def inputs(text):  # of the block's MLP, where tokens of the answer are predicted
        found = []
        mlp = llama.model.model.layers[block].mlp
        handle = mlp.register_forward_hook(lambda _, args, __: found.append(args[0][0].double()))
        llama.model(torch.tensor([text.ids]))
        handle.remove()
        return found[0][list(text.scored)]

    with torch.no_grad():
        # K P K, with the second moment of all texts, and of an answer's start in two wordings
        size = llama.model.config.hidden_size
        moment, pairs, n = torch.zeros(size, size).double(), torch.zeros(size, size).double(), 0
        for example in prepare_texts(llama, h, EXAMPLES):
            for text in (
                example.edit,
                *example.paraphrases,
                *example.neighbours,
                *example.unrelated,
            ):
                for x in inputs(text):
                    moment, n = moment + torch.outer(x, x), n + 1
            alike = [inputs(text)[0] for text in (example.edit, *example.paraphrases)]
            for a in range(len(alike)):
                for b in range(len(alike)):
                    if a != b:
                        pairs += torch.outer(alike[a], alike[b])
        moment /= n
        ridge = 0.05 * moment.diagonal().mean() * torch.eye(size)
        inverse = torch.linalg.inv(moment + ridge)
        matrix = inverse @ pairs @ inverse
        shares, right = {"paraphrases": [], "neighbours": [], "unrelated": []}, []
        for example in prepare_texts(llama, h, EXAMPLES[:3]):
            x = inputs(example.edit)[0]
            here = {}
            for role, found in shares.items():
                of = [inputs(text)[0] for text in getattr(example, role)]
                here[role] = [float(y @ matrix @ x / (x @ matrix @ x)) for y in of]
                found += here[role]
            for para in here["paraphrases"]:
                right += [para > neighbour for neighbour in here["neighbours"]]
    assert right and rows[block]["auc"] == pytest.approx(fmean(right))
    for role, found in shares.items():
        assert rows[block][role] == pytest.approx(
            float(torch.tensor(found).quantile(0.5)), rel=1e-3
        )


def test_subjects_that_training_shares_with_validation_are_named(llama, tmp_path, caplog):
    h = hparams(max_iters=0, val_steps=2)
    train(h, EXAMPLES[2:], EXAMPLES, base=llama, run_dir=tmp_path)
    assert "in training and in validation" not in caplog.text  # the first two alone are validated
    train(h, EXAMPLES[1:], EXAMPLES, base=llama, run_dir=tmp_path)
    assert "1 subjects are in training and in validation: the United Kingdom" in caplog.text


# ---------------------------------------- whole runs


def test_accumulating_is_one_large_batch(llama, tmp_path):
    every = dict(paraphrases_per_edit=9, neighbours_per_edit=9, unrelated_per_edit=9, max_iters=1)
    sizes = {"large": {"batch_size": 4}, "small": {"batch_size": 2, "accumulate_bs": 2}}
    tensors = {}
    for name, size in sizes.items():
        h = hparams(**every, **size)
        result = train(h, EXAMPLES[:4], EXAMPLES[:1], base=llama, run_dir=tmp_path / name)
        tensors[name] = load_archive(result.archive, base=llama).mend.state_dict()
    for name, value in tensors["large"].items():
        torch.testing.assert_close(tensors["small"][name], value, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(llama, tmp_path):
    files = {}
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        h, folder = quick(seed=seed), tmp_path / name
        files[name] = train(h, EXAMPLES, EXAMPLES[:2], base=llama, run_dir=folder).archive
    a, b, c = (files[name].read_bytes() for name in "abc")
    assert a == b != c  # the whole file: it tells of no times
    first, other = (load_archive(files[name], base=llama).mend.edit_lrs for name in "ac")
    assert first != other


def test_the_archive_holds_the_mean_of_the_steps_and_steps_do_not_depend_on_it(
    llama, tmp_path, monkeypatch
):
    seen, step = [], Learner.step

    def watched(learner, *numbers):
        seen.append({n: p.detach().clone() for n, p in learner.mend.named_parameters()})
        return step(learner, *numbers)

    monkeypatch.setattr(Learner, "step", watched)
    files = {}
    for decay in (0.0, 0.2):
        scores(monkeypatch, [0.1 * k for k in range(9)])  # the last is the best
        h = hparams(ema_decay=decay, max_iters=5, val_interval=1, lr=1e-2, edit_lr=1e-3)
        run_dir = tmp_path / str(decay)
        files[decay] = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=run_dir).archive
    plain, averaged = seen[:5], seen[5:]
    last = dict(load_archive(files[0.0], base=llama).mend.named_parameters())
    means = dict(load_archive(files[0.2], base=llama).mend.named_parameters())
    for name in last:
        assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, averaged, strict=True))
        expected = plain[0][name]
        for number, after in enumerate([*plain[1:], last], start=1):
            decay = min(0.2, number / (number + 10))
            expected = decay * expected + (1 - decay) * after[name]
        torch.testing.assert_close(means[name], expected, rtol=1e-5, atol=1e-8)
    assert any(not torch.allclose(means[name], last[name]) for name in last)


def test_step_sizes_move_with_their_own_learning_rate(llama, tmp_path):
    for lr_lr, moves in ((1e-2, True), (0.0, False)):
        h, folder = quick(lr_lr=lr_lr, edit_lr=1e-3), tmp_path / str(moves)
        archive = train(h, EXAMPLES, EXAMPLES, base=llama, run_dir=folder).archive
        mend = load_archive(archive, base=llama).mend
        changed = [abs(lr - 1e-3) > 1e-8 for lr in mend.edit_lrs.values()]
        assert all(changed) if moves else not any(changed)


def test_training_learns_and_tells_its_history(llama, tmp_path):
    h = hparams(max_iters=100, val_interval=50, batch_size=5, lr=1e-2, edit_lr=3e-3, lr_lr=5e-2)
    result = train(h, EXAMPLES, EXAMPLES, base=llama, run_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == result.history
    losses = {"loss", "edit", "paraphrases", "neighbours", "unrelated", "grad_norm"}
    assert losses <= set(rows[1])
    frame = result.frame()
    validations = frame["val.loss"].dropna()
    assert len(frame) == len(rows) and len(validations) == 3
    assert validations.iloc[-1] < 0.5 * validations.iloc[0]
    assert "archive.safetensors, score" in repr(result) and "\n" not in repr(result)


def test_the_best_archive_is_kept_not_the_last_and_there_is_always_one(
    llama, tmp_path, monkeypatch
):
    h = hparams(max_iters=4, val_interval=1, batch_size=2)
    scores(monkeypatch, [0.1, 0.3, 0.9, 0.2, 0.4])
    result = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert result.best["step"] == 2
    assert inspect_archive(result.archive)["training"]["best"]["step"] == 2
    scores(monkeypatch, [0.9, 0.1])  # the untrained one is best, and not kept
    h = h.replace(max_iters=1, val_interval=1000)
    assert train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path).best["step"] == 1


def test_early_stopping_and_a_time_budget_stop(llama, tmp_path, monkeypatch):
    hurried = quick(max_seconds=1e-6)
    result = train(hurried, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert "time budget" in result.stopped and result.archive.is_file()
    scores(monkeypatch, [0.5] * 50)
    h = hparams(max_iters=50, val_interval=1, early_stop_patience=3, batch_size=2)
    result = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert "no better score for 3 steps" in result.stopped
    steps = [row["step"] for row in result.history]
    assert max(steps) == 4 and steps[0] == 0  # another run's history is gone
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == len(steps)


def test_an_archive_is_the_same_whatever_the_folders_of_its_maker(llama, tmp_path):
    written = []
    for place in ("one", "another, of another name"):
        folder = tmp_path / place
        model = str(save_tiny(folder / "a model", llama))
        own = {"cache_dir": str(folder / "cache"), "results_dir": str(folder)}
        h = quick(disk_cache_bytes=10**8).replace(model_name=model, tokenizer_name=model, **own)
        first = train(h, EXAMPLES, EXAMPLES[:1], run_dir=folder / "first").archive
        h = h.replace(archive=str(first))
        second = train(h, EXAMPLES, EXAMPLES[:1], run_dir=folder / "second").archive
        written.append((first.read_bytes(), second.read_bytes()))
    assert written[0] == written[1] and written[0][0] != written[0][1]
    assert not any(str(tmp_path).encode() in content for content in written[0])


def test_going_on_from_an_archive_keeps_its_sites_shape_and_weights(llama, tmp_path, caplog):
    fewer, first = llama.with_sites([site.name for site in llama.sites[:2]]), tmp_path / "first"
    h = quick(edit_tokens="scored")
    source = train(h, EXAMPLES, EXAMPLES[:1], base=fewer, run_dir=first).archive
    h = quick(lr=0.0, lr_lr=0.0).replace(archive=str(source))
    result = train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "second")
    assert "training continues" in caplog.text
    a, b = (load_archive(path, base=llama) for path in (source, result.archive))
    assert [site.name for site in b.mend.sites] == [site.name for site in fewer.sites]
    assert (b.mend.hparams.rank, b.mend.hparams.edit_tokens) == (8, "scored")
    assert b.metadata["training"]["continued_from"] == file_sha256(source)
    before, after = a.mend.state_dict(), b.mend.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
