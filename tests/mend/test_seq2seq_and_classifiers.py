"""Sequence-to-sequence models and classifiers: what holds for a causal model holds for them.

Oracles: the tokens' spelling, single texts through the whole model, a loop with dense weights.
"""

import pytest
import torch
import transformers
from torch import nn
from transformers import AlbertConfig, AutoConfig, DistilBertConfig, GPT2Config, LlamaConfig

from mendkit.cost.textbook import check_recipe
from mendkit.errors import DataError, HyperParamError, MendkitError, ModelError
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.mend.batches import edit_tokens, prepare_texts
from mendkit.mend.factors import FactorCache, capture_factors, capture_inputs
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.losses import edit_nll
from mendkit.mend.steps import batch_losses, total_loss
from mendkit.mend.validation import next_tokens
from mendkit.models.base import BaseModel
from mendkit.models.checkpoints import loader_of
from mendkit.models.tokens import collate, tokenize_pair
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import (
    EXAMPLES,
    assert_factors_rebuild_the_gradient,
    examples_of,
    hparams,
    plain_logits,
    scrambled,
)
from tests.oracles.families import other_base
from tests.oracles.kinds import ANSWERS, BOS, EOS, KINDS, PROMPTS, UNK, spelling, tokenizer_of
from tests.oracles.tiny import tiny_tokenizer

CASE = pytest.mark.parametrize("case", ["t5", "t5-v1.1", "bart", "bert", "bert, 3 classes"])


# ---------------------------------------- alignment


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_eos", [False, True])
def test_a_decoders_scored_positions_predict_exactly_the_answers_characters(kind, add_eos):
    tokenizer, start, count = tokenizer_of(kind), 77, 0
    plain = str.encode
    if kind.startswith("WordPiece"):
        plain = lambda s: "".join(s.lower().split()).encode()  # noqa: E731
    for prompt, answer in ((p, a) for p in PROMPTS[:2] for a in ANSWERS):
        text = tokenize_pair(tokenizer, prompt, answer, start=start, add_eos=add_eos)
        assert list(text.ids) == tokenizer(prompt)["input_ids"]
        names = tokenizer.convert_ids_to_tokens(list(text.targets))
        assert (names[-1] == EOS) == add_eos == text.ends and not {BOS, EOS} & set(names[:-1])
        spelt = b"".join(spelling(kind, name) for name in names[: len(names) - add_eos])
        if UNK not in names and not (kind.startswith("WordPiece") and "é" in answer):
            assert plain(answer) in (spelt, spelt.removeprefix(b" ")), (answer, names)
            count += 1
        first = text.scored[0]  # a decoder's input is its output, one later
        assert text.scored == tuple(range(first, first + len(text.targets)))
        assert text.decoder[0] == start and text.decoder[first + 1 :] == text.targets[:-1]
        lead = tokenizer.convert_ids_to_tokens(list(text.decoder[1 : first + 1]))
        assert lead == ([BOS] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else [])
        bare = tokenize_pair(tokenizer, prompt, start=start)
        assert bare.decoder == text.decoder[: first + 1]
        assert bare.scored == (first,) and bare.targets == ()
    assert count >= 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["t5", "bert"])
def test_padding_on_either_side_does_not_change_the_loss(kind, case):
    base = other_base(case, kind)
    answers = ANSWERS if case == "t5" else ["true", "REFUTES", "0", "Supports"]
    texts = []
    for prompt, answer in zip(PROMPTS, answers, strict=False):
        texts.append(base.tokenize(prompt, answer, add_eos=True))
    assert len({len(text.ids) for text in texts}) > 1
    targets = [torch.tensor(text.targets) for text in texts]
    with torch.no_grad():
        losses = []
        for text, target in zip(texts, targets, strict=True):
            losses.append(nn.functional.cross_entropy(plain_logits(base, text), target))
        alone = torch.stack(losses)
        trunk, batch = FrozenTrunk(base), collate(texts, base.pad_id)
        for _ in range(2):  # without and with a cache
            got = edit_nll(trunk.suffix(texts, batch), batch.targets, batch.rows, len(texts))
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
            trunk.fill(texts)
        ids, mask = base.left_pad([text.ids for text in texts])
        if case == "t5":  # relative positions
            logits = base.model(
                input_ids=ids, attention_mask=mask, decoder_input_ids=batch.decoder_ids
            ).logits
        else:  # absolute ones; the head is handed what stands in place of the padding
            where = (mask.cumsum(1) - 1).clamp(min=0)
            hidden = base.model.bert(
                input_ids=ids, attention_mask=mask, position_ids=where
            ).last_hidden_state
            first = hidden[torch.arange(len(ids)), mask.argmax(1)][:, None]
            logits = base.model.classifier(base.model.bert.pooler(first))
            logits = torch.stack([logits * 0, logits], 2)
        for row, text in enumerate(texts):
            loss = nn.functional.cross_entropy(logits[row, list(text.scored)], targets[row])
            torch.testing.assert_close(loss, alone[row], rtol=1e-4, atol=1e-5)


