import json

import pytest

from scope_jax.configlib import claim_workdir, load_config, load_object, override, parse_arg
from scope_jax.methods import METHODS, default_config
from scope_jax.records import InputError


def test_arguments_take_the_type_of_their_defaults():
    config = parse_arg("n=6,rate=2,runlocal,name=x", n=5, rate=0.5, runlocal=False, name="")
    assert (config.n, config.rate, config.runlocal, config.name) == (6, 2.0, True, "x")
    assert isinstance(config.rate, float)


@pytest.mark.parametrize("arg", ["m=6", "n=six", "n=1.5"])
def test_a_wrong_argument_is_refused(arg):
    with pytest.raises(InputError, match="n"):
        parse_arg(arg, n=5)


def test_an_unknown_key_names_the_closest_one():
    with pytest.raises(InputError, match=r"did you mean 'learning_rate'\?"):
        load_config("worksheet", ["--config.optimizer.learning_rat=1"])
    with pytest.raises(InputError, match=r"did you mean 'optimizer'\?"):
        load_config("worksheet", ["--config.optimiser.learning_rate=1"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("--config.seed=one", "is not a int"),
        ("--config.seed=1.5", "is not a int"),
        ("--config.optimizer=3", "is a group"),
        ("--config.seed.deeper=3", "has no 'deeper'"),
        ("--seed=3", "not understood"),
        ("--config.method=scop", "one of scope, scope_plus, scope_step"),
        ("--config.seed=__import__('os')", "is not a int"),
    ],
)
def test_bad_overrides_are_one_clear_line(text, reason):
    with pytest.raises(InputError, match=reason) as caught:
        load_config("worksheet", [text])
    assert "\n" not in str(caught.value)


def test_none_switches_a_clip_off_and_whole_numbers_become_floats():
    config = load_config("worksheet", ["--config.loss.clip_low=none", "--config.loss.gamma=1"])
    assert config.loss.clip_low is None
    assert isinstance(config.loss.gamma, float)


def test_the_command_line_wins_over_the_method_and_the_method_over_the_file():
    assert load_config("worksheet", []).locate.locator == "prm"
    luffy = load_config("worksheet", ["--config.method=luffy"])
    assert luffy.locate.locator == "zero" and luffy.loss.clip_low is None
    both = load_config("worksheet", ["--config.locate.locator=oracle", "--config.method=luffy"])
    assert both.locate.locator == "oracle"


def test_a_method_may_be_named_behind_the_config():
    config = load_config("worksheet:n=6,scope_plus", [])
    assert (config.method, config.task.n) == ("scope_plus", 6)
    same = load_config("worksheet:n=6", ["--config.method=scope_plus"])
    assert config.to_dict() == same.to_dict()
    assert load_config("worksheet:dapo", ["--config.method=gspo"]).method == "gspo"
    with pytest.raises(InputError, match="names 2 methods: dapo, gspo"):
        load_config("worksheet:dapo,gspo", [])


@pytest.mark.parametrize("method", METHODS)
def test_methods_change_only_keys_that_exist(method):
    for key, value in METHODS[method].items():
        config = default_config()
        override(config, key, value)  # an unknown key raises
        for part in key.split("."):
            config = config[part]
        assert config == value


def test_a_missing_config_lists_the_shipped_ones():
    shipped = "eval_math, gsm8k_smollm2, ledger, openr1_qwen7b, word_problems_smollm2, worksheet"
    with pytest.raises(InputError, match=shipped):
        load_config("workshet", [])


def test_a_config_file_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from scope_jax.methods import default_config\n"
        "def get_config(arg=''):\n"
        "    c = default_config()\n    c.seed = int(arg or 1)\n    return c\n"
    )
    assert load_config(f"{file}:7", []).seed == 7
    file.write_text("x = 1\n")
    with pytest.raises(InputError, match="defines no get_config"):
        load_config(str(file), [])


def test_load_object_explains_what_is_missing():
    assert load_object("scope_jax.rewards:verify", "reward.fn").__name__ == "verify"
    with pytest.raises(InputError, match=r"did you mean 'verify'\?"):
        load_object("scope_jax.rewards:verfy", "reward.fn")
    with pytest.raises(InputError, match=r"reward.fn 'nowhere:f': cannot import nowhere"):
        load_object("nowhere:f", "reward.fn")
    with pytest.raises(InputError, match="reward.fn '': cannot import"):
        load_object("", "reward.fn")


def test_a_workdir_belongs_to_one_config(tmp_path):
    config = default_config()
    claim_workdir(tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
    config.total_steps, config.eval.every = 9, 3
    claim_workdir(tmp_path / "run", config)  # these may change
    config.loss.gamma = 0.2
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(InputError, match=r"loss\.gamma is 0\.1 there and 0\.2 here"):
        claim_workdir(tmp_path / "run", config)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_folder_with_other_files_is_no_workdir(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="not a workdir"):
        claim_workdir(tmp_path, default_config())
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
