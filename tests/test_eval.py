"""eval.py: the answer checker, the problems, the statistics and the command line. (The sampler: test_generate.py.)"""

import csv
import doctest
import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
import threading
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval as ground
from eval import (CHAIN_DOMAINS, CHAIN_LEVELS, CHAIN_LIMIT, InputError, MathJudge, Problem, bootstrap_interval,
                  evaluate, extract_answer, flag, load_model, load_problems, majority_at_k, mean_interval,
                  paired_comparison, pass_at_k, plot_runs, read_rows, split_of, to_number, verify, wilson_interval)

torch.set_num_threads(1)


# --- answers ---

RIGHT = [
    # the formats
    ("34", "34"), ("#34", "34"), ("37+5=42;42-8=34#34", "34"), ("37+5=42;42-8=34", "34"), ("# 34\n", "34"),
    ("##34", "34"), ("#### 18", "18"), ("####\n4", "4"), ("#### 42\nHope this helps! 7", "42"), ("#### **42**", "42"),
    (r"$\boxed{ 7 }$.", "7"), (r"\fbox{42}", "42"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{\{1,2]}", r"\{1,2]"),
    ("<answer>4</answer>", "4"), ("<answer> 4 </answer>, as 2+2", "4"), (r"<answer>\boxed{4}</answer>", "4"),
    ("The answer is 42.", "42"), ("**42**", "42"), ("x = -5", "-5"), ("10-5", "5"), ("3:45", "45"),
    ("Problem #3: the answer is 42", "42"), ("# Notes\nso 42", "42"), (r"the answer is \frac{3}{4}", "3/4"),
    (r"the answer is \dfrac{ 3 }{ 4 }", "3/4"),
    (r"\boxed{3} or \boxed{4}", "4"), ("<think>it is 5</think>The answer is 4", "4"), ("so 4</think>#### 5", "5"),
    # the numbers
    ("#### 18.", "18"), ("#### $18", "18"), ("#### 1,000", "1000"), ("#### 1000", "1,000"), ("#### 18.00", "18"),
    ("#### -3", "-3"), ("#### +3", "3"), ("The answer is −5.", "-5"), ("#### 3/4", "0.75"), ("#### 0.75", "3/4"),
    ("#### 75%", "75"), ("#### 75%", "0.75"), ("#### 0.75", "75%"), (r"\boxed{75\%}", "75"), ("#### 75 percent", "75%"),
    ("#### 18 dollars", "18"), (r"\boxed{5\text{ cm}}", "5"), (r"\boxed{90^\circ}", "90"),
    (r"\boxed{\$1{,}234}", "1234"), (r"\boxed{1\,234}", "1234"), ("1e3", "1000"), (".5", "1/2"),
    ("#### " + "4" * 10_000, "4" * 10_000),
    (r"\boxed{\frac{1}{2}}", "1/2"), (r"\boxed{\dfrac{1}{2}}", "0.5"), (r"\boxed{\frac12}", r"\frac{1}{2}"),
    (r"\boxed{1\frac{1}{2}}", "3/2"), (r"\boxed{-\frac{1}{2}}", "-0.5"), (r"\boxed{(3)}", "3"), (r"\boxed{x = 3}", "3"),
    # the rest
    (r"\boxed{\text{east}}", "east"), (r"\boxed{\text{(A)}}", "A"), ("<answer>True</answer>", "true"),
    (r"\boxed{(1, 2)}", "(1,2)"), (r"\boxed{2x+1}", "1+2x"), (r"\boxed{\sqrt{16}}", "4"), (r"\boxed{2^4}", "16"),
    (r"\boxed{11\,\sqrt{2}}", r"11\sqrt2"), (r"\boxed{\frac{\sqrt{3}}{2}}", r"\sqrt{3}/2"),
    (r"\boxed{\{2,1\}}", r"\{1,2\}"),
]
WRONG = [
    ("37+5=42;42-8=34#35", "34"), ("", "4"), ("no number", "4"), ("a#b#c", "4"), ("٣", "3"), ("4 4 4", "444"),
    ("#### 4 4 4", "444"), ("#### 11", "1 1"), ("1,23", "123"), ("#### 12,34", "1234"), ("#### 0.333", "1/3"),
    ("#### 0.49999999", "0.5"), ("#### 1/0", "1"), (r"\boxed{1/0}", "0"), ("#### inf", "4"), ("#### nan", "4"),
    ("#### 18 million", "18"), ("#### 18 or 19", "18"), (r"\boxed{3 or 4}", "4"), (r"\boxed{3, 4}", "3"),
    (r"\boxed{4x}", "4"), (r"\boxed{4}", "4x"), (r"\boxed{\pm 4}", "4"), (r"\boxed{3=4}", "4"),
    (r"\boxed{1=2=3=4}", "4"), (r"\boxed{x=3=4}", "4"),
    (r"\boxed{[0,100]}", "4"), (r"\boxed{x}", "4"), (r"\boxed{37+5-8}", "34"), (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{[1,2)}", "(1,2)"), (r"\boxed{6.28}", r"2\pi"), (r"\boxed{\text{east}}", "west"),
    (r"\boxed{3} or \boxed{4}", "3"), (r"\boxed{3=\frac{8}{2}}", "4"), (r"\boxed{5=2\sqrt{3}}", r"2\sqrt{3}"),
    (r"<think>\boxed{3}</think> none", "3"), ("<think>it is 4", "4"), (r"\boxed{4}.</think>", "4"), (r"\boxed{4", "4"),
    ("<answer>4", "4"), ("<answer></answer> 4", "4"), (r"\boxed{} 4", "4"), (r"\boxed{\}4}", "4"),
]
HOSTILE = [
    (r"\boxed{9^{9^{9}}}", "4"), (r"\boxed{9^{(9^{9})}}", "4"), (r"\boxed{100000000!}", "4"),
    (r"\boxed{(x+1)^{3000}}", "4"),
    (r"\boxed{\binom{1000000}{500000}}", "4"), (r"\boxed{1e999999999}", "4"), (r"\boxed{\int_0^1 x^x dx}", "4"),
    (r"\boxed{" * 5000, "4"), ("{" * 10_000 + "4}", "5"), ("4" * 10_000, "4"), ("1," * 5000, "4"), ("1/" * 5000, "4"),
    ("9." * 5000, "4"), ("-" * 10_000, "4"), ("#" * 10_000, "4"), ("\\frac" * 3000, "4"), ("<answer>" * 3000, "4"),
    (r"\boxed{" + "{" * 140 + "}" * 141, "4"), (r"\boxed{" + r"\sqrt{" * 40 + "4" + "}" * 41, "4"),
    ("\\boxed{\x00}", "4"), ("\\boxed{\ud800^2}", "4"), (r"\boxed{\input{/etc/passwd}^2}", "4"),
    (r'\boxed{__import__("os")^2}', "4"),
    ("<think>" * 3000, "4"), ("#" + " " * 10_000 + "x", "4"), (r"\boxed{\text{" + "a" * 10_000 + "}}", "4"),
]


@pytest.mark.parametrize("text, answer", RIGHT)
def test_right_answers_are_accepted(text, answer):
    assert verify(text, answer) is True


@pytest.mark.parametrize("text, answer", WRONG)
def test_wrong_answers_are_refused(text, answer):
    assert verify(text, answer) is False


def test_hostile_answers_neither_hang_nor_raise():
    for text, answer in HOSTILE:
        assert verify(text, answer) is False
        assert verify("#### 4", text) is False  # and as the reference


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = [*"0123456789.,-+/%$#{}()=^ \n½x", r"\boxed{", "####", "<answer>", "</answer>", "</think>", r"\frac", "e5"]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        found = extract_answer(text)
        assert found is None or found.strip() and found in text
        if found and to_number(found):
            assert verify(text, found)


def test_a_stuck_judge_is_killed_and_replaced():
    class Stuck(MathJudge):
        DEADLINE_S = 0.2
        PROGRAM = ("import sys, time\nprint('ready', flush=True)\nif '2' in sys.stdin.readline(): time.sleep(600)\n"
                   "print(1, flush=True)")

    judge = Stuck()
    assert judge.equal("2", "x") is False
    first = judge.process
    assert first.returncode == -signal.SIGKILL
    assert judge.equal("3", "x") is True
    assert judge.process.pid != first.pid


def test_an_interrupted_judge_does_not_answer_the_next_question(monkeypatch):
    class Echo(MathJudge):
        PROGRAM = ("import json, sys\nprint('ready', flush=True)\n"
                   "for line in sys.stdin: print(json.loads(line)[0], flush=True)")

    judge, reply = Echo(), Echo.reply

    def interrupted(self, seconds):
        if seconds == self.DEADLINE_S:
            monkeypatch.setattr(Echo, "reply", reply)
            raise KeyboardInterrupt
        return reply(self, seconds)

    monkeypatch.setattr(Echo, "reply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge.equal("1", "x")
    assert judge.equal("0", "x") is False and judge.equal("1", "y") is True


def test_judge_that_cannot_start_says_so():
    class Broken(MathJudge):
        PROGRAM = "import no_such_module"

    with pytest.raises(InputError, match="math-verify"):
        Broken().equal("2", "x")


def test_verdicts_off_the_main_thread_and_beside_an_alarm():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(verify(r"\boxed{\sqrt{25}}", "5")))
    signal.alarm(1000)
    thread.start()
    thread.join()
    verdicts.append(verify(r"\boxed{\sqrt{36}}", "6"))
    assert signal.alarm(0) > 0  # math-verify in this process would have erased it
    assert verdicts == [True, True]


# --- problems ---

def left_to_right(expression):
    """The value of a chain prompt, computed without the code under test."""
    tokens = expression.rstrip("=").replace("+", " + ").replace("-", " - ").replace("*", " * ").split()
    value = int(tokens[0])
    for op, operand in zip(tokens[1::2], tokens[2::2]):
        value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[op]
    return value


def test_chain_problems_are_what_they_claim():
    problems = load_problems("chain", "train", 2000, levels="1-7")
    assert {problem.level for problem in problems} == set(CHAIN_LEVELS)
    assert {problem.domain for problem in problems} == set(CHAIN_DOMAINS)
    for problem in problems:
        operators = [letter for letter in problem.prompt if letter in "+-*"]
        assert len(operators) == problem.level and set(operators) <= set(CHAIN_DOMAINS[problem.domain])
        assert problem.answer == str(left_to_right(problem.prompt))
        steps, _, final = problem.solution.partition("#")
        assert final == problem.answer and verify(problem.solution, problem.answer)
        assert [left_to_right(step.split("=")[0]) for step in steps.split(";")] == [
            int(step.split("=")[1]) for step in steps.split(";")]
        assert all(0 <= int(step.split("=")[1]) <= CHAIN_LIMIT for step in steps.split(";"))
        assert all(problem.solution.startswith(hint) for hint in problem.hints[1:])
        assert len(problem.hints) == min(problem.level, 3) and "#" not in "".join(problem.hints)
        assert not problem.hints[1:] or problem.hints[-1].count(";") == problem.level - 1


def test_chain_splits_never_share_an_expression():
    prompts = [{problem.prompt for seed in range(3)
                for problem in load_problems("chain", split, 500, seed, levels="1-3")} for split in ("train",
                "validation", "test")]
    for a, b in itertools.combinations(prompts, 2):
        assert not a & b
    # by a hash that is the same in every process and on every machine
    assert [split_of(f"{i}+1=") for i in range(10, 18)] == [
        "test", "train", "validation", "test", "train", "train", "test", "train"]


def test_every_level_and_domain_has_expressions_in_every_split():
    for split, domain in itertools.product(("train", "validation", "test"), CHAIN_DOMAINS):
        problems = load_problems("chain", split, 70, levels="1-7", domains=domain)
        assert all(split_of(problem.prompt) == split for problem in problems)
        assert {problem.level for problem in problems} == set(CHAIN_LEVELS)


def test_chain_is_a_function_of_its_arguments():
    first = load_problems("chain", "test", 200, 3)
    assert first == load_problems("chain", "test", 200, 3)
    assert first[:50] == load_problems("chain", "test", 50, 3)
    assert first != load_problems("chain", "test", 200, 4)
    assert len({problem.prompt for problem in first}) == 200


def test_chain_repeats_where_expressions_run_out():
    problems = load_problems("chain", "test", 600, levels="1", domains="mul")
    assert len(problems) == 600 and len({problem.prompt for problem in problems}) < 300


def test_a_sum_that_reaches_the_limit_early_is_drawn_again(monkeypatch):
    monkeypatch.setattr(ground, "CHAIN_LIMIT", 110)  # at 199 it takes some thousands of problems of level 7
    for problem in load_problems("chain", "train", 300, levels="5-7", domains="add"):
        assert len(problem.solution.split(";")) == problem.level and int(problem.answer) <= 110


def test_error_rate_spoils_steps_of_the_solution_alone():
    clean = load_problems("chain", "train", 1000)
    for rate in (0.3, 1.0):
        spoiled = load_problems("chain", "train", 1000, error_rate=rate)
        assert [(p.prompt, p.answer, p.hints) for p in spoiled] == [(p.prompt, p.answer, p.hints) for p in clean]
        wrong = total = 0
        for problem in spoiled:
            steps, _, final = problem.solution.partition("#")
            value = re.match("[0-9]+", problem.prompt)[0]
            for step in steps.split(";"):
                left, op, right, result = re.fullmatch(r"(-?[0-9]+)([-+*])([0-9]+)=(-?[0-9]+)", step).groups()
                assert left == value  # the trace goes on from what it wrote
                truth = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[op](int(left), int(right))
                wrong, total, value = wrong + (int(result) != truth), total + 1, result
            assert final == value
        assert abs(wrong / total - rate) < 0.03


@pytest.mark.parametrize("arguments, flag", [
    ({"levels": "0"}, "--levels"), ({"levels": "1-99"}, "--levels"), ({"levels": "a"}, "--levels"),
    ({"domains": "div"}, "--domains"), ({"split": "tset"}, "--dataset_train_split"), ({"n": 0}, "--n_train"),
    ({"error_rate": 2.0}, "--error_rate"), ({"prompt_template": "hm"}, "--prompt_template"),
    ({"name": "chian"}, "--dataset_name"), ({"name": "no/such/file.jsonl"}, "--dataset_name"),
    ({"name": "reasoning_gym:x", "split": "dev"}, "--dataset_train_split"),
])
def test_unusable_arguments_name_their_flag(arguments, flag):
    with pytest.raises(InputError, match=f"^{flag}"):
        load_problems(**{"name": "chain", "n": 4, **arguments})


GSM8K = [{"question": "2 and 2?", "answer": "It is 2+2=<<2+2=4>>4 in all.\n#### 4"},
         {"question": "Much?", "answer": "A lot.\n#### 1,200"},
         {"question": "Less?", "answer": "It is <<3-4=-1>>-1\n#### -1"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_gsm8k_rows(tmp_path):
    problems = load_problems(write_jsonl(tmp_path / "gsm.jsonl", GSM8K))
    assert problems[0] == Problem("2 and 2?", "4", "It is 2+2=4 in all.\n#### 4")
    assert [problem.answer for problem in problems] == ["4", "1,200", "-1"]
    assert all(verify(problem.solution, problem.answer) for problem in problems)
    # the flags that speak of `chain` may keep their defaults
    assert load_problems(str(tmp_path / "gsm.jsonl"), levels="1-5", domains="add", error_rate=0.15) == problems


def test_competition_rows(tmp_path):
    rows = [{"problem": "P", "solution": r"so \boxed{\frac{1}{2}}", "level": "Level 3", "subject": "Algebra"},
            {"problem": "Q", "solution": r"so \boxed{7}", "level": "Level 5", "subject": "Geometry"}]
    path = write_jsonl(tmp_path / "math.jsonl", rows)
    assert load_problems(path)[0] == Problem("P", r"\frac{1}{2}", rows[0]["solution"], (), "Algebra", 3)
    assert [problem.prompt for problem in load_problems(path, levels="4-5")] == ["Q"]
    assert [problem.prompt for problem in load_problems(path, domains="Algebra")] == ["P"]
    with pytest.raises(InputError, match="--levels"):
        load_problems(path, levels="1")


def test_rows_of_every_file_format_are_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "a, \"b\"\nü", "answer": "3"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (tmp_path / "bom.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "dev-00000-of-00001.parquet")
    for name in ("rows.jsonl", "rows.json", "bom.jsonl", "rows.csv"):
        assert read_rows(str(tmp_path / name)) == rows, name
    assert read_rows(str(tmp_path), "dev") == rows
    with pytest.raises(InputError, match="'test'.*rows.csv"):
        read_rows(str(tmp_path), "test")


def test_columns_templates_and_choice(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": f"{i}?", "a": i, "turns": chat} for i in range(50)])
    problems = load_problems(path, prompt_column="q", answer_column="a", prompt_template="Q: {prompt} {}")
    assert problems[7] == Problem("Q: 7? {}", "7")
    problem = load_problems(path, prompt_column="turns", answer_column="a", prompt_template="{prompt} Think.")[0]
    assert problem.prompt == [chat[0], {"role": "user", "content": "1+1? Think."}]
    some = load_problems(path, n=9, seed=1, prompt_column="q", answer_column="a")
    assert len(set(some)) == 9 and some[:4] == load_problems(path, n=4, seed=1, prompt_column="q", answer_column="a")
    assert some != load_problems(path, n=9, seed=2, prompt_column="q", answer_column="a")
    with pytest.raises(InputError, match="^--prompt_column.* q, a, turns"):
        load_problems(path)
    with pytest.raises(InputError, match="^--answer_column.*'b'"):
        load_problems(path, prompt_column="q", answer_column="b")


@pytest.mark.parametrize("content, message", [
    (b"", "holds no rows"), (b"\n \n", "holds no rows"),
    (b'{"prompt": "a"}\n\n{"prompt": \n', r"rows\.jsonl:3: not valid JSON"),
    (b'{"prompt": "a"}\n[1]\n', r"rows\.jsonl:2: "), (b'[1, {"prompt": "a"}]', r"rows\.jsonl:1: .* not int"),
    (b'{"prompt": "a"}\n\xff\n', r"rows\.jsonl:2: not UTF-8"),
    (b'{"prompt": "a", "answer": "1"}\n{"prompt": "a"}\n', "row 2: column 'answer'"),
    (b'{"prompt": " ", "answer": "1"}\n', "row 1: column 'prompt'"), (b"[" * 100_000, r"rows\.jsonl:1: "),
    (b'{"prompt": [{"role": "user"}], "answer": "1"}', "row 1: column 'prompt'"),
    (b'{"prompt": "a", "answer": "none given ####"}\n', "row 1: column 'answer'"),
])
def test_bad_files_are_named_with_their_line(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        load_problems(str(tmp_path / "rows.jsonl"))
    assert "\n" not in str(raised.value)


def test_unreadable_parquet_and_unknown_suffix(tmp_path):
    for name in ("rows.parquet", "rows.txt"):
        (tmp_path / name).write_text("no table")
        with pytest.raises(InputError, match=name):
            read_rows(str(tmp_path / name))


def test_hub_names(monkeypatch):
    import datasets
    calls = []

    def load_dataset(*args, split):
        calls.append((*args, split))
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_problems("gsm8k", "test")[0].answer == "4"
    load_problems("openai/gsm8k", "train")
    load_problems("owner/name:part", "dev")
    load_problems("aime24", "test")
    assert calls == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train"), ("owner/name", "part", "dev"),
                     ("HuggingFaceH4/aime_2024", None, "train")]
    with pytest.raises(InputError, match="--dataset_train_split train"):
        load_problems("math500", "train")

    def unreachable(*args, split):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"^--dataset_name owner/name.*no network\)$"):
        load_problems("owner/name")


def test_reasoning_gym_splits_are_disjoint(monkeypatch):
    class Items:
        """Item i depends on seed + i alone, as in the package: neighbouring seeds share all but one item."""
        def __init__(self, task, size, seed):
            self.seed = seed

        def __getitem__(self, i):
            value = random.Random(self.seed + i).randrange(5000)
            return {"question": f"{value} + 1?", "answer": str(value + 1)}

    package = types.SimpleNamespace(create_dataset=Items, factory=types.SimpleNamespace(DATASETS={"sum": None}))
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    train = load_problems("reasoning_gym:sum", "train", 300)
    test = load_problems("reasoning_gym:sum", "test", 100, seed=1)
    assert len(set(train)) == 300 and len(set(test)) == 100 and not set(train) & set(test)
    assert train[0].domain == "sum" and verify(train[0].answer, train[0].answer)
    with pytest.raises(InputError, match="no such task"):
        load_problems("reasoning_gym:nosuch", "train")


# --- statistics ---

def test_pass_at_k_equals_counting_all_subsets():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError):
        pass_at_k(4, 1, 5)


def test_majority_at_k_equals_counting_all_subsets():
    keys = ["7", "7", "7", "3", "3", "5", None, None]
    correct = [key == "7" for key in keys]
    for k in (1, 3, 4, 8):
        expected = []
        for subset in itertools.combinations(keys, k):
            votes = [key for key in subset if key is not None]
            leaders = [key for key in set(votes) if votes.count(key) == max(map(votes.count, votes))]
            expected.append(("7" in leaders) / max(len(leaders), 1))
        estimate = majority_at_k(keys, correct, k, n_subsets=20_000)
        assert estimate == pytest.approx(sum(expected) / len(expected), abs=0.01)
    assert majority_at_k(["7", None, None, None], [True, False, False, False], 4) == 1.0  # who says nothing has no vote
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    assert majority_at_k(["1", "2"], [True, False], 2) == 0.5


def test_wilson_interval():
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


def test_intervals_cover_the_truth():
    """Questions of differing difficulty, 8 samples each. By single samples the interval would cover about 65 %."""
    rng = np.random.default_rng(0)
    covered, runs = 0, 400
    for run in range(runs):
        scores = rng.binomial(8, rng.beta(0.4, 0.4, 60)) / 8  # true mean 0.5
        low, high = bootstrap_interval(scores, seed=run, n_resamples=1000)
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / runs <= 0.98


def test_mean_interval_is_never_empty_at_the_ends():
    assert mean_interval([0, 0, 0, 0])[1] > 0.4 and mean_interval([1.0] * 4)[0] < 0.6
    assert mean_interval([0.5]) == (0.0, 1.0)
    assert mean_interval([0.0, 0.5, 1.0] * 50) == mean_interval([0.0, 0.5, 1.0] * 50)  # seeded


def test_paired_comparison_of_verdicts():
    a = [1] * 40 + [0] * 40 + [1] * 3 + [0] * 12
    b = [1] * 40 + [0] * 40 + [0] * 3 + [1] * 12
    result = paired_comparison(a, b)
    assert (result["n_better"], result["n_worse"]) == (12, 3)
    assert result["difference"] == pytest.approx(9 / 95)
    assert result["mcnemar_p"] == pytest.approx(2 * sum(math.comb(15, i) for i in range(4)) / 2 ** 15)
    assert result["mcnemar_p"] == pytest.approx(0.03516, abs=1e-5)
    centre, spread = 9 / 97, 1.96 * math.sqrt((17 / 97 - (9 / 97) ** 2) / 97)
    assert (result["low"], result["high"]) == pytest.approx((centre - spread, centre + spread))
    swapped = paired_comparison(b, a)
    assert (swapped["low"], swapped["high"]) == pytest.approx((-result["high"], -result["low"]))


def test_paired_comparison_without_discordance_is_not_certain():
    for same in ([1, 0] * 50, [0.25, 0.5] * 50):
        result = paired_comparison(same, same)
        assert result["low"] < -0.02 and result["high"] > 0.02 and result["difference"] == 0
    assert paired_comparison([1, 0], [1, 0])["mcnemar_p"] == 1.0
    assert paired_comparison([0.5, 0], [1, 0])["mcnemar_p"] is None
    assert paired_comparison([0] * 2000, [1] * 2000)["mcnemar_p"] < 1e-300  # exact integers: no overflow
    with pytest.raises(ValueError):
        paired_comparison([1], [1, 0])


def test_pairing_is_narrower_than_comparing_two_means():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.4, 0.4, 300)
    a, b = rng.binomial(8, difficulty) / 8, rng.binomial(8, np.minimum(difficulty + 0.05, 1)) / 8
    paired = paired_comparison(a.tolist(), b.tolist())
    low, high = bootstrap_interval(a)
    assert paired["high"] - paired["low"] < 0.6 * (high - low)


@dataclass
class Canned:
    """Completions without a model, in the shape `generate` returns."""
    lines: list
    lengths_R: torch.Tensor
    finished_R: torch.Tensor

    def texts(self, tokenizer):
        return self.lines


@pytest.fixture
def canned(monkeypatch):
    """Lets `evaluate` see the given completions, the i-th of each prompt; returns a function that sets them."""
    seen = {}

    def set_lines(lines):
        def generate(model, tokenizer, prompts, n=1, **options):
            seen.update(options, prompts=prompts)
            lengths = torch.tensor([len(line) for line in lines])
            return Canned(lines, lengths, lengths < 6)

        monkeypatch.setattr(ground, "generate", generate)
        monkeypatch.setattr(ground, "encode_prompt", lambda tokenizer, prompt: [ord(letter) for letter in prompt])
        return seen

    return set_lines


def test_evaluate_counts(canned):
    problems = [Problem("a", "1", level=1, domain="x"), Problem("b", "2", level=2, domain="x"),
                Problem("c", "3", level=2)]
    seen = canned(["#1", "#1", "#1", "#5", "#2", "hm", "hm", "what is", "#7", "#7", "#7", "#3.0"])
    result = evaluate(None, None, problems, n=4, k=(1, 2, 4), max_new_tokens=9, temperature=0.7, top_p=0.9, seed=5)
    assert seen == {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 5, "batch_size": 256,
                    "progress": False, "prompts": [[97], [98], [99]]}
    assert result["scores"] == [3 / 4, 1 / 4, 1 / 4] and result["accuracy"] == pytest.approx(5 / 12)
    assert result["pass@1"] == pytest.approx(5 / 12) and result["pass@4"] == 1.0
    assert result["pass@2"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert result["maj@4"] == pytest.approx(2 / 3)  # 1 and 2 win their votes, 3 loses to 7
    assert result["parse_fail"] == 3 / 12 and result["truncated"] == 1 / 12
    assert result["mean_length"] == pytest.approx(31 / 12)
    assert result["by_level"][2]["accuracy"] == 1 / 4 and result["by_level"][2]["n_problems"] == 2
    assert result["by_domain"]["x"]["accuracy"] == 1 / 2
    assert result["accuracy/low"] < result["accuracy"] < result["accuracy/high"]
    assert [record["correct"] for record in result["records"]] == [
        verify(record["completion"], record["answer"]) for record in result["records"]]
    assert result["records"][11]["problem"] == 2 and result["records"][11]["sample"] == 3
    canned(["#2/4", "#.5", "#0.50", "#1", "#1", "#1.0", "#3"])  # answers vote by what they are, not as they are written
    assert evaluate(None, None, [Problem("a", "0.5")], n=7, k=(7,))["maj@7"] == 0.5


def test_evaluate_asks_a_repeated_question_once(canned):
    canned(["1", "2"])
    result = evaluate(None, None, [Problem("a", "1"), Problem("b", "1"), Problem("a", "1")])
    assert result["n_problems"] == 2 and result["accuracy"] == 0.5
    with pytest.raises(InputError, match="--k 2"):
        evaluate(None, None, [Problem("a", "1")], n=1, k=(2,))


# --- command line ---

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    paths = []
    for seed in range(2):
        paths.append(str(tmp_path_factory.mktemp("models") / f"model{seed}"))
        for part in load_model("tiny", seed=seed):
            part.save_pretrained(paths[-1])
    return paths


def command(*arguments):
    """python eval.py with these arguments, but that errors are raised."""
    ground.main(*ground.parse_flags(ground.Config, "", ground.__doc__, arguments))


def test_comparison_end_to_end(checkpoints, tmp_path, capsys):
    command(checkpoints[0], "--n_eval", "10", "--num_generations", "2", "--max_completion_length", "6", "--levels", "1-2",
            "--output_dir", str(tmp_path / "out"), checkpoints[1])
    table = capsys.readouterr().out
    assert f"{checkpoints[1]} minus {checkpoints[0]}" in table and "McNemar" in table and "avg@2" in table
    summary = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [run["checkpoint"] for run in summary["evaluations"]] == checkpoints
    assert summary["comparisons"][0]["sampled"].keys() >= {"difference", "low", "high", "n_problems"}
    assert summary["evaluations"][0]["greedy"]["temperature"] == 0 and summary["flags"]["levels"] == "1-2"
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * (10 + 20) and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "eval.json", "eval.png", "samples.jsonl"]
    assert (tmp_path / "out" / "eval.png").read_bytes()[:4] == b"\x89PNG"

    model, tokenizer = load_model(checkpoints[0])  # what a script that calls `evaluate` sees is what the command saw
    problems = load_problems("chain", "test", 10, levels="1-2")
    again = evaluate(model, tokenizer, problems, n=2, k=(1, 2), max_new_tokens=6)
    assert [record["completion"] for record in again["records"]] == [
        sample["completion"] for sample in samples if sample["decoding"] == "sampled"][:20]


def test_the_same_checkpoint_does_not_differ_from_itself(checkpoints, tmp_path):
    command(checkpoints[0], checkpoints[0], "--n_eval", "8", "--num_generations", "2", "--max_completion_length", "6",
            "--no_greedy", "--output_dir", str(tmp_path))
    comparison = json.loads((tmp_path / "eval.json").read_text())["comparisons"][0]
    assert comparison["sampled"]["difference"] == 0 and comparison["sampled"]["low"] < 0 < comparison["sampled"]["high"]
    assert "greedy" not in comparison


@pytest.mark.parametrize("arguments, message", [
    ([], "checkpoint"), (["tiny", "--foo", "1"], "--foo"), (["tiny", "--num_generations", "x"], "--num_generations: invalid"),
    (["tiny", "--num_generations", "0"], "--num_generations 0"), (["tiny", "--k", "9"], "--k 9"), (["tiny", "--k", "a"], "--k a"),
    (["tiny", "--top_p", "0"], "--top_p"), (["tiny", "--le", "1"], "--le"), (["tiny", "--temperature", "0"], "--num_generations 8"),
    (["tiny", "no-such-folder"], "no-such-folder"), (["tiny", "--levels", "0"], "--levels"),
    (["--plot", "no-such-run"], "--plot no-such-run"), (["tiny", "--temperature", "-1"], "--temperature"),
    (["tiny", "--dataset_name", "chian"], "--dataset_name chian"), (["tiny", "--seed", "-1"], "--seed -1"),
    (["tiny", "--dataset_test_split", "dev"], "^--dataset_test_split dev"), (["tiny", "--n_eval", "-1"], "--n_eval -1"),
    (["tiny", "--top_p", "nan"], "--top_p nan: must be a finite number"), (["tiny", "--against", "none"], "--against none"),
])
def test_bad_command_lines_leave_nothing_behind(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ground, "evaluate", lambda *args, **kwargs: pytest.fail("work was begun"))
    with pytest.raises(InputError, match=message) as raised:
        command(*arguments)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output_dir"):
        command("tiny", "--n_eval", "2", "--output_dir", str(tmp_path / "file"))


def test_exit_code(tmp_path):
    done = subprocess.run([sys.executable, ground.__file__, "--foo"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "eval.py: --foo: no such flag (--help lists them)\n"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1}])
    words = [sys.executable, ground.__file__, "--plot", ".", "--output_dir", "metrics.jsonl"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("eval.py: ") and done.stderr.count("\n") == 1


def test_every_flag_is_read_and_explained():
    source = Path(ground.__file__).read_text()
    for flag in fields(ground.Config):
        assert f"config.{flag.name}" in source and flag.metadata["help"], flag.name


# --- flags ---

@dataclass
class Flags:
    SECTIONS = {"rate": "numbers", "names": "others"}

    rate: float = flag(0.5, "a share", low=0, high=1)
    least: float = flag(1.0, "no choice", low=-2)
    count: int = flag(3, "how many", low=1)
    names: list[str] = flag(["a"], "some of these", choices=lambda: ("a", "b"))
    shares: list[float] = flag([], "50 %% or so", low=0, high=1)
    on: bool = flag(False, "a switch that is off")
    off_line: bool = flag(True, "a switch that is on")
    text: str = flag("x", "free text", free=True)

    def __post_init__(self):
        ground.check_flags(self)


@pytest.mark.parametrize("words, changes", [
    ([], {}), (["--rate", "1"], {"rate": 1.0}), (["--rate=0"], {"rate": 0.0}), (["--least", "-1.5"], {"least": -1.5}),
    (["--on"], {"on": True}), (["--on", "True"], {"on": True}), (["--on=false"], {"on": False}),
    (["--no_off_line"], {"off_line": False}), (["--no-off-line"], {"off_line": False}),
    (["--off-line", "False"], {"off_line": False}), (["--off_line", "--on"], {"on": True}),
    (["--names", "b", "a"], {"names": ["b", "a"]}), (["--names"], {"names": []}), (["--names", "b", "--on"],
                                                                                   {"names": ["b"], "on": True}),
    (["--shares", "0.5", "1"], {"shares": [0.5, 1.0]}), (["--text", "a-b"], {"text": "a-b"}),
    (["--text=--a-b"], {"text": "--a-b"}), (["--text", "-- well-known"], {"text": "-- well-known"}),
    (["--text="], {"text": ""}), (["--text", ""], {"text": ""}),
])
def test_a_command_line_means_what_it_says(words, changes):
    config, rest = ground.parse_flags(Flags, "", "", words)
    assert asdict(config) == {**asdict(Flags()), **changes} and not rest
    assert Flags().names == ["a"] is not Flags().names  # each has a list of its own


@pytest.mark.parametrize("words, fault", [
    (["--rate", "2"], "--rate 2.0: must be between 0 and 1"), (["--rate", "nan"], "--rate nan: must be a finite number"),
    (["--rate=-inf"], "--rate -inf: must be a finite number"), (["--least", "-3"], "--least -3.0: must be -2 or more"),
    (["--count", "0"], "--count 0: must be 1 or more"), (["--count", "1.5"], "--count: invalid int value: '1.5'"),
    (["--count", "1e3"], "--count: invalid int value"), (["--count"], "--count: expected one argument"),
    (["--rate", "--on"], "--rate: expected one argument"), (["--names", "a", "c"], "--names c: must be one of a, b"),
    (["--shares", "0.5", "-1"], "--shares -1.0: must be between 0 and 1"), (["--on", "perhaps"], "--on: "),
    (["--of_line"], "--of_line: no such flag (did you mean --off_line?)"), (["--rat", "1"], "--rat: no such flag"),
    (["-r", "1"], "-r: no such flag"), (["--no_rate"], "--no_rate: no such flag"), (["--no_on=1"], "--no_on: "),
])
def test_what_a_flag_cannot_be_is_one_line(words, fault):
    with pytest.raises(InputError) as raised:
        ground.parse_flags(Flags, "", "", words)
    assert str(raised.value).startswith(fault) and "\n" not in str(raised.value)


def test_numbers_given_in_python_are_held_to_the_same(capsys):
    assert Flags(rate=1, least=-2).rate == 1  # an int for a float
    for wrong in (dict(rate=math.nan), dict(rate=1.5), dict(least=-math.inf), dict(names=["c"]), dict(shares=[math.nan])):
        with pytest.raises(InputError, match=f"^--{next(iter(wrong))} "):
            Flags(**wrong)
    with pytest.raises(SystemExit):
        ground.parse_flags(Flags, "%(prog)s", "100 % true", ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "100 % true" in said and "numbers: --rate float a share (default: 0.5)" in said
    assert "others: --names [str ...] some of these: a, b (default: ['a'])" in said and "50 % or so" in said
    assert "no_on" not in said


def test_wandb_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(ground, "find_spec", lambda name: None)
    ground.RunFlags()
    with pytest.raises(InputError, match="^--report_to wandb: needs `pip install wandb`$"):
        ground.RunFlags(report_to="wandb")


# --- plots ---

def test_plot_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": 1 / step, "reward": None if step == 3 else 0.1, "note": "x"}
                for step in range(1, 200)]
        write_jsonl(tmp_path / name / "metrics.jsonl", rows)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 150, "loss": NaN, "eval/accuracy": 0.5}\n{"step": 2')  # resumed, and being written
    curves = ground.read_metrics(tmp_path / "a")
    assert set(curves) == {"loss", "reward", "eval/accuracy"}
    assert len(curves["loss"]) == 199 and math.isnan(curves["loss"][150]) and 3 not in curves["reward"]
    plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "deep" / "curves.png")
    assert (tmp_path / "deep" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "deep" / "curves_all.png").exists()  # reward does not move
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": \n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: "):
        plot_runs([tmp_path / "b"], tmp_path / "curves.png")


def test_curves_show_what_moves_the_key_figures_first(tmp_path, monkeypatch):
    """Constants get no panel, key figures stand in the first picture, the rest in the second, ends of intervals in none."""
    rows = [{"step": step, "eval/accuracy": step / 9, "eval/accuracy/low": 0.0, "eval/accuracy/high": 1 - step / 99,
             "loss": 1 - step, "kl": 0.0, "time/step_s": 0.1 * step} for step in range(5)]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    drawn = {}
    monkeypatch.setattr(ground, "save_figure", lambda figure, path: drawn.update({Path(path).name: figure}))
    plot_runs([tmp_path], tmp_path / "curves.png")
    assert {name: [axis.get_title("left") for axis in figure.axes] for name, figure in drawn.items()} == {
        "curves.png": ["eval/accuracy", "loss"], "curves_all.png": ["time/step_s"]}
    accuracy, loss = drawn["curves.png"].axes
    assert accuracy.get_ylim() == (-0.02, 1.02) and len(accuracy.collections[0].get_segments()) == 5
    assert loss.get_ylim()[0] < -2 and not loss.collections[0].get_segments()


@pytest.mark.parametrize("against, pairs", [("first", ["ba", "ca"]), ("previous", ["ba", "cb"]), ("all", ["ba", "ca", "cb"])])
def test_checkpoints_are_compared_with_those_asked_for(against, pairs):
    scores = {"a": [0, 0, 0], "b": [1, 0, 0], "c": [1, 1, 1]}
    evaluations = [{"greedy": {"scores": scores[name]}} for name in "abc"]
    found = ground.compare(list("abc"), evaluations, against, seed=0)
    assert [f["checkpoint"] + f["against"] for f in found] == pairs
    for f in found:
        change = sum(scores[f["checkpoint"]]) / 3 - sum(scores[f["against"]]) / 3
        assert f["greedy"]["difference"] == pytest.approx(change)


def test_a_picture_is_replaced_only_when_it_is_whole(tmp_path, monkeypatch):
    def full_disk(figure, path, **options):
        Path(path).write_text("half")
        raise OSError("no space left")

    (tmp_path / "a.png").write_text("old")
    figure, _ = ground.new_figure(1, 1)
    monkeypatch.setattr(type(figure), "savefig", full_disk)
    with pytest.raises(OSError):
        ground.save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "old"


def test_running_mean_skips_what_is_missing():
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    assert ground.running_mean(values, 1).tolist() == [1.5, 1.5, 3.0, 4.5, 4.5]


def test_doctests():
    results = doctest.testmod(ground)
    assert results.attempted >= 10 and results.failed == 0


def test_an_exception_without_a_message_is_named_by_its_type(tmp_path, monkeypatch):
    def silent(name):
        raise OSError

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(ground.AutoTokenizer, "from_pretrained", silent)
    with pytest.raises(InputError, match=r"cannot be loaded \(OSError\)"):
        load_model(str(tmp_path))


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ground.AutoTokenizer, "from_pretrained", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such folder; `python sft.py` makes it"):
        ground.load_model("runs/sft")
    with pytest.raises(InputError, match="^--model_name_or_path runs/typo: no such folder$"):
        ground.load_model("runs/typo")
    with pytest.raises(InputError, match="^runs/typo: no such folder$"):  # eval.py has no such flag
        command("runs/typo")
