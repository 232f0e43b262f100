"""benchmarks/assignments.py: the interventions do what the protocol says, and all runs on small models."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import assignments, assignments_prompt
from benchmarks import assignments_smollm2 as language
from benchmarks import assignments_words as words
from benchmarks.assignments_tiny import HEADS, Bytes, language_model
from nondual.language_models.mamba import MambaLM
from nondual.ops.attention import attention
from nondual.transformer import TextEncoder


@pytest.fixture
def reader():
    torch.manual_seed(1)
    model = language_model()
    for block in model.layers:  # trained weights are larger than those of a start
        for parameter in block.mixer.parameters():
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        yield language.Reader(model, torch.randint(256, (2, 13)))


def test_layers_run_again_give_the_models_own_loss(reader):
    scores = reader.model(reader.ids)[:, :-1]
    expected = torch.nn.functional.cross_entropy(scores.mT, reader.ids[:, 1:], reduction="none")
    for layer in range(3):
        torch.testing.assert_close(reader.losses(layer), expected)


def test_to_exchange_queries_and_keys_is_to_transpose_the_scores():
    q, k, v = torch.randn(3, 2, 6, 7, 4).unbind()
    _, weights = language.changed(language.exchanged)(q, k[:, :3], v[:, :3], return_weights=True)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k[:, :3].repeat_interleave(2, 1)) / 2
    torch.testing.assert_close(weights, scores.mT.softmax(-1))


def test_to_exchange_them_is_to_exchange_their_weights(reader):
    mixer, x = reader.model.layers[1].mixer, torch.randn(2, 5, 24)
    again = language_model().layers[1].mixer
    again.__init__(24, HEADS, bias=False, causal=True, positions=mixer.positions)
    whole = mixer.k_proj.weight.view(3, 4, 24).repeat_interleave(2, 0).flatten(0, 1)
    again.q_proj.weight.copy_(whole), again.k_proj.weight.copy_(mixer.q_proj.weight)
    _, expected = again(x, return_weights=True)
    torch.testing.assert_close(language.table(mixer, x, language.exchanged), expected)


def test_a_planes_share_of_the_scores_is_multiplied():
    q, k = torch.randn(2, 1, 2, 5, 6).unbind()
    planes = torch.tensor([[True, False, False], [False, True, True]])
    turned, same = language.scaled(-2.0, planes)(q, k)
    assert same is k
    torch.testing.assert_close(turned[0, 0], q[0, 0] * torch.tensor([-2.0, 1, 1, -2, 1, 1]))
    torch.testing.assert_close(turned[0, 1], q[0, 1] * torch.tensor([1.0, -2, -2, 1, -2, -2]))


def test_the_control_moves_as_much_attention_as_the_exchange(reader):
    for layer in range(3):
        found = language.powers(reader, layer)
        assert found["moved"] == pytest.approx(found["moved by the control"], rel=0.02) and found["number"] < 1
    torch.testing.assert_close(reader.losses(), reader.clean)  # nothing is left changed


def test_moved_attention_by_hand():
    before = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    assert language.moved(before, before.flip(-1)) == 0.5  # all of the first row, none of the second


def test_heads_that_give_out_their_own_reports_do_no_harm(reader):
    outputs = language.all_outputs(reader.model, reader.ids)
    mean, report = language.reports(outputs[1])
    torch.testing.assert_close(mean + report, outputs[1])
    with language.replace_heads(reader.model, {(1, head): outputs[1][:, :, head] for head in range(HEADS)}):
        torch.testing.assert_close(reader.losses(1), reader.clean)
    found = language.doors(reader, outputs[1], 1)
    assert found.keys() == {"closed", "wrong door", "scrambled"} and all(abs(x) > 1e-4 for x in found.values())


def test_a_low_rank_table_sums_to_one_and_sees_nothing_later():
    P = torch.randn(1, 2, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(language.low_rank(9)(P), P)
    near = language.low_rank(3)(P)
    torch.testing.assert_close(near.sum(-1), torch.ones(1, 2, 9))
    assert (near.triu(1) == 0).all() and not torch.allclose(near, P)


def test_the_largest_weights_and_a_token_alone_by_hand():
    P = torch.tensor([[1.0, 0, 0], [0.75, 0.25, 0], [0.2, 0.5, 0.3]])
    torch.testing.assert_close(language.largest(1)(P), torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]))
    torch.testing.assert_close(language.largest(2)(P)[2], torch.tensor([0, 0.625, 0.375]))
    torch.testing.assert_close(language.alone(P)[2], torch.tensor([0.4, 0, 0.6]))


def test_a_table_as_it_is_changes_nothing(reader):
    with language.through([block.mixer for block in reader.model.layers], language.by_table(lambda P: P)):
        torch.testing.assert_close(reader.losses(), reader.clean)
    assert all(block.mixer.op is attention for block in reader.model.layers)


def test_words_without_an_own_position_do_not_notice_an_exchange():
    torch.manual_seed(0)
    model, ids = TextEncoder(50, 70, 12, 3, 10, 2).eval(), torch.randint(50, (1, 6))
    with torch.no_grad():
        table = model.position.table.weight
        torch.testing.assert_close(words.vectors(model, ids, table[None, :6]), model(ids))
        found = words.sentence(model, ids[0].tolist(), [1, 2, 3, 4], [7, 8, 9], 0)
        one = table[:64].mean(0).expand(1, 6, -1)
        order = torch.tensor([0, 3, 2, 1, 4, 5])
        torch.testing.assert_close(words.vectors(model, ids[:, order], one), words.vectors(model, ids, one)[:, order])
    assert all(value > 0 for value in found.values()) and len(found) == 8


def test_a_still_selection_has_the_mean_step_and_follows_nothing():
    torch.manual_seed(0)
    model, ids = MambaLM(17, 6, 2).eval(), torch.randint(17, (3, 20))
    with torch.no_grad():
        own, mixer = words.selections(model, ids)[0], model.layers[0].mixer
        delta, B, C = words.still(own, mixer.dt_proj.bias)
        length = torch.nn.functional.softplus(delta + mixer.dt_proj.bias)
        expected = torch.nn.functional.softplus(own[0] + mixer.dt_proj.bias).mean((0, 1)).expand_as(length)
        torch.testing.assert_close(length, expected)
        assert (B == B[:1, :1]).all() and (C == C[:1, :1]).all()
        before = model(ids)
        given = words.selections(model, ids)
        with words.selecting(model, lambda number, _: given[number]):
            torch.testing.assert_close(model(ids), before)  # its own selection, given back
        torch.testing.assert_close(model(ids), before)


def test_a_state_that_reads_the_same_character_comes_to_rest():
    torch.manual_seed(0)
    model, text = MambaLM(17, 6, 2).eval(), torch.randint(17, (2, 90))
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.dt_proj.bias.fill_(1.0)  # long steps: it forgets soon
        found = words.rest(model, text, 0, 10)
    assert max(found["blank"]) < 0.01 < min(found["text"]) and len(found["blank, by step"]) == 80


def test_taught_layers_learn_the_answers_and_are_put_back():
    torch.manual_seed(0)
    model = language_model()
    shown, asked = assignments_prompt.drawn("capital", 1)
    assert len(shown) == 8 and len(asked) == 16 and not set(shown) & set(asked)
    own, before = list(model.layers), [p.clone() for p in model.parameters()]
    told = assignments_prompt.examples(shown, assignments_prompt.right_answers, torch.Generator())
    with torch.no_grad(), assignments_prompt.taught(model, Bytes(), told, 0.01, 2, 20) as losses:
        assert losses[-1] < losses[0] - 0.2 and model.layers[0] is own[0] and model.layers[1] is not own[1]
    assert all(a is b for a, b in zip(model.layers, own))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_the_best_rate_brings_most_and_of_equal_ones_costs_least():
    rows = {
        "a 0.1": {"share": 0.5, "nats": 2.0},
        "a 0.2": {"share": 0.5, "nats": 1.0},
        "a 0.3": {"share": 0.4, "nats": 0.5},
    }
    assert assignments_prompt.best(rows) == 0.2


def test_an_expectation_survives_if_all_its_parts_hold():
    parts = [{"holds": True}, {"holds": False}]
    assert assignments.verdict({"a": parts[0]}) == "survives" and assignments.verdict({"a": parts[1]}) == "fails"
    assert assignments.verdict(dict(zip("ab", parts))) == "survives in part"


def test_the_benchmark_runs_on_small_models_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(assignments, "write", None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assignments.main(["--tiny"])
    assert capsys.readouterr().out.startswith("tiny {'powers': ")