# ---------------------------------------- the textbook loop


def losses_with_dense_weights(base, mend, edit, texts):
    """One edit the plain way: added to the weights, and whole passes."""
    clean, edited = {}, {}
    for name, update in mend(capture_factors(FrozenTrunk(base), [edit]), 1).items():
        clean[name] = base.model.get_parameter(name)
        edited[name] = clean[name] + update.dense()
    losses = {}
    for role, text in {"edit": edit, "paraphrases": texts["paraphrases"]}.items():
        logits = plain_logits(base, text, edited)
        losses[role] = nn.functional.cross_entropy(logits, torch.tensor(text.targets))
    for role in ("neighbours", "unrelated"):
        p, q = (plain_logits(base, texts[role], w).log_softmax(-1) for w in (clean, edited))
        losses[role] = (p.exp() * (p - q)).sum(-1).mean()
    return losses


def exact(base: BaseModel, monkeypatch) -> BaseModel:
    """In float64, where T5 goes to float32 too (its normalisation, its attention's softmax)."""
    base.model.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in base.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, m=module: (
                m.weight * x * (x.pow(2).mean(-1, True) + m.variance_epsilon).rsqrt()
            )
    return base


@CASE
def test_losses_and_gradients_are_those_of_dense_weights(case, monkeypatch):
    base = exact(other_base(case), monkeypatch)
    h = hparams(edit_lr=1e-3)
    examples = prepare_texts(base, h, examples_of(base)[:3])
    mend = MEND(base.sites, h).double()
    mend.warm_up([capture_factors(FrozenTrunk(base), [e.edit for e in examples])])
    mend = scrambled(mend)
    trunk = FrozenTrunk(base)
    trunk.fill([text for example in examples for text in example.all()])
    factors = FactorCache(trunk, h)
    texts = [
        {role: getattr(e, role)[0] for role in ("paraphrases", "neighbours", "unrelated")}
        for e in examples
    ]
    rows = [[("edit", e.edit), *t.items()] for e, t in zip(examples, texts, strict=True)]
    losses = batch_losses(trunk, mend, factors.get([e.edit for e in examples]), rows)
    gradients = torch.autograd.grad(total_loss(losses, h), list(mend.parameters()))

    plain = [
        losses_with_dense_weights(base, mend, e.edit, t)
        for e, t in zip(examples, texts, strict=True)
    ]
    expected = {role: torch.stack([p[role] for p in plain]).mean() for role in losses}
    for role, value in expected.items():
        torch.testing.assert_close(losses[role], value, rtol=1e-9, atol=1e-11)
        assert float(value.detach()) > 1e-6
    wanted = torch.autograd.grad(total_loss(expected, h), list(mend.parameters()))
    for gradient, value in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-7, atol=1e-10)


@CASE
def test_factors_rebuild_the_gradient_of_the_weights(case, monkeypatch):
    base = exact(other_base(case), monkeypatch)
    texts = [edit_tokens(base, hparams(), example) for example in examples_of(base)[:3]]
    assert_factors_rebuild_the_gradient(base, texts, 1e-9, 1e-10)


def test_what_reads_causal_models_only_says_so():
    t5, bert = other_base("t5"), other_base("bert")
    for base, asked in ((t5, {"fluency": True}), (bert, {"text": "Rome is a city in Italy."})):
        with pytest.raises(MendkitError, match="need a causal model"):
            EvaluationSet(base, hparams(), examples_of(base)[:1], **asked)
    with pytest.raises(MendkitError, match="the textbook edits causal ones"):
        check_recipe(t5, hparams())


@CASE
def test_next_tokens_are_those_of_the_answer(case):
    base = other_base(case)
    prompt = examples_of(base)[0].prompt
    p = plain_logits(base, base.tokenize(prompt))[0].softmax(-1)
    if base.labels:
        names, word, at = base.labels.names, "Refutes", 0
    else:
        names, word = [base.tokenizer.decode([i]) for i in range(len(p))], "Lima"
        at = base.tokenizer("Lima", add_special_tokens=False).input_ids[0]
    told = next_tokens(base, prompt, k=1, among=[word])
    best = int(p.argmax())
    assert told == {names[i]: pytest.approx(float(p[i]), rel=1e-4) for i in (best, at)}
    assert next(iter(told)) == names[best] and len(told) == 2 - (best == at)


