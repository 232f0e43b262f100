"""Settings of config.json that do not fit, are odd or hostile: each is one error that names setting and file."""

import json

import pytest

from nondual.pretrained import load_mamba, load_mamba2

E = 12
BIG = 2**60


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | settings).items() if v != "gone"}))


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(model_type="falcon_mamba"), r"model_type must be 'mamba' in .*, got 'falcon_mamba'"),
        (dict(model_type="gone"), r"model_type must be 'mamba' in .*, got None"),
        (dict(hidden_act="gelu"), r"hidden_act must be 'silu' in .*, got 'gelu'"),
        (dict(vocab_size="gone"), r"config.json must say vocab_size"),
        (dict(state_size=7), r"of another shape: layers.0.mixer.A_log \(24, 5\), not \(24, 7\)"),
        (dict(num_hidden_layers=1), r"unexpected: layers.1.mixer.A_log, layers.1.mixer.D"),
        (dict(tie_word_embeddings=False), r"missing: lm_head.weight"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(folder, settings, says):
    change(folder, **settings)
    with pytest.raises(ValueError, match=says):
        load_mamba(folder)


def test_the_other_kind_is_refused(folder):
    with pytest.raises(ValueError, match=r"model_type must be 'mamba2' in .*, got 'mamba'"):
        load_mamba2(folder)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(vocab_size="53"), "vocab_size must be an integer from 1 to 16777215 in .*config.json, got '53'"),
        (dict(vocab_size=True), "vocab_size must be an integer .*, got True"),
        (dict(hidden_size=-12), "hidden_size must be an integer .*, got -12"),
        (dict(hidden_size=BIG), "hidden_size must be an integer"),
        (dict(hidden_size=2**24 - 1), "describes no model|of another shape"),
        (dict(state_size=0), "state_size must be an integer"),
        (dict(state_size=None), "state_size must be an integer .*, got None"),
        (dict(conv_kernel=1.5), "conv_kernel must be an integer"),
        (dict(num_hidden_layers=10**7), "num_hidden_layers is 10000000 in .*, and .* holds .* tensors in all"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be an integer from 1"),
        (dict(time_step_rank="some"), "time_step_rank must be an integer"),
        (dict(expand="2"), "expand must be a number above 0"),
        (dict(expand=float("inf")), "expand must be a number above 0"),
        (dict(expand=float("nan")), "expand must be a number above 0"),
        (dict(expand=1e-9), "describes no model"),
        (dict(use_bias="no"), "use_bias must be true or false in .*, got 'no'"),
        (dict(tie_word_embeddings=None), "tie_word_embeddings must be true or false"),
        (dict(layer_norm_epsilon="1e-5"), "layer_norm_epsilon must be a number, 0 or more, in"),
        (dict(layer_norm_epsilon=-1), "layer_norm_epsilon must be a number"),
        (dict(model_type=["mamba"]), "model_type must be 'mamba' in .*, got"),
        (dict(d_model=E), "vocab_size|n_layer must be an integer .*, got None"),
        (dict(d_model=E, n_layer=2, ssm_cfg=[1]), "ssm_cfg must be an object in .*config.json"),
        (dict(d_model=E, n_layer=2, ssm_cfg={"layer": ["Mamba1"]}), "must describe Mamba or Mamba-2 blocks"),
        (dict(d_model=E, n_layer=2, pad_vocab_size_multiple=0), "pad_vocab_size_multiple must be an integer from 1"),
    ],
    ids=str,
)
def test_a_setting_that_is_odd_or_hostile(folder, settings, says):
    change(folder, **settings)
    with pytest.raises(ValueError, match=says) as error:
        load_mamba(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 2 * len(str(folder)) + 800


@pytest.mark.parametrize(
    "limit", [[0], [0, 1, 2], "0,1", [1, 0], [-1, 1], ["a", 1], [0, None], [0, 10**400], None], ids=str
)
def test_limits_of_the_steps_that_are_none(tmp_path, limit, theirs):
    theirs("mamba2").save_pretrained(tmp_path)
    change(tmp_path, time_step_limit=limit)
    with pytest.raises(ValueError, match=r"time_step_limit must be two numbers .* in .*config\.json"):
        load_mamba2(tmp_path)


def test_widths_of_mamba2_that_do_not_divide(tmp_path, theirs):
    theirs("mamba2").save_pretrained(tmp_path)
    change(tmp_path, head_dim=7)
    with pytest.raises(
        ValueError, match=r"config\.json describes no model: expand \* d_model must be a multiple of d_head"
    ):
        load_mamba2(tmp_path)
