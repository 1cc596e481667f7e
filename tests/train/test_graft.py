"""Training of a graft on cached features: what the loss estimates, and that runs resume to the bit."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from tests.train.grafts import HIDDEN, LAYERS, SETTINGS, small_association, small_base, small_plan

from titans import graft
from titans.data import byte_tokenizer
from titans.data.facts_blocks import ANSWER, ANSWER_END, STATED
from titans.hf import GraftedForCausalLM
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.feature_cache import FeatureCache
from titans.hf.graft.window import Window
from titans.nn.adaptation import LinearHead
from titans.train.checkpoint import checkpoints, read_tensors
from titans.train.graft import recall
from titans.train.graft.features import FeaturePlan
from titans.train.graft.fit import AssociationTraining
from titans.train.graft.held_out import answered, measure
from titans.train.graft.recall import recall_after
from titans.train.graft.rows import Stretch, TrainingRows
from titans.train.graft.run import fit_graft
from titans.train.graft.settings import AdaptationTraining, GraftTraining
from titans.train.graft.vocabulary import SampledWords, label_log_probs, mixture_changes

QUICK = GraftTraining(
    steps=6, tokens_per_step=600, distance=400, evaluate_every=3, save_every=2, gate_rate=2e-2, seed=3
)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A base with cached features; nothing may change them."""
    plan = small_plan()
    return plan.base, plan.write(tmp_path_factory.mktemp("features"))


def rng(seed=0):
    return np.random.default_rng(seed)


# The loss


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    log_probs, mixing, words = normal(20, 300).log_softmax(-1), normal(20), normal(20, 300)
    return log_probs, mixing, words, torch.randint(300, (20,), generator=generator)


def exact_changes(log_probs, mixing, words, labels):
    share = torch.sigmoid(mixing)[:, None]
    mixed = (1 - share) * log_probs.exp() + share * words.softmax(-1)
    return (log_probs - mixed.log()).gather(1, labels[:, None])[:, 0]


def test_with_the_whole_vocabulary_the_change_is_exact():
    log_probs, mixing, words, labels = problem()
    mixing.requires_grad_(), words.requires_grad_()
    sample = SampledWords(torch.arange(300), 300, 10, rng())
    found = mixture_changes(log_probs.gather(1, labels[:, None])[:, 0], mixing, words, labels, sample)
    exact = exact_changes(log_probs, mixing, words, labels)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        *(torch.autograd.grad(x.sum(), (mixing, words)) for x in (found, exact)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_sample_gives_the_change_on_average():
    log_probs, mixing, words, labels = problem()
    found = []
    for seed in range(300):
        sample = SampledWords(labels, 300, 100, rng(seed))
        mine = log_probs.gather(1, labels[:, None])[:, 0]
        found.append(mixture_changes(mine, mixing, words[:, sample.ids], labels, sample))
    exact, means = exact_changes(log_probs, mixing, words, labels), torch.stack(found).mean(0)
    assert exact.abs().max() > 0.3 and torch.stack(found).std(0).max() > 0.01
    torch.testing.assert_close(means, exact, rtol=0, atol=0.03)


def test_a_memory_that_is_not_asked_changes_nothing_whatever_it_recalls():
    log_probs, mixing, words, labels = problem()
    sample = SampledWords(torch.arange(300), 300, 10, rng())
    mine = log_probs.gather(1, labels[:, None])[:, 0]
    found = mixture_changes(mine, torch.full_like(mixing, -40), words * 100, labels, sample)
    assert found.abs().max() < 1e-12


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_label_has_the_probability_that_the_head_gives_it(softcap):
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (
        torch.randn(*shape, generator=generator).double() for shape in ((30, 8), (30,), (5, 8))
    )
    head = LinearHead(weight, bias, softcap, 0.7)
    labels, logits = torch.tensor([3, 29, 0, 3, 7]), head.logits(hidden)
    found = label_log_probs(head, hidden, logits.logsumexp(-1), labels)
    exact = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


# The rows


def test_examples_state_first_then_ask_and_only_real_predictions_count(cached):
    _, cache = cached
    rows = TrainingRows(cache, 1600, 400, seed=1)
    used, kinds, before = 0, set(), []
    for step in range(40):
        example = rows.draw(step, used)
        used += example.episodes
        main, block = example.main, SETTINGS.block_tokens
        before += example.before.tolist()
        kinds.add(example.episodes > 0)
        stated, asked = main.flags == STATED, main.flags >= ANSWER
        assert len(example.before) == len(main.ids)
        for row in range(len(main.ids)):
            if example.episodes:
                assert stated[row].nonzero().max() < asked[row].nonzero().min()
                # Every value that is asked for has been stated.
                text = bytes(main.ids[row][: int(asked[row].nonzero().min())].tolist())
                for value in _runs(main, row):
                    assert value in text
            else:
                assert not (stated | asked).any()
        assert (~main.follows).sum() <= main.ids.shape[0] * (main.ids.shape[1] // block + 1)
        assert not main.follows[:, -1].any()
    assert kinds == {True, False} and {*before} == {0, 1, 2, 3, 4}
    # All are used before any is used again.
    order = [tuple(rows._episode(number)["statements"].ids[0].tolist()) for number in range(96)]
    assert len({*order[:48]}) == 48 and {*order[:48]} == {*order[48:]} and order[:48] != order[48:]


def test_texts_before_are_long_and_those_between_come_after_them(cached):
    rows = TrainingRows(cached[1], 1600, 400, seed=1)
    found = rows.before(7)
    assert [len(text.ids) for text in found] == [1] * 4
    assert all(256 <= text.ids.shape[1] <= 400 for text in found)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, rows.before(24), strict=True))
    assert not any(torch.equal(a.ids, b.ids) for a, b in zip(found, rows.before(25), strict=True))
    assert [step for step in range(60) if rows.first_of(step)] == [0, 25, 50]
    place = rows._places(7)[0]
    whole = cached[1].load(place[0])["text"].ids[0]
    for seed in range(20):
        after = rows._after(rng(seed), place, 40).ids[0]
        starts = [i for i in range(len(whole) - 39) if torch.equal(whole[i : i + 40], after)]
        assert starts and max(starts) >= place[1] + place[2]