def test_a_text_without_tokens_or_too_long_is_refused():
    t5, bart, bert = (other_base(case) for case in ("t5", "bart", "bert"))
    with pytest.raises(DataError, match=r"answer '' of prompt 'a' has no token"):
        t5.tokenize("a", "")
    long = "Lima " * 30
    for base, text in ((t5, (long, "Rome")), (t5, ("a", long)), (bert, (long,))):
        with pytest.raises(DataError, match=r"Lima.*tokens, the limit is 20; raise `max_length`"):
            base.tokenize(*text, max_length=20)
    bart.model.config.max_position_embeddings = 8
    with pytest.raises(DataError, match="exceed the 8 positions"):
        bart.generate("The capital of the United Kingdom is", max_new_tokens=2)


# ---------------------------------------- classifiers


def test_labels_are_found_in_any_spelling_and_an_unknown_one_names_the_legal_ones():
    one, three = other_base("bert"), other_base("bert, 3 classes")
    for label, text in {
        0: ("REFUTES", "false", "0", "Refutes "),
        1: ("SUPPORTS", "True", "1"),
    }.items():
        assert all(one.tokenize("Gold is dry", word).targets == (label,) for word in text)
        assert {one.said(word) for word in text} == {("REFUTES", "SUPPORTS")[label]}
    found = [three.tokenize("Gold", word).targets for word in ("REFUTES", "supports", "nei")]
    assert found == [(0,), (1,), (2,)]
    legal = "refutes, false, 0, supports, true, 1"
    with pytest.raises(DataError, match=f"label 'maybe' is none.*{legal}"):
        one.tokenize("Gold is dry", "maybe")
    with pytest.raises(DataError, match=r"label 'true' is none.*refutes, supports, nei"):
        three.tokenize("Gold is dry", "true")


def test_one_logit_is_two_classes():
    base = other_base("bert")
    text = base.tokenize("Gold is a metal")
    z = base.model(input_ids=torch.tensor([text.ids])).logits[0, 0]
    p = FrozenTrunk(base).suffix([text], collate([text], base.pad_id)).softmax(-1)[0]
    torch.testing.assert_close(p, torch.stack([1 - z.sigmoid(), z.sigmoid()]), rtol=1e-5, atol=1e-6)
    assert base.generate("Gold is a metal") == ("SUPPORTS" if z > 0 else "REFUTES")
    base.model.config.update({"return_dict": False, "output_hidden_states": True})
    other = BaseModel(
        base.model, base.tokenizer, name="a model that returns many tensors in a tuple"
    )
    ids = torch.tensor([text.ids])
    torch.testing.assert_close(other.forward(ids, torch.ones_like(ids))[0, 1], z)


_SMALL = {"num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 400}
_SMALL |= {"intermediate_size": 24, "num_labels": 3}
OTHER_HEADS = {  # class -> its configuration, the position that its head reads
    "GPT2ForSequenceClassification": (GPT2Config(**_SMALL), -1),
    "LlamaForSequenceClassification": (LlamaConfig(**_SMALL), -1),
    "DistilBertForSequenceClassification": (
        DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24),
        0,
    ),
}


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_the_position_that_a_head_reads_is_found_and_factors_follow_it(name):
    config, position = OTHER_HEADS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
    model.config.pad_token_id = None if position else 1
    base = BaseModel(model, tiny_tokenizer(), name=name)
    assert (base.family, base.head.position) == ("classifier", position)
    texts = [base.tokenize(e.prompt, base.labels.names[i % 2]) for i, e in enumerate(EXAMPLES[:3])]
    trunk, batch = FrozenTrunk(base), collate(texts, base.pad_id)
    trunk.fill(texts)
    expected = torch.cat([plain_logits(base, text) for text in texts])
    torch.testing.assert_close(trunk.suffix(texts, batch), expected, rtol=1e-4, atol=1e-5)
    assert_factors_rebuild_the_gradient(base, texts, 1e-3, 1e-4)


class _Mean(nn.Module):
    """Gives every position the mean of the first two."""

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return x[:, :2].mean(1, keepdim=True).expand_as(x)


def test_a_head_that_reads_several_tokens_has_factors_everywhere_and_no_scored_ones():
    model = other_base("bert").model
    model.bert.pooler = nn.Sequential(_Mean(), model.bert.pooler)
    base = BaseModel(model, other_base("bert").tokenizer, name="mean")
    assert base.head.position is None and not any(site.scored_only for site in base.sites)
    texts = [base.tokenize("Gold is a metal", "true")]
    factors = capture_factors(FrozenTrunk(base), texts)
    assert {len(f.u) for f in factors.values()} == {len(texts[0].ids)}
    said = r"scored has no meaning.*reads several tokens; set `edit_tokens: all`"
    with pytest.raises(HyperParamError, match=said):
        capture_factors(FrozenTrunk(base), texts, tokens="scored")


