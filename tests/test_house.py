"""What holds the repository together: identical twins, live flags, true README, shapes that are what they say."""
import ast
import doctest
import inspect
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import distill
import dpo
import eval as ground
import grpo
import kernels
import moe
import sft

ROOT = Path(__file__).parents[1]
SCRIPTS = {"sft": sft, "dpo": dpo, "distill": distill, "grpo": grpo, "moe": moe}
MODULES = {**SCRIPTS, "eval": ground, "kernels": kernels}


def test_same_name_means_same_text():
    seen, twins = {}, 0
    for script in MODULES:
        source = (ROOT / f"{script}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in {"Config", "main", "check_config"}:
                text = ast.get_source_segment(source, node)
                first, where = seen.setdefault(node.name, (text, script))
                assert text == first, f"{node.name}: {where}.py and {script}.py differ"
                twins += where != script
    assert twins > 40


FRAME = "# --- frame: the same text in all five scripts ---\n"


def test_the_frame_is_one_text_and_short():
    frames = {name: (ROOT / f"{name}.py").read_text().split(FRAME) for name in SCRIPTS}
    assert all(len(parts) == 2 for parts in frames.values())
    for name, (_, frame) in frames.items():
        assert frame == frames["sft"][1], f"sft.py and {name}.py differ below {FRAME}"
    assert len(frames["sft"][1].splitlines()) <= 230


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_method_comes_first_and_the_frame_last(name):
    banners = re.findall(r"^# --- (.*?) ---$", (ROOT / f"{name}.py").read_text(), re.M)
    assert banners[:2] == ["config", "loss"] and banners[-2:] == ["main", FRAME[6:-5]], banners


def test_there_is_one_way_to_be_several_processes():
    for path in ROOT.glob("*.py"):
        for word in ("config.fsdp", "--fsdp", "DistributedDataParallel"):
            assert word not in path.read_text(), f"{path.name}: {word}"


@pytest.mark.parametrize("name", [*SCRIPTS, "eval"])
def test_every_flag_is_read_and_explained(name):
    own, shared = ({node.attr for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Attribute)}
                   for file in (f"{name}.py", "eval.py"))
    frames = {field.name for flags in (ground.RunFlags, ground.ProblemFlags) for field in fields(flags)}
    for field in fields(MODULES[name].Config):
        assert field.metadata.get("help"), f"--{field.name} has no help"
        assert field.name in own | (frames & shared), f"--{field.name} is read by nobody"