def _runs(main, row):
    found, last = [], -2
    for at in (main.flags[row] == ANSWER).nonzero()[:, 0].tolist():
        if at != last + 1:
            found.append(bytearray())
        found[-1].append(int(main.ids[row, at]))
        last = at
    return [bytes(run) for run in found]


def test_the_features_of_a_row_are_those_of_its_pieces(cached):
    base, cache = cached
    example = TrainingRows(cache, 800, 400, seed=1).draw(0, 0)
    main, block = example.main, SETTINGS.block_tokens
    with torch.no_grad():
        hidden, _ = base.read(main.ids[:, :block], base.initial_state(len(main.ids)))
    torch.testing.assert_close(main.hidden[:, :block], hidden, rtol=0, atol=0.01)
    assert main.states[0].shape == (*main.ids.shape, HIDDEN) and len(main.states) == len(LAYERS)


def test_recall_after_a_text_is_that_of_memories_that_read_it(cached):
    base, cache = cached
    association = small_association(base)
    association.whiten([torch.randn(99, HIDDEN, generator=torch.Generator().manual_seed(0)) for _ in LAYERS])
    with torch.no_grad():
        association.write_gate.bias += 2
        association.mixing_gate.bias += 6
        association.log_sharpness += 2
    text = cache.load(cache.files("text-held-out")[0])["text"]
    found = recall_after(association, base.head, cache, "facts-held-out", text, (30, 600), together=1)
    path, hits = cache.files("facts-held-out")[0], {30: [], 600: []}
    for row in range(cache.shape(path)[0]):
        parts = cache.load(path, slice(row, row + 1))
        for length in hits:
            between = recall._last(text, length)
            stretch = Stretch.of([[parts["statements"], between, parts["questions"]]])
            read = association.read(stretch.states, stretch.hidden, stretch.ids, base.head.weight)
            hits[length] += answered(association, base.head, stretch, read)[0].tolist()
    assert {length: each.tolist() for length, each in found.items()} == hits
    # The fast weights are what they would be, but for the first keys.
    state = association.read(stretch.states, stretch.hidden, stretch.ids, base.head.weight).state
    stretch = Stretch.of([[recall._last(text, 600)]])
    after = recall._after(association, base.head, state, stretch)
    read = association.read(stretch.states, stretch.hidden, stretch.ids, base.head.weight, state).state
    assert (read.weight - state.weight).norm() > 0.3
    torch.testing.assert_close(after.weight, read.weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(after.recent, read.recent)


# The training


def trained(cached, folder, settings=QUICK, **options):
    base, cache = cached
    association = small_association(base)
    training = AssociationTraining(association, base.head, cache, folder, settings)
    lines = []
    result = training.run(options.get("on_log", lines.append))
    return association, result, lines


def test_training_learns_to_recall_and_leaves_the_best_weights(cached, tmp_path):
    settings = GraftTraining(
        steps=40,
        tokens_per_step=1600,
        distance=200,
        evaluate_every=20,
        gate_rate=5e-2,
        seed=1,
    )
    association, result, lines = trained(cached, tmp_path, settings)
    base, cache = cached
    before = measure(small_association(base), base.head, cache)
    found = [line for line in lines if line["kind"] == "held out"]
    assert [line["step"] for line in found] == [20, 40]
    best = min(found, key=lambda line: line["score"])
    assert best["answers"] < before.answers - 0.1
    assert result.best_step == best["step"] and result.finished
    again = measure(association, base.head, cache)
    assert again.score == pytest.approx(best["score"], abs=1e-5)
    assert association.trained and association.state_mean.any()
    assert {*again.recall} == {"facts-held-out", "facts-new-wording"}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == len(lines)


def test_an_interrupted_run_continues_to_the_bit(cached, tmp_path):
    whole, result, _ = trained(cached, tmp_path / "whole")

    def interrupt(line):
        if line["kind"] == "held out" and line["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    _, stopped, _ = trained(cached, tmp_path / "parts", on_log=interrupt)
    assert stopped.step == 3 and not stopped.finished
    parts, again, _ = trained(cached, tmp_path / "parts")
    assert again == result and again.step == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    last = [checkpoints(tmp_path / name)[-1] for name in ("whole", "parts")]
    assert last[0].name == last[1].name == "checkpoint-6"
    mine, theirs = (read_tensors(path / "optimizer.safetensors")[1] for path in last)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    # Each step uses other episodes.
    rows, used = TrainingRows(cached[1], QUICK.tokens_per_step, QUICK.distance, QUICK.seed), 0
    for step in range(6):
        used += rows.draw(step, used).episodes
    assert int(read_tensors(last[1] / "carried.safetensors")[1]["used"]) == used > 0


def test_both_memories_are_trained_on_the_same_features_and_continue_to_the_bit(cached, tmp_path):
    base, cache = cached
    meta = AdaptationTraining(
        steps=4, rows=2, tokens=48, held_out_tokens=96, evaluate_every=2, save_every=2, number_rate=0.3
    )

    def fit(output, stop=None):
        grafted = graft(
            base.model, byte_tokenizer(), window=32, sinks=2,
            association=dict(layers=LAYERS, num_ordered=3, num_topic=8, feature_size=64, gate_hidden_size=8),
            adaptation=dict(chunk_size=8, step=0.05, momentum=0.1, warm_up=0, learned_start=True),
        )  # fmt: skip

        def on_log(name, line):
            if (name, line["kind"], line["step"]) == stop:
                os.kill(os.getpid(), signal.SIGINT)

        return grafted, fit_graft(
            grafted, None, None, output, features=cache.folder, training=QUICK, meta=meta, on_log=on_log
        )

    whole, results = fit(tmp_path / "whole")
    assert {name: (one.step, one.finished) for name, one in results.items()} == {
        "association": (6, True), "adaptation": (4, True),
    }  # fmt: skip
    assert whole.association.trained and results["adaptation"].best_step > 0
    for name, step in (("association", 3), ("adaptation", 2)):
        _, stopped = fit(tmp_path / "parts", (name, "held out", step))
        assert [*stopped][-1] == name and stopped[name].step == step and not stopped[name].finished
        # What is trained already is there, and the rest as before.
        assert (tmp_path / "parts" / "model.safetensors").exists() == (name == "adaptation")
    parts, again = fit(tmp_path / "parts")
    assert again == results
    loaded = GraftedForCausalLM.from_pretrained(tmp_path / "parts", base=base.model)
    for name, value in whole.own_state_dict().items():
        assert torch.equal(value, parts.own_state_dict()[name]), name
        assert torch.equal(value, loaded.own_state_dict()[name]), name


def test_minutes_end_at_a_checkpoint_and_patience_ends_the_training(cached, tmp_path):
    _, result, _ = trained(cached, tmp_path / "short", GraftTraining(**{**vars(QUICK), "minutes": 1e-9}))
    assert result.step == 1 and not result.finished and (tmp_path / "short" / "checkpoint-1").is_dir()
    # Learning rates of 0 never get better than at first.
    still = {**vars(QUICK), "steps": 60, "evaluate_every": 1, "patience": 2}
    still |= dict(projection_rate=0, gate_rate=0, number_rate=0, sharpness_rate=0)
    _, result, _ = trained(cached, tmp_path / "still", GraftTraining(**still))
    assert (result.step, result.best_step, result.finished) == (3, 1, True)


def test_a_price_shuts_the_gates_for_all_but_stated_values(cached, tmp_path):
    shares = []
    for price in (0.0, 10.0):
        settings = {**vars(QUICK), "steps": 12, "evaluate_every": 12, "write_price": price, "gate_rate": 1e-1}
        association, _, _ = trained(cached, tmp_path / str(price), GraftTraining(**settings))
        example = TrainingRows(cached[1], 600, 400, seed=9).draw(0, 0).main
        with torch.no_grad():
            write = association.read(example.states, example.hidden, example.ids, cached[0].head.weight).write
        shares.append(float(write[example.flags != STATED].mean()))
    assert shares[1] < 0.5 * shares[0]


def test_what_does_not_fit_is_refused(cached, tmp_path):
    base, cache = cached
    trained(cached, tmp_path)
    with pytest.raises(ValueError, match=r"was begun with seed=3, now it is 4: give the same"):
        trained(cached, tmp_path, GraftTraining(**{**vars(QUICK), "seed": 4}))
    other = type(small_association(base))(HIDDEN, 256, (2,))
    with pytest.raises(ValueError, match=r"has no layer 2: it has \[0, 1\]; cache it, too"):
        AssociationTraining(other, base.head, cache, tmp_path, QUICK)
    index = json.loads((cache.folder / "index.json").read_text())
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "index.json").write_text(json.dumps({**index, "units": []}))
    with pytest.raises(ValueError, match="none holds no features of facts: finish caching"):
        AssociationTraining(
            small_association(base), base.head, FeatureCache(tmp_path / "none"), tmp_path, QUICK
        )
    with pytest.raises(ValueError, match="steps=0: give a whole number of at least 1"):
        AssociationTraining(small_association(base), base.head, cache, tmp_path, GraftTraining(steps=0))
    for name, value in (("seed", 1.5), ("minutes", 0), ("gate_rate", -1.0), ("number_rate", float("nan"))):
        with pytest.raises(ValueError, match=f"{name}="):
            GraftTraining(**{name: value}).check()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(cached, tmp_path, monkeypatch):
    base, cache = cached
    training = AssociationTraining(small_association(base), base.head, cache, tmp_path, QUICK)
    original = AssociationTraining._changes

    def loss(self, *arguments):
        found, text = original(self, *arguments)
        return found * (float("nan") if self.progress.step == 4 else 1.0), text

    monkeypatch.setattr(AssociationTraining, "_changes", loss)
    with pytest.raises(FloatingPointError, match="step 4: the loss is nan"):
        training.run()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


# The plan


def test_the_plan_states_its_size_and_spreads_its_units(cached, tmp_path):
    _, cache = cached
    plan = small_plan()
    stored = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
    assert plan.bytes < stored < 1.2 * plan.bytes
    assert plan.seconds() > 0
    groups = [unit.group for unit in plan.units]
    assert {*groups[:5]} == {"facts", "text", "text-held-out", "facts-held-out", "facts-new-wording"}
    assert sum(unit.tokens for unit in plan.units if unit.group == "text") <= SETTINGS.text_tokens + 900
    # The same settings give the same units.
    assert [unit.digest() for unit in small_plan().units] == [unit.digest() for unit in plan.units]


def test_a_disk_with_too_little_room_is_found_at_once(tmp_path, monkeypatch):
    plan = small_plan()
    monkeypatch.setattr(
        "titans.train.graft.features.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(OSError, match=r"the features take 0\.0 GB, and 0\.0 GB are free: make room"):
        plan.write(tmp_path / "features")
    assert not [*(tmp_path / "features").glob("*.safetensors")]


def test_texts_that_are_too_short_are_refused():
    base = WindowedBase(small_base(), Window(32, 2))
    from tests.train.grafts import byte_tokenizer, documents

    from titans.data import Document

    short = [Document("short", b"a few words")]
    for given, name in (((short, documents(0, 1)), "data"), ((documents(0, 1), short), "held-out data")):
        with pytest.raises(ValueError, match=f"^{name} has no text of 384 tokens"):
            FeaturePlan(base, byte_tokenizer(), *given, LAYERS, SETTINGS)
    assert ANSWER_END > ANSWER