def test_scored_tokens_are_a_decoders_or_the_one_that_a_head_reads():
    t5, bert = other_base("t5"), other_base("bert")
    texts = [edit_tokens(t5, hparams(), example) for example in EXAMPLES[:2]]
    said = r"no meaning for encoder\.block\.1.*`inner_params`"
    with pytest.raises(HyperParamError, match=said):
        capture_factors(FrozenTrunk(t5), texts, tokens="scored")
    with pytest.raises(HyperParamError, match=said):
        capture_inputs(FrozenTrunk(t5), texts)
    decoder = t5.with_sites([site.name for site in t5.sites if not t5.sees_encoder(site)])
    cross = t5.with_sites(["decoder.block.2.layer.1.EncDecAttention.k.weight"])
    count = sum(len(text.scored) for text in texts)
    factors = capture_factors(FrozenTrunk(decoder), texts, tokens="scored")
    assert {len(f.u) for f in factors.values()} == {count}
    (f,) = capture_factors(FrozenTrunk(cross), texts).values()
    assert len(f.u) == sum(len(text.ids) for text in texts)  # keys are made of the encoder's output
    claim = [bert.tokenize("Gold is a metal", "true")]
    for name, f in capture_factors(FrozenTrunk(bert), claim, tokens="scored").items():
        whole = capture_factors(FrozenTrunk(bert), claim)[name]
        torch.testing.assert_close(f.u[0], whole.u[0])
        torch.testing.assert_close(f.delta[0], whole.delta[0])
        assert len(f.u) == 1


def test_a_layer_that_runs_twice_is_refused():
    sizes = {"embedding_size": 16, "hidden_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 3, "intermediate_size": 24, "vocab_size": 400}
    config = AlbertConfig(**sizes)  # three times one layer
    base = BaseModel(
        transformers.AlbertForSequenceClassification(config), tiny_tokenizer(), name="albert"
    )
    assert base.blocks is None
    with pytest.raises(ModelError, match=r"ffn\.weight is used more than once"):
        capture_factors(FrozenTrunk(base), [base.tokenize("Gold is a metal", "LABEL_1")])


def test_classes_without_names_and_several_labels_at_once_are_refused():
    base = other_base("bert, 3 classes")
    base.model.config.id2label = {0: "a", 1: "b"}
    with pytest.raises(ModelError, match="3 logits, its config's id2label 2 names"):
        BaseModel(base.model, base.tokenizer, name="x")
    base.model.config.problem_type = "multi_label_classification"
    with pytest.raises(ModelError, match="several labels at once"):
        BaseModel(base.model, base.tokenizer, name="x")
    t5 = other_base("t5")
    for config in (t5.model.config, t5.model.generation_config):
        config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="no decoder_start_token_id"):
        BaseModel(t5.model, t5.tokenizer, name="x")


_OWN_CODE = {
    "AutoModelForSequenceClassification": "m.OwnClassifier",
    "AutoModelForCausalLM": "m.OwnWriter",
}


@pytest.mark.parametrize(
    ("kind", "architectures", "more", "loader"),
    [
        ("t5", ["T5WithLMHeadModel"], {}, "AutoModelForSeq2SeqLM"),  # as T5 3B's own file says
        ("bart", ["BartModel"], {}, "AutoModelForSeq2SeqLM"),
        ("bart", ["BartForSequenceClassification"], {}, "AutoModelForSequenceClassification"),
        ("bart", ["BartForCausalLM"], {"is_encoder_decoder": False}, "AutoModelForCausalLM"),
        ("bert", ["BertForSequenceClassification"], {}, "AutoModelForSequenceClassification"),
        ("bert", ["BertForMaskedLM"], {}, None),
        ("gpt2", ["GPT2ForSequenceClassification"], {}, "AutoModelForSequenceClassification"),
        ("gpt2", None, {}, "AutoModelForCausalLM"),
        ("gpt2", ["Own"], {"auto_map": _OWN_CODE}, "AutoModelForCausalLM"),
        ("gpt2", ["OwnClassifier"], {"auto_map": _OWN_CODE}, "AutoModelForSequenceClassification"),
    ],
)  # fmt: skip
def test_the_config_decides_how_a_model_is_loaded(kind, architectures, more, loader):
    config = AutoConfig.for_model(kind, architectures=architectures, **more)
    if loader is None:
        with pytest.raises(ModelError, match="no model that can be edited"):
            loader_of(config, "x")
    else:
        assert loader_of(config, "x").__name__ == loader
