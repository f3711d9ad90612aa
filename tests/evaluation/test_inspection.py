"""What notebook 03 measures, against dense matrices in float64, with controls that must fail."""

import pytest
import torch
from torch import Tensor

from mendkit.evaluation import inspection
from mendkit.mend.archive import load_archive, save_archive
from mendkit.mend.batches import edit_tokens, prepare_texts
from mendkit.mend.edit import Edit
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.training import train
from mendkit.mend.updates import LowRankUpdate
from mendkit.models.base import BaseModel
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams, scrambled, with_statistics
from tests.oracles.tiny import save_tiny


def texts_of(base: BaseModel) -> list:
    return [edit_tokens(base, hparams(), example) for example in EXAMPLES]


def trained(base: BaseModel, **changes) -> MEND:
    """An editor that is not the identity."""
    mend = MEND(base.sites, hparams(edit_lr=1e-3, **changes)).double()
    return scrambled(with_statistics(base, mend))


def dense(update: LowRankUpdate) -> Tensor:
    """ΔW of every edit, (b, o, i)."""
    return update.coefficient * torch.einsum("bto,bti->boi", update.delta, update.u)


def test_the_dense_gradient_is_the_models_and_the_sum_of_rank_one_terms(base64):
    """The scored tokens alone are not enough below the last block."""
    text = texts_of(base64)[2]
    found = inspection.weight_gradients(base64, text)
    assert not any(p.requires_grad or p.grad is not None for p in base64.model.parameters())
    for site in base64.sites:
        weight = base64.site_module(site).weight.requires_grad_()
        logp = base64.model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
        losses = -logp[list(text.scored), list(text.targets)]
        (gradient,) = torch.autograd.grad(losses.mean(), [weight])
        weight.requires_grad_(False)
        expected = gradient.T if site.transposed else gradient
        # Llama's norms compute in float32.
        torch.testing.assert_close(found[site.name], expected, rtol=1e-4, atol=1e-7)
    below = {site.name for site in base64.sites if not site.scored_only}
    rows = inspection.rank_rows(base64, texts_of(base64))
    assert len(rows) == len(EXAMPLES) * len(base64.sites)
    for row in rows:
        assert row["error"] < 1e-6 and 1 <= row["rank"] <= min(row["tokens"], row["full_rank"])
        assert (row["scored_error"] > 0.01) == (row["site"] in below)


def test_the_first_stage_is_gradient_descent_and_later_ones_are_not(llama64):
    """Identity initialisation without a normaliser: ΔW = −α ∇L. The others differ."""
    base, texts = llama64, texts_of(llama64)
    mend, trunk = trained(base, edit_tokens="scored"), FrozenTrunk(llama64)
    stages = inspection.stages(base, mend, texts)
    assert list(stages) == [inspection.ALL, inspection.SCORED, inspection.PER_FEATURE]
    control = inspection.restarted(base, mend, init="xavier")
    mends = {**stages, "control": control, "trained": mend}
    updates = {name: inspection.updates_of(trunk, m.double(), texts) for name, m in mends.items()}
    gradient = inspection.true_gradients(trunk, texts, reduction="edit")
    for k, text in enumerate(texts):
        for name, true in inspection.weight_gradients(base, text).items():
            delta = dense(updates[inspection.ALL][name].select([k]))[0]
            torch.testing.assert_close(delta, -1e-3 * true, rtol=1e-4, atol=1e-9)
    weights = {site.name: float(base.site_weight(site).norm()) for site in base.sites}
    rows = inspection.anatomy(base, updates, gradient)
    for name in mends:
        cosine = min(row["cosine"] for row in rows if row["series"] == name)
        assert cosine > 1 - 1e-6 if name == inspection.ALL else cosine < 0.99
    for row in rows:
        chosen = (updates[row["series"]][row["site"]], gradient[row["site"]])
        change, true = (dense(u.select([row["example"]])).flatten() for u in chosen)
        assert row["cosine"] == pytest.approx(-float(torch.cosine_similarity(change, true, 0)))
        assert row["step"] == pytest.approx(float(change.norm() / true.norm()))
        assert row["norm"] == pytest.approx(float(change.norm()) / weights[row["site"]])