@pytest.mark.parametrize("name", MODULES)
def test_lines_fit_beside_each_other(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 120 or line != line.rstrip()]
    assert not re.search(r"\n{4}", "\n".join(lines))  # two empty lines part functions, never three


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_function_of_a_script_is_used_in_it(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.name in used, f"{name}.py: {node.name} is dead code"


def test_flags_of_the_same_name_mean_the_same():
    """Of one type; and a script that gives a shared flag another default lets it be what the shared one may be."""
    shared = {field.name: field for flags in (ground.RunFlags, ground.ProblemFlags) for field in fields(flags)}
    types = {}
    for name, script in SCRIPTS.items():
        for field in fields(script.Config):
            kind, where = types.setdefault(field.name, (field.type, name))
            assert kind == field.type, f"--{field.name} of {where}.py and {name}.py"
            if field.name in shared:
                for rule in ("choices", "low", "high", "free"):
                    wanted = shared[field.name].metadata[rule]
                    assert field.metadata[rule] == wanted, f"{name}.py, --{field.name}: {rule} should be {wanted}"


@pytest.mark.parametrize("name", [*SCRIPTS, "eval"])
def test_flags_say_what_they_may_be(name):
    """A default is allowed, a highest value has a lowest, and every flag is in a section that --help shows."""
    Config = MODULES[name].Config
    ground.check_flags(Config())
    names = [field.name for field in fields(Config)]
    assert names[0] in Config.SECTIONS and set(Config.SECTIONS) <= set(names)
    assert len(set(Config.SECTIONS.values())) == len(Config.SECTIONS)
    for field in fields(Config):
        low, high, choices = (field.metadata[rule] for rule in ("low", "high", "choices"))
        assert high is None or (low is not None and low < high), f"--{field.name}"
        assert (low is None and high is None) or not choices, f"--{field.name}"


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(MODULES[name]).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_say_what_they_do(name):
    for item_name, item in vars(MODULES[name]).items():
        if (inspect.isfunction(item) or inspect.isclass(item)) and item.__module__ == MODULES[name].__name__:
            triton_code = item_name.endswith("_kernel") or item_name == "gate_and_up"  # their launchers speak for them
            if item_name not in {"Config", "main"} and not triton_code:
                assert item.__doc__, f"{name}.{item_name} has no docstring"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_nothing_dangerous_stands_in_the_scripts(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"exec", "eval", "pickle.load", "pickle.loads", "torch.load"}, f"{path.name}:{node.lineno}"
            assert not any(keyword.arg == "trust_remote_code" for keyword in node.keywords), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: bare except"


def readme_commands():
    """Every `python x.py ...` and `torchrun ... x.py ...` in the README's and the scripts' fenced or indented commands."""
    texts = [(ROOT / "README.md").read_text()] + [module.__doc__ for module in MODULES.values()]
    for text in texts:
        joined = text.replace("\\\n", " ")
        for match in re.finditer(r"(?:python|torchrun)[^\n`|&]*?\b(sft|dpo|distill|grpo|moe|eval)\.py([^\n`|&]*)", joined):
            yield match[1], re.split(r"\s#\s|\)", match[2])[0].strip()  # a comment, or the end of prose


def test_commands_in_the_readme_parse():
    seen = 0
    for name, arguments in readme_commands():
        arguments = shlex.split(arguments.replace("...", ""))
        if name == "eval":
            config, _ = ground.parse_flags(ground.Config, "", ground.__doc__, arguments)
            dataset, split = config.dataset_name, config.dataset_test_split
        else:
            config, words = ground.parse_flags(MODULES[name].Config, "", "", arguments)
            MODULES[name].check_config(config)
            assert not words
            dataset, split = getattr(config, "dataset_name", ""), getattr(config, "dataset_test_split", "")
        for short, (hub_name, _, splits) in ground.BENCHMARKS.items():  # some have no validation split
            assert dataset not in (short, hub_name) or split in splits, arguments
        seen += 1
    assert seen >= 8


def test_flags_in_the_tables_of_the_readme_are_flags_and_hang_together():
    known = {field.name for module in MODULES.values() if hasattr(module, "Config") for field in fields(module.Config)}
    text = (ROOT / "README.md").read_text()
    stages = re.search(r"`--stages ([\dx ]+)`", text)[1]
    grpo.check_config(grpo.Config(stages=stages.split()))
    not_ours = {"shutdown-timeout", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "model", "model_args",
                "tasks", "apply_chat_template", "table"}
    for word in re.findall(r"(?<![\w-])--([a-z]\w[\w-]*)", text):
        assert word.removeprefix("no_") in known or word in not_ours, f"--{word}"


def test_a_flag_that_is_none_is_refused(monkeypatch, capsys):
    for name, script in SCRIPTS.items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--learning_rat", "1"])
        with pytest.raises(SystemExit) as ended:
            script.launch(script.main, script.Config)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and len(said.splitlines()) == 1
        assert "--learning_rat: no such flag (did you mean --learning_rate?)" in said
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--max_steps", "many"])
        with pytest.raises(SystemExit) as ended:
            script.launch(script.main, script.Config)
        assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", [*SCRIPTS, "eval"])
def test_help_is_printed_and_names_every_flag_with_its_default(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    module = MODULES[name]
    with pytest.raises(SystemExit) as ended:
        module.launch(module.main, module.Config)
    lines = capsys.readouterr().out
    said = " ".join(lines.split())
    assert ended.value.code == 0
    flags, sections = fields(module.Config), module.Config.SECTIONS
    shown = re.findall(r"^  --(\w+)", lines.partition("options:")[2], re.M)
    assert sorted(shown) == sorted(flag.name for flag in flags)  # each once
    assert said.count("(default: ") >= len(flags)
    assert [name for name in shown if name in sections] == list(sections)  # in this order
    assert all(f"{title}: --{first} " in said for first, title in sections.items())
    entries = dict(entry.partition(" ")[::2] for entry in re.split(r"^  (?=--)", lines, flags=re.M))
    for flag in flags:
        choices = flag.metadata["choices"]
        for choice in (choices() if callable(choices) else choices) or ():
            assert choice in entries[f"--{flag.name}"], f"--{flag.name}: {choice}"


def test_ctrl_c_before_the_first_step_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft.py"])

    def interrupted(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        sft.launch(interrupted, sft.Config)
    assert ended.value.code == 130 and capsys.readouterr().err == "sft.py: interrupted\n"


SUFFIX = re.compile(r"_([A-Z1]+)$")


def test_shape_suffixes_are_true(tmp_path, monkeypatch):
    """While a run goes on, every local name that ends in dimensions must have that many, and one letter one size a call."""
    checked, wrong = set(), []

    def enter(frame, event, value):  # called for every Python function; only ours are looked at, when they return
        if Path(frame.f_code.co_filename).parent != ROOT:
            return None
        frame.f_trace_lines = False
        return leave

    def leave(frame, event, value):
        if event != "return":
            return
        sizes = {}
        for name, tensor in frame.f_locals.items():
            match = SUFFIX.search(name)
            if not match or not isinstance(tensor, torch.Tensor):
                continue
            place = f"{frame.f_code.co_name}: {name} has {tuple(tensor.shape)}"
            checked.add((frame.f_code.co_name, name))
            if tensor.ndim != len(match[1]):
                wrong.append(place)
                continue
            for letter, size in zip(match[1], tensor.shape):
                if size != (1 if letter == "1" else sizes.setdefault(letter, size)):
                    wrong.append(f"{place}, but {letter} was {sizes.get(letter, 1)}")

    monkeypatch.setattr(ground, "plot_runs", lambda *given: None)  # a thousand functions without a tensor
    sys.settrace(enter)
    try:
        sft.main(sft.Config(output_dir=str(tmp_path / "sft"), max_steps=2, n_train=32, per_device_train_batch_size=8,
                            eval_steps=0, save_steps=0))
        grpo.main(grpo.Config(model_name_or_path=str(tmp_path / "sft"), output_dir=str(tmp_path / "grpo"), max_steps=2,
                              n_train=16, per_device_train_batch_size=8, num_generations=4, max_completion_length=16,
                              beta=0.1, num_iterations=2, loss_type="gspo", eval_steps=0, save_steps=0,
                              reward_funcs=["accuracy", "length"]))
        dpo.main(dpo.Config(model_name_or_path=str(tmp_path / "sft"), output_dir=str(tmp_path / "dpo"), max_steps=2,
                            pairs="offline", error_rate=1.0, n_train=16, per_device_train_batch_size=4, sft_fraction=0.5,
                            eval_steps=0, save_steps=0))
        small = dict(model_name_or_path=str(tmp_path / "sft"), teacher_model_name_or_path=str(tmp_path / "grpo"), max_steps=1,
                     n_train=8, per_device_train_batch_size=4, max_completion_length=8, eval_steps=0, save_steps=0)
        distill.main(distill.Config(**small, output_dir=str(tmp_path / "rlt"), teacher_sft_steps=1, teacher_steps=2,
                                    teacher_batch_size=8, num_generations=4, ref_model_sync_steps=1))
        distill.main(distill.Config(**small, output_dir=str(tmp_path / "kd"), method="logits", kd_weight=0.5))
        distill.main(distill.Config(**small, output_dir=str(tmp_path / "own"), method="on_policy", divergence="jsd"))
        distill.main(distill.Config(**small, output_dir=str(tmp_path / "em"), method="bootstrap", rounds=1))
        moe.main(moe.Config(output_dir=str(tmp_path / "moe"), max_steps=2, n_train=4, n_eval=1, max_length=32,
                            per_device_train_batch_size=4, eval_steps=2, save_steps=0, max_completion_length=2))
    finally:
        sys.settrace(None)
    assert not wrong, sorted(set(wrong))[:10]
    assert len(checked) > 40
