import json
import pathlib

import pytest

from scope_jax.configlib import claim_workdir, load_config, load_object, override, parse_arg
from scope_jax.methods import METHODS, default_config
from scope_jax.models.published import PUBLISHED
from scope_jax.records import InputError

RECIPES = ("qwen2_5_math_7b", "qwen2_5_math_7b:plain", "qwen2_5_math_7b:fsdp=16")
RECIPES += ("qwen2_5_math_1_5b", "qwen2_5_math_1_5b:plain", "qwen3_0_6b", "llama3_1_8b")
SHIPPED = sorted(
    {"eval_math", "gsm8k_smollm2", "ledger", "word_problems_smollm2", "worksheet"}
    | {spec.partition(":")[0] for spec in RECIPES}
)


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
    with pytest.raises(InputError, match=", ".join(SHIPPED)):
        load_config("workshet", [])


@pytest.mark.parametrize("spec", RECIPES)
def test_every_recipe_has_a_small_form_that_keeps_its_method(spec):
    config = load_config(spec, [])
    small = load_config(f"{spec}{',' if ':' in spec else ':'}runlocal", [])
    assert small.total_steps == 2 and small.task.module == "scope_jax.tasks.worksheet"
    paths = (small.model.path, small.prm.path, small.teacher.path)
    assert all(pathlib.Path(path, "config.json").is_file() for path in paths)  # nothing is fetched
    for group in ("loss", "correct", "select", "locate", "optimizer", "credit", "advantages"):
        assert small[group].to_dict() == config[group].to_dict(), group
    kept = ("remat", "dtype", "compute_dtype", "lora_rank", "lora_alpha")
    assert [small.model[name] for name in kept] == [config.model[name] for name in kept]
    assert set(small) == set(config) == set(default_config())
    rows = small.data.prompts_per_step * small.sample.group_size
    assert rows % (small.learn.mini_batches * small.learn.micro_batches * 8) == 0


@pytest.mark.parametrize("spec", RECIPES)
def test_a_recipes_lengths_go_together(spec):
    """Prompt and completion in the policy's and the PRM's context, or in windows of it."""
    config = load_config(spec, [])
    longest = config.data.max_prompt_length + config.sample.max_new_tokens
    positions = config.model.max_position or PUBLISHED[config.model.path]["max_position_embeddings"]
    assert longest <= positions
    read = min(config.prm.max_length, PUBLISHED[config.prm.path]["max_position_embeddings"])
    assert read == config.prm.max_length
    assert longest <= read or config.prm.window == read
    for key in ("model", "prm", "teacher"):
        assert config[key].path in PUBLISHED  # so that it can be planned
    assert config.learn.mini_batches == 2
    rows = config.data.prompts_per_step * config.sample.group_size
    chips = config.mesh.fsdp
    assert rows % (config.learn.mini_batches * config.learn.micro_batches * chips) == 0
    assert rows % config.sample.slots == 0 and rows % config.prm.batch_size == 0


def test_the_papers_recipe_is_the_methods_section_5():
    config = load_config("qwen2_5_math_7b", [])
    assert (config.model.rope_theta, config.model.max_position) == (40000.0, 16384)
    assert config.prompt.assistant == "<think>\n" and config.reward.after == "</think>"
    assert config.data.prompts_per_step == 128 and config.data.max_prompt_length == 1024
    assert (config.sample.group_size, config.sample.max_new_tokens) == (8, 8192)
    assert config.sample.temperature == 1.0 and config.total_steps == 500
    o = config.optimizer
    assert (o.learning_rate, o.b1, o.b2, o.weight_decay) == (1e-6, 0.9, 0.999, 0.01)
    assert (o.schedule, o.max_grad_norm) == ("constant", 1.0)
    assert (config.loss.entropy_coef, config.loss.kl_coef) == (0.001, 0.0)
    plain = load_config("qwen2_5_math_7b:plain", [])
    assert plain.prompt.assistant == plain.reward.after == "" and plain.prm.window == 0
    assert plain.data.max_prompt_length + plain.sample.max_new_tokens <= plain.prm.max_length


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
