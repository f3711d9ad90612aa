"""What notebook 03 measures, against dense matrices in float64, with controls that must fail."""

import pytest
import torch
from torch import Tensor

from mendkit.errors import ArchiveError
from mendkit.evaluation import inspection
from mendkit.mend.archive import save_archive
from mendkit.mend.batches import edit_tokens, prepare_texts
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.updates import LowRankUpdate
from mendkit.models.base import BaseModel
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams, scrambled, with_statistics
from tests.oracles.tiny import save_tiny


def texts_of(base: BaseModel) -> list:
    return [edit_tokens(base, hparams(), example) for example in EXAMPLES]


def trained(base: BaseModel, **changes) -> MEND:
    """An editor that is not the identity."""
    return scrambled(
        with_statistics(base, MEND(base.sites, hparams(edit_lr=1e-3, **changes)).double())
    )


def random_update(b: int, t: int, i: int, o: int, coefficient: float, seed: int) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda width: torch.randn(b, t, width, generator=generator, dtype=torch.float64)  # noqa: E731
    return LowRankUpdate(draw(i), draw(o), coefficient)


def dense(update: LowRankUpdate) -> Tensor:
    """ΔW of every edit, (b, o, i)."""
    return update.coefficient * torch.einsum("bto,bti->boi", update.delta, update.u)


@pytest.mark.parametrize("shape", [(3, 9, 7), (12, 9, 7), (8, 5, 20)])  # tokens, inputs, outputs
def test_low_rank_algebra_is_that_of_the_dense_matrices(shape: tuple[int, int, int]) -> None:
    t, i, o = shape
    a, b = random_update(4, t, i, o, -0.3, 0), random_update(4, t + 1, i, o, 2.0, 1)
    x, y = dense(a), dense(b)
    torch.testing.assert_close(a.inner(b), (x * y).sum((1, 2)))
    torch.testing.assert_close(a.norms(), x.flatten(1).norm(dim=1))
    torch.testing.assert_close(
        inspection.cosines(a, b),
        torch.cosine_similarity(x.flatten(1), y.flatten(1), dim=1),
        rtol=1e-10,
        atol=1e-12,
    )
    expected = torch.linalg.svdvals(x)[:, : min(shape)]
    torch.testing.assert_close(inspection.singular_values(a), expected, rtol=1e-10, atol=1e-12)