def test_the_stages_of_a_whitened_editor_end_with_its_statistics(llama):
    mend, texts = trained(llama, whiten=0.1).float(), texts_of(llama)
    stages = inspection.stages(llama, mend, texts)
    assert list(stages) == [inspection.ALL, inspection.PER_FEATURE, inspection.WHITENED]
    for name, value in stages[inspection.WHITENED].moments.state_dict().items():
        assert torch.equal(value, mend.moments.state_dict()[name])
    plain = inspection.stages(llama, trained(llama, norm=False).float(), texts)
    assert list(plain) == [inspection.ALL, inspection.PER_FEATURE]


def test_spectra_are_shares_of_the_dense_matrices_energy(llama64):
    updates = inspection.updates_of(FrozenTrunk(llama64), trained(llama64), texts_of(llama64))
    rows = inspection.energy_spectra({"trained": updates}, most=5)
    energy = [torch.linalg.svdvals(dense(update))[:, :5] ** 2 for update in updates.values()]
    whole = torch.cat([update.norms() ** 2 for update in updates.values()])
    expected = (torch.cat(energy).cumsum(1) / whole[:, None]).mean(0).tolist()
    assert [row["share"] for row in rows] == pytest.approx(expected)
    assert [row["directions"] for row in rows] == [*range(1, 6)]


def test_a_weight_change_is_told_as_its_dense_matrices_are(llama64):
    mend, text = trained(llama64), texts_of(llama64)[0]
    edit = Edit(llama64, inspection.updates_of(FrozenTrunk(llama64), mend, [text]), EXAMPLES[:1])
    frame, relative = inspection.weight_change(edit.scale(-2)), edit.relative_norm()
    for site, matrix in edit.dense().items():
        values = torch.linalg.svdvals(matrix)
        row = frame.loc[site]
        assert row["norm"] == pytest.approx(2 * float(values.norm()))
        assert row["relative_norm"] == pytest.approx(2 * relative[site])
        assert row["share"] == pytest.approx(float(values[0] ** 2 / values.square().sum()))
        assert 1 <= row["tokens"] <= len(text.ids)


def test_a_sweep_reaches_the_sizes_asked_for_and_its_sign_decides(llama):
    """In the limit of small steps minus lowers the loss as plus raises it."""
    mend = inspection.stages(llama, trained(llama).float(), texts_of(llama))[inspection.ALL]
    examples, trunk = prepare_texts(llama, mend.hparams, EXAMPLES), FrozenTrunk(llama)
    nothing, minus, plus = inspection.sweep(trunk, mend, examples, sizes=[0, 1e-3, -1e-3])
    assert nothing["strength"] == 0 and nothing["locality"] == 1
    down, up = (row["loss.edit"] - nothing["loss.edit"] for row in (minus, plus))
    assert down < 0 < up and up == pytest.approx(-down, rel=0.2)
    weight = sum(llama.site_weight(site).double().square().sum() for site in llama.sites).sqrt()
    squares = torch.zeros(len(EXAMPLES))
    for update in inspection.updates_of(trunk, mend, [e.edit for e in examples]).values():
        squares += dense(update.scaled(minus["strength"])).square().sum((1, 2))
    assert float(squares.sqrt().mean() / weight) == pytest.approx(1e-3, rel=1e-4)


def test_without_an_archive_the_editor_says_so(tmp_path, llama):
    settings = hparams(whiten=0.1).replace(model_name=str(save_tiny(tmp_path / "model")))
    untrained = inspection.open_editor(settings, EXAMPLES)
    assert untrained.name == "untrained" and untrained.mend.hparams.whiten == 0.1
    start = settings.replace(max_iters=0, stats_held_out=False, val_steps=2)
    result = train(start, EXAMPLES, EXAMPLES[:2], base=untrained.base, run_dir=tmp_path / "run")
    begun = load_archive(result.archive, base=untrained.base).mend.state_dict()
    for name, value in untrained.mend.state_dict().items():
        assert torch.equal(value, begun[name]), name
    assert "never trained" in inspection.about(untrained)["hypernetwork"]
    path = save_archive(tmp_path / "archive.safetensors", untrained.base, untrained.mend)
    editor = inspection.open_editor(settings.replace(archive=str(path)), EXAMPLES)
    assert editor.name == "trained" and inspection.about(editor)["hypernetwork"] == "trained"
