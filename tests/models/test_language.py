"""The language model: an exact density of the targets, packed or alone, and continuations drawn from it."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from reference import random_params
from vlm_jax.contract import Model, abstract_batch
from vlm_jax.errors import UserError
from vlm_jax.models import build, language
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.objectives import language as objective

VOCAB, LENGTH, EOS = 5, 12, 2
CONFIG = language.Config(
    vocab_size=VOCAB,
    context_length=LENGTH,
    eos_id=EOS,
    decoder=DecoderConfig(width=8, depth=2, heads=4, kv_heads=2, head_width=4, mlp=16),
)
MODEL = build(CONFIG)
KEY = jax.random.key(0)


def variables_of(model: Model) -> Any:
    """Large enough for what a token does to be seen."""
    return random_params(jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 1)), scale=0.6)


VARIABLES = variables_of(MODEL)
log_likelihood = jax.jit(lambda batch: MODEL.log_likelihood(VARIABLES, batch, KEY))
loss_and_aux = jax.jit(lambda batch: MODEL.loss(VARIABLES, batch, KEY, 0, train=False))


def rows(*packed: list[list[int]], target: bool = True) -> dict[str, np.ndarray]:
    """Documents in rows of `LENGTH`, padded on the right."""
    batch = {
        "tokens": np.ones((len(packed), LENGTH), np.int32),
        "target": np.zeros((len(packed), LENGTH), bool),
        "segment": np.zeros((len(packed), LENGTH), np.int32),
    }
    for row, documents in enumerate(packed):
        start = 0
        for number, document in enumerate(documents, 1):
            span = slice(start, start + len(document))
            batch["tokens"][row, span], batch["target"][row, span], batch["segment"][row, span] = (
                document,
                target,
                number,
            )
            start = span.stop
    return batch


def test_the_probabilities_of_all_texts_of_three_tokens_sum_to_one():
    texts = rows(*([[3, *text]] for text in itertools.product(range(VOCAB), repeat=3)))
    probs = np.exp(np.float64(log_likelihood(texts)))
    assert probs.sum() == pytest.approx(1, abs=1e-5)
    assert probs.std() > 0.1 * probs.mean()  # it says something


DOCUMENTS = [[3, 1, 4, 0, EOS], [0, 4, EOS], [4, 4, 3, EOS]]


def test_packed_documents_have_the_probabilities_that_they_have_alone():
    alone = log_likelihood(rows(*([document] for document in DOCUMENTS)))
    together = log_likelihood(rows(DOCUMENTS, DOCUMENTS[::-1], []))
    np.testing.assert_allclose(together, [alone.sum(), alone.sum(), 0], rtol=1e-5)
    padded = {name: np.roll(field, 4, axis=1) for name, field in rows(*([d] for d in DOCUMENTS)).items()}
    np.testing.assert_allclose(log_likelihood(padded), alone, rtol=1e-5)


def test_a_token_changes_what_comes_after_it_in_its_document_alone():
    """Probabilities of one target at a time; the first document's third token is another."""
    changed = [[3, 1, 0, 0, EOS], *DOCUMENTS[1:]]

    def each(documents: list[list[int]]) -> np.ndarray:
        one = rows(documents)
        batch = {name: np.repeat(field, LENGTH, axis=0) for name, field in one.items()}
        return np.asarray(log_likelihood({**batch, "target": np.eye(LENGTH, dtype=bool)}))

    before, after = each(DOCUMENTS), each(changed)
    assert (np.abs(before - after) > 1e-6).nonzero()[0].tolist() == [2, 3, 4]
    assert (before == 0).nonzero()[0].tolist() == [0, 5, 8]  # what begins a document is predicted by nothing


def test_the_loss_is_the_mean_over_all_targets_which_are_counted():
    batch = rows(DOCUMENTS, DOCUMENTS[:1], [])
    batch["target"][0, 2] = batch["target"][1, :3] = False
    loss, aux = loss_and_aux(batch)
    counts = MODEL.count(batch)
    np.testing.assert_array_equal(counts, [8, 2, 0])
    assert aux.weight == counts.sum()
    np.testing.assert_allclose(loss, -log_likelihood(batch).sum() / 10, rtol=1e-5)
    assert 0 <= aux.metrics["accuracy"] <= 1


def test_a_batch_without_targets_costs_and_moves_nothing():
    loss = jax.jit(jax.grad(lambda v: MODEL.loss(v, rows(DOCUMENTS, target=False), KEY, 0, train=False)[0]))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(loss(VARIABLES)))
    value, aux = loss_and_aux(rows(DOCUMENTS, target=False))
    assert (value, aux.weight, aux.metrics["accuracy"]) == (0, 0, 0)


def test_logits_that_are_computed_in_parts_give_the_same_loss(monkeypatch: pytest.MonkeyPatch):
    expected = loss_and_aux(rows(DOCUMENTS))[0]
    monkeypatch.setattr(objective, "LOGITS", 4 * VOCAB)
    loss = jax.jit(lambda batch: build(CONFIG).loss(VARIABLES, batch, KEY, 0, train=False)[0])
    np.testing.assert_allclose(loss(rows(DOCUMENTS)), expected, rtol=1e-6)


def test_a_tied_model_predicts_by_the_table_that_it_reads():
    tied = build(replace(CONFIG, tied=True))
    shared = {"params": {name: tree for name, tree in VARIABLES["params"].items() if name != "head"}}
    assert jax.tree.structure(variables_of(tied)) == jax.tree.structure(shared)
    both = {"params": {**VARIABLES["params"], "head": VARIABLES["params"]["token"]}}
    batch = rows(DOCUMENTS)
    expected = MODEL.log_likelihood(both, batch, KEY)
    np.testing.assert_allclose(tied.log_likelihood(shared, batch, KEY), expected, rtol=1e-5)