def test_an_update_of_nothing_has_cosine_zero_and_padding_counts_nothing() -> None:
    a, nothing = random_update(2, 3, 5, 4, 1.0, 0), random_update(2, 3, 5, 4, 0.0, 1)
    assert inspection.cosines(a, nothing).tolist() == [0, 0]
    longer = LowRankUpdate(*(torch.nn.functional.pad(x, (0, 0, 0, 2)) for x in (a.u, a.delta)), 1.0)
    torch.testing.assert_close(longer.inner(a), a.inner(a))
    torch.testing.assert_close(
        inspection.singular_values(longer)[:, :3], inspection.singular_values(a)[:, :3]
    )


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
@pytest.mark.parametrize("reduction", ["edit", "sum"])
def test_the_dense_gradient_is_that_of_the_model_run_by_hand(
    family: str, reduction: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(family)
    text = texts_of(base)[2]
    found = inspection.weight_gradients(base, text, reduction=reduction)
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    for site in base.sites:
        weight = base.site_module(site).weight.requires_grad_()
        logp = base.model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
        loss = -sum(logp[at, target] for at, target in zip(text.scored, text.targets, strict=True))
        loss = loss if reduction == "sum" else loss / len(text.targets)
        (gradient,) = torch.autograd.grad(loss, [weight])
        weight.requires_grad_(False)
        expected = gradient.T if site.transposed else gradient
        # Llama's norms compute in float32
        torch.testing.assert_close(found[site.name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_gradients_are_sums_of_rank_one_terms_and_the_scored_ones_alone_are_not(
    family: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(family)
    rows = inspection.rank_rows(base, texts_of(base))
    assert len(rows) == len(EXAMPLES) * len(base.sites)
    assert all(
        row["error"] < 1e-6 and 1 <= row["rank"] <= min(row["tokens"], row["full_rank"])
        for row in rows
    )
    below = {site.name for site in base.sites if not site.scored_only}
    assert all((row["scored_error"] > 0.01) == (row["site"] in below) for row in rows)


def test_the_first_stage_is_gradient_descent_and_later_ones_are_not(llama64: BaseModel) -> None:
    """Identity initialisation without a normaliser: ΔW = −α ∇L. A normaliser or blocks without identity differ."""
    base, texts = llama64, texts_of(llama64)
    mend = trained(base, edit_tokens="scored")
    stages = inspection.stages(base, mend, texts)
    assert list(stages) == [inspection.ALL, inspection.SCORED, inspection.PER_FEATURE]
    trunk, control = FrozenTrunk(base), inspection.restarted(base, mend, init="xavier")
    mends = {**stages, "control": control, "trained": mend}
    updates = {name: inspection.updates_of(trunk, m.double(), texts) for name, m in mends.items()}
    gradient = inspection.gradients(trunk, texts, reduction="edit")
    for k, text in enumerate(texts):
        for name, true in inspection.weight_gradients(base, text).items():
            delta = dense(updates[inspection.ALL][name].select([k]))[0]
            torch.testing.assert_close(delta, -1e-3 * true, rtol=1e-4, atol=1e-9)
    rows = inspection.anatomy(base, updates, gradient)
    cosine = {name: [r["cosine"] for r in rows if r["series"] == name] for name in mends}
    assert min(cosine[inspection.ALL]) > 1 - 1e-6
    assert all(min(values) < 0.99 for name, values in cosine.items() if name != inspection.ALL)
    for row in rows:
        update, true = (
            own[row["site"]].select([row["example"]]) for own in (updates[row["series"]], gradient)
        )
        site = next(site for site in base.sites if site.name == row["site"])
        sizes = [
            float(x.norm()) for x in (dense(update), dense(true), base.site_module(site).weight)
        ]
        assert row["step"] == pytest.approx(sizes[0] / sizes[1]) and row["norm"] == pytest.approx(
            sizes[0] / sizes[2]
        )


def test_the_first_stage_of_a_whitened_editor_ends_with_its_own_statistics(
    llama: BaseModel,
) -> None:
    mend = trained(llama, whiten=0.1).float()
    stages = inspection.stages(llama, mend, texts_of(llama))
    assert list(stages) == [inspection.ALL, inspection.PER_FEATURE, inspection.WHITENED]
    for name, value in stages[inspection.WHITENED].moments.state_dict().items():
        assert torch.equal(value, mend.moments.state_dict()[name])
    assert list(inspection.stages(llama, trained(llama, norm=False).float(), texts_of(llama))) == [
        inspection.ALL, inspection.PER_FEATURE,
    ]  # fmt: skip


def test_spectra_are_shares_of_the_dense_matrices_energy(llama64: BaseModel) -> None:
    texts = texts_of(llama64)
    updates = inspection.updates_of(FrozenTrunk(llama64), trained(llama64), texts)
    rows = inspection.spectra({"trained": updates}, most=5)
    shares = []
    for update in updates.values():
        for matrix in dense(update):
            energy = torch.linalg.svdvals(matrix.detach().double()) ** 2
            shares.append((energy / energy.sum()).cumsum(0)[:5])
    expected = torch.stack(shares).mean(0).tolist()
    assert [row["share"] for row in rows] == pytest.approx(expected) and [
        r["directions"] for r in rows
    ] == [*range(1, 6)]


def test_a_sweep_reaches_the_sizes_asked_for_and_its_sign_decides(llama: BaseModel) -> None:
    """In the limit of small steps minus lowers the loss as plus raises it; 0 leaves the model alone."""
    mend = inspection.stages(llama, trained(llama).float(), texts_of(llama))[inspection.ALL]
    examples, trunk = prepare_texts(llama, mend.hparams, EXAMPLES), FrozenTrunk(llama)
    nothing, minus, plus = inspection.sweep(trunk, mend, examples, sizes=[0, 1e-3, -1e-3])
    assert nothing["strength"] == 0 and nothing["locality"] == 1
    down, up = (row["loss.edit"] - nothing["loss.edit"] for row in (minus, plus))
    assert down < 0 < up and up == pytest.approx(-down, rel=0.2)
    weight = sum(llama.site_module(s).weight.double().square().sum() for s in llama.sites).sqrt()
    updates = inspection.updates_of(trunk, mend, [e.edit for e in examples])
    size = (
        sum(dense(u.scaled(minus["strength"])).square().sum((1, 2)) for u in updates.values())
        .sqrt()
        .mean()
        / weight
    )
    assert float(size) == pytest.approx(1e-3, rel=1e-4)


def test_without_an_archive_the_editor_says_so(tmp_path, llama: BaseModel) -> None:
    own = hparams(whiten=0.1).replace(model_name=str(save_tiny(tmp_path / "model")))
    untrained = inspection.open_editor(own, EXAMPLES)
    assert untrained.name == "untrained" and untrained.mend.hparams.whiten is None
    assert "never trained" in inspection.about(untrained)["hypernetwork"]
    path = save_archive(tmp_path / "archive.safetensors", untrained.base, untrained.mend)
    editor = inspection.open_editor(own.replace(archive=str(path)), EXAMPLES)
    assert editor.name == "trained" and inspection.about(editor)["hypernetwork"] == "trained"
    with pytest.raises(ArchiveError, match="no such archive"):
        inspection.open_editor(own.replace(archive="no/such.safetensors"), EXAMPLES)