PROMPTS = [[3, 1, 4], [0], [4, 4, 3, 1]]
NEW = 5


def left_padded(prompts: list[list[int]], places: int) -> dict[str, np.ndarray]:
    tokens = np.array([[1] * (places - len(prompt)) + prompt for prompt in prompts], np.int32)
    segment = np.array([[0] * (places - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int32)
    return {"tokens": tokens, "target": np.zeros(tokens.shape, bool), "segment": segment}


def continued(batch: dict[str, np.ndarray], key: jax.Array = KEY, temperature: float = 1.0, **settings: Any) -> Any:
    sampling = language.Sampling(**{"length": NEW, **settings})
    generate = jax.jit(lambda b: MODEL.generate(VARIABLES, key, b, temperature=temperature, sampling=sampling))
    return {name: np.asarray(field) for name, field in generate(batch).items()}


def greedy(prompt: list[int]) -> list[int]:
    """By the whole probability of each of its continuations."""
    text = list(prompt)
    while len(text) < len(prompt) + NEW and (len(text) == len(prompt) or text[-1] != EOS):
        scores = log_likelihood(rows(*([[*text, token]] for token in range(VOCAB))))
        text.append(int(np.argmax(scores)))
    return text


def test_left_padded_prompts_are_continued_as_each_alone_by_the_likeliest_token():
    batch = continued(left_padded(PROMPTS, 4), temperature=0)
    for row, prompt in enumerate(PROMPTS):
        expected = greedy(prompt)
        real = batch["segment"][row] == 1
        assert batch["tokens"][row][real].tolist() == expected
        alone = continued(left_padded([prompt], len(prompt)), temperature=0)
        np.testing.assert_array_equal(alone["tokens"][0], batch["tokens"][row, 4 - len(prompt) :])
    assert len({tuple(row) for row in batch["tokens"].tolist()}) == 3


def test_what_was_drawn_is_target_and_what_follows_the_end_is_padding():
    batch = continued(left_padded([[3]] * 64, 2))
    assert {name: field.shape for name, field in batch.items()} == dict.fromkeys(MODEL.inputs, (64, 2 + NEW))
    for tokens, target, segment in zip(*(batch[name] for name in MODEL.inputs), strict=True):
        drawn = tokens[2:].tolist()
        end = 2 + (drawn.index(EOS) + 1 if EOS in drawn else NEW)
        assert (tokens[end:] == EOS).all() and (segment[end:] == 0).all()
        np.testing.assert_array_equal(np.flatnonzero(segment), np.arange(1, end))
        np.testing.assert_array_equal(np.flatnonzero(target), np.arange(2, end))
    ends = (batch["segment"] == 0).sum(axis=1)
    assert len(set(ends.tolist())) > 2
    assert len({tuple(row) for row in batch["tokens"].tolist()}) > 10


def test_tokens_are_drawn_by_their_probabilities_given_the_last_document_alone():
    prompt = [[0, 4, EOS], [3, 1]]
    probs = np.exp(log_likelihood(rows(*([[*prompt[1], token]] for token in range(VOCAB)))))
    probs /= probs.sum()
    packed = rows(prompt)
    batch = {name: np.repeat(field[:, :5], 20_000, axis=0) for name, field in packed.items()}
    drawn = continued(batch, length=1)["tokens"][:, -1]
    shares = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    np.testing.assert_array_less(np.abs(shares - probs), 4.5 * np.sqrt(probs * (1 - probs) / len(drawn)))
    likeliest = set(np.argsort(probs)[-2:].tolist())
    assert set(continued(batch, length=1, top_k=2)["tokens"][:, -1].tolist()) == likeliest
    nucleus = set(continued(batch, length=1, top_p=float(np.sort(probs)[-2:].sum()) - 1e-3)["tokens"][:, -1].tolist())
    assert nucleus == likeliest


def test_a_text_of_no_stated_length_fills_the_context():
    batch = left_padded(PROMPTS, 4)
    drawn = jax.eval_shape(lambda: MODEL.generate(VARIABLES, KEY, batch))
    assert {name: field.shape[1] for name, field in drawn.items()} == dict.fromkeys(batch, LENGTH)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "sampling.length is 0: at least 1 token"),
        ({"top_k": 0}, "sampling.top_k is 0: it must be at least 1, or None"),
        ({"top_p": 0.0}, "sampling.top_p is 0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "sampling.top_p is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        language.Sampling(**settings)


def test_what_cannot_be_continued_is_refused():
    batch = left_padded(PROMPTS, 4)
    with pytest.raises(UserError, match=r"4 tokens and 9 more are 13, and the model's context_length is 12: shorten"):
        MODEL.generate(VARIABLES, KEY, batch, sampling=language.Sampling(length=9))
    with pytest.raises(UserError, match=r"12 tokens and 1 more are 13, and the model's context_length is 12: shorten"):
        MODEL.generate(VARIABLES, KEY, left_padded(PROMPTS, LENGTH))
    with pytest.raises(UserError, match=r"a language model writes one text: make it \('text',\)"):
        MODEL.generate(VARIABLES, KEY, batch, order=("text", "image"))
    ended = {name: np.flip(field, axis=1) for name, field in batch.items()}
    with pytest.raises(UserError, match=r"ends in padding \(segment 0\): pad on the left"):
        MODEL.generate(VARIABLES, KEY, ended, sampling=language.Sampling(length=2))
    with pytest.raises(UserError, match="eos_id is 5: it must be below vocab_size, which is 5"):
        replace(CONFIG, eos_id=5)
