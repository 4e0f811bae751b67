r"""The ground the training scripts stand on: problems, the answer checker, the sampler, and the statistics.

What a policy is trained on, rewarded by and judged by is one and the same code. As a script, compares checkpoints:

    python eval.py runs/sft runs/grpo                              # built-in arithmetic chains, no network
    python eval.py Qwen/Qwen2.5-0.5B-Instruct runs/grpo --dataset_name gsm8k --n_eval 0 --max_completion_length 512 \
        --prompt_template '{prompt} Reason step by step and put the final answer in \boxed{}.'
    python eval.py --plot runs/sft runs/grpo                       # training curves from their metrics.jsonl

The first prints one table and writes eval.json, samples.jsonl and eval.png. What the columns mean, for Q problems with
n samples each, of which c_q are right:

    greedy    share of right answers at temperature 0
    avg@n     mean of c_q / n at the given temperature
    pass@k    mean of 1 - C(n - c_q, k) / C(n, k): one of k samples is right, estimated without bias
    maj@k     the most frequent answer among k of the n samples is right; mean over random choices of the k
    no answer, cut off    shares of samples without a final answer, and ended by --max_completion_length

The problem is the unit of every interval: samples of one problem are not independent, and an interval over all samples
would be about half as wide as it should be. Checkpoints are compared on the same problems, difference by difference.

Dimensions: B rows decoded together · L those still going · R all rows · P prompts · W tokens of the longest prompt ·
T tokens · V vocabulary · Q problems.
"""

import csv
import difflib
import hashlib
import inspect
import io
import json
import math
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
import transformers
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)
from transformers.cache_utils import DynamicLayer
from transformers.hf_argparser import string_to_bool

transformers.logging.disable_progress_bar()  # one for every save and load would bury the lines of a run
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process saves its checkpoints alone
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # to which nothing is written in place

# --- problems ---

class InputError(Exception):
    """Something the user gave is wrong: one line that names the flag, or file and line; scripts exit with code 2."""


@dataclass(frozen=True)
class Problem:
    """A question with a checkable answer."""
    prompt: str | list[dict]  # text, or chat messages
    answer: str
    solution: str | None = None  # worked out, with the answer at its end
    hints: tuple = ()  # from abstract to concrete: texts, or tiers of texts that add up
    domain: str = ""
    level: int = 0
    subgoals: tuple = ()  # (prompt, answer) of problems on the way to this one, in order


CHAIN_DOMAINS = {"add": "+", "sub": "-", "mul": "*", "mixed": "+-*"}
CHAIN_LEVELS = range(1, 8)  # the last may double at each step: 2 ** 7 <= CHAIN_LIMIT
CHAIN_FIRST = 99  # largest first operand
CHAIN_OPERAND = {"+": 20, "-": 20, "*": 3}  # largest later operand: small, so that half a million weights can learn it
CHAIN_LIMIT = 199  # no intermediate result of a correct trace exceeds it
CHAIN_RULE = "Work from left to right, one operation at a time."

# Where the usual names are found: hub name, configuration, splits. A test set is never handed out as "train".
BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math500": ("HuggingFaceH4/MATH-500", None, {"test": "test"}),
    "aime24": ("HuggingFaceH4/aime_2024", None, {"test": "train"}),  # published as "train", but it is an exam
    "aime25": ("math-ai/aime25", None, {"test": "test"}),
    "amc23": ("math-ai/amc23", None, {"test": "test"}),
}
PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "solution")
DOMAIN_COLUMNS = ("domain", "subject", "category")
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def load_problems(name, split="train", n=None, seed=0, *, prompt_column=None, answer_column=None, levels="", domains="",
                  error_rate=0.0, prompt_template="{prompt}"):
    """A list of Problems, a pure function of the arguments; a smaller `n` gives the beginning of a larger one.

    `name`: chain · gsm8k, math500, aime24, aime25, amc23 · reasoning_gym:TASK · a local file or folder · a hub data
    set `owner/name` or `owner/name:configuration`. n=None takes all there is, in its order.
    `levels` "1-3,5" and `domains` "add,mul" choose among data that has levels or domains; "" takes all.
    `error_rate`: share of wrong steps in the *solutions* of `chain` (and of nothing else); the answers stay right.
    `prompt_template` is put around each prompt (of a chat: around its last message). An InputError names the flags of
    training data.
    """
    if "{prompt}" not in prompt_template:
        raise InputError(f"--prompt_template {prompt_template!r}: must contain {{prompt}}")
    if n is not None and n < 1:
        raise InputError(f"--n_train {n}: must be at least 1")
    if not 0 <= error_rate <= 1:
        raise InputError(f"--error_rate {error_rate}: must be a share between 0 and 1")
    procedural = name == "chain" or name.startswith("reasoning_gym:")
    if procedural and split not in ("train", "validation", "test"):
        raise InputError(f"--dataset_train_split {split}: a procedural data set has train, validation and test")
    wanted_levels = parse_levels(levels)
    wanted_domains = [domain.strip() for domain in domains.split(",") if domain.strip()]
    if name == "chain":
        problems = chain_problems(split, n or 10_000, seed, wanted_levels, wanted_domains, error_rate)
    elif procedural:
        problems = reasoning_gym_problems(name.partition(":")[2], split, n or 1000, seed)
    else:
        rows = read_rows(name, split)
        where = f"--dataset_name {name}"
        prompt_column = find_column(rows, prompt_column, PROMPT_COLUMNS, "--prompt_column", where)
        answer_column = find_column(rows, answer_column, ANSWER_COLUMNS, "--answer_column", where)
        problems = [row_problem(row, prompt_column, answer_column, f"{where}, row {number}")
                    for number, row in enumerate(rows, 1)]
        problems = filter_problems(problems, wanted_levels, wanted_domains)
        if n is not None:
            random.Random(seed).shuffle(problems)
            problems = problems[:n]
    if prompt_template == "{prompt}":
        return problems
    return [replace(problem, prompt=fill_template(prompt_template, problem.prompt)) for problem in problems]


def chain_problems(split, n, seed, levels, domains, error_rate):
    """`n` chain problems, levels and domains in turn; distinct as long as there are enough distinct expressions."""
    levels, domains = levels or [1, 2, 3, 4, 5], domains or list(CHAIN_DOMAINS)
    if not set(levels) <= set(CHAIN_LEVELS):
        raise InputError(f"--levels: chain has levels {CHAIN_LEVELS[0]} to {CHAIN_LEVELS[-1]}")
    if not set(domains) <= set(CHAIN_DOMAINS):
        raise InputError(f"--domains {','.join(domains)}: chain has {', '.join(CHAIN_DOMAINS)}")
    rng = random.Random(f"chain {split} {seed}")
    slips = random.Random(f"slips {split} {seed}")  # a stream of its own: the error rate does not change the questions
    seen, problems = set(), []
    for i in range(n):
        level, domain = levels[i % len(levels)], domains[i // len(levels) % len(domains)]
        first, operations = new_chain(rng, split, level, domain, seen)
        steps, results = chain_steps(first, operations)
        written, written_results = chain_steps(first, operations, error_rate, slips)
        hints = (CHAIN_RULE, *(";".join(steps[:k]) + ";" for k in sorted({1, level - 1}) if 0 < k < level))
        subgoals = tuple((chain_prompt(first, operations[:k]), results[k - 1]) for k in range(1, level))
        problems.append(Problem(chain_prompt(first, operations), results[-1],
                                f"{';'.join(written)}#{written_results[-1]}", hints, domain, level, subgoals))
    return problems


def new_chain(rng, split, level, domain, seen):
    """Draws until the prompt is of the split and not in `seen`, where it is added; the eleventh repeat is taken."""
    repeats = 0
    while True:  # ends because every level and domain has expressions in every split, which a test holds
        first, operations = draw_chain(rng, level, domain)
        prompt = chain_prompt(first, operations)
        if split_of(prompt) == split:
            if prompt not in seen or repeats == 10:
                seen.add(prompt)
                return first, operations
            repeats += 1


def draw_chain(rng, level, domain):
    """(first operand, [(operator, operand), ...]) with every intermediate result in 0..CHAIN_LIMIT."""
    operators = CHAIN_DOMAINS[domain]
    low = level if domain == "sub" else 1  # enough to subtract 1 at each step
    high = min(CHAIN_FIRST, CHAIN_LIMIT >> level) if domain == "mul" else CHAIN_FIRST  # room to double at each step
    first = value = rng.randint(low, high)
    operations = []
    for remaining in range(level, 0, -1):
        room = {"+": CHAIN_LIMIT - value, "-": value // remaining,  # - and * leave as large a one to each later step
                "*": int((CHAIN_LIMIT / max(value, 1)) ** (1 / remaining) + 1e-9)}
        largest = {op: min(CHAIN_OPERAND[op], room[op]) for op in operators}
        if not any(largest.values()):  # a sum that has reached the limit early
            return draw_chain(rng, level, domain)
        # 1 is a dull operand, so an operator that has room for no other is taken only where all are in that state
        op = rng.choice([op for op in operators if largest[op] > 1] or operators)
        operand = rng.randint(1, largest[op])
        operations.append((op, operand))
        value = apply_operator(op, value, operand)
    return first, operations


def apply_operator(op, left, right):
    """left op right for +, - and *."""
    return left + right if op == "+" else left - right if op == "-" else left * right


def chain_prompt(first, operations):
    """
    >>> chain_prompt(37, [("+", 5), ("-", 8)])
    '37+5-8='
    """
    return f"{first}{''.join(f'{op}{operand}' for op, operand in operations)}="


def chain_steps(first, operations, error_rate=0.0, slips=None):
    """(["37+5=42", ...], ["42", ...]). A step goes wrong with chance `error_rate`, and the trace goes on from there."""
    steps, results, value = [], [], first
    for op, operand in operations:
        result = apply_operator(op, value, operand)
        if error_rate and slips.random() < error_rate:
            slip = slips.choice((-10, -2, -1, 1, 2, 10))
            result += slip if result + slip >= 0 else -slip
        steps.append(f"{value}{op}{operand}={result}")
        results.append(str(result))
        value = result
    return steps, results


def split_of(text):
    """The split a procedural question belongs to: 1 in 10 test, 1 in 10 validation, by its text alone."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(text.encode()) % 10, "train")


def reasoning_gym_problems(task, split, n, seed):
    """`n` problems of one task of the reasoning-gym package, judged like all others by their one reference answer."""
    where = f"--dataset_name reasoning_gym:{task}"
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(f"{where}: needs `pip install reasoning-gym`") from error
    if task not in reasoning_gym.factory.DATASETS:
        raise InputError(f"{where}: no such task")
    # Item i is drawn from seed + i, so neighbouring seeds share items; and equal questions turn up under far seeds.
    items = reasoning_gym.create_dataset(task, size=50 * n, seed=seed * 10**6)
    problems = {}  # by question
    for i in range(50 * n):
        item = items[i]
        question, answer = item["question"], item["answer"]
        if answer is None:
            raise InputError(f"{where}: has no reference answers")
        if split_of(question) == split:
            problems.setdefault(question, Problem(question, str(answer), domain=task))
        if len(problems) == n:
            break
    if not problems:
        raise InputError(f"{where}: too few distinct questions for a {split} split")
    return list(problems.values())


def read_rows(name, split="train"):
    """The rows, as dicts, of a local file, of the files of `split` in a local folder, or of a hub data set."""
    path = Path(name).expanduser()
    if path.exists():
        files = split_files(path, split) if path.is_dir() else [path]
        rows = [row for file in files for row in read_file(file)]
    elif name in BENCHMARKS or (name.count("/") == 1 and path.suffix not in SUFFIXES and name[0] not in "./~"):
        rows = read_hub(name, split)
    else:
        raise InputError(f"--dataset_name {name}: no such file or folder, nor one of chain, {', '.join(BENCHMARKS)}, "
                         "reasoning_gym:TASK or a hub name owner/name")
    if not rows:
        raise InputError(f"--dataset_name {name}: holds no rows")
    return rows


def read_hub(name, split):
    """The rows of a hub data set, or of a benchmark by its short name. Raises InputError where it cannot be had."""
    import datasets  # a second to import, so only where it is needed
    hub_name, _, configuration = name.partition(":")
    if name in BENCHMARKS:
        hub_name, configuration, splits = BENCHMARKS[name]
        if split not in splits:
            raise InputError(f"--dataset_train_split {split}: {name} has {', '.join(splits)}")
        split = splits[split]
    elif name == "openai/gsm8k":
        configuration = "main"
    try:
        return datasets.load_dataset(hub_name, configuration or None, split=split).to_list()
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such data set, split or configuration
        raise InputError(f"--dataset_name {name}, --dataset_train_split {split}: cannot be loaded from the hub "
                         f"({first_line(error)})") from error


def split_files(folder, split):
    """The files of one split: `train.jsonl`, `train-00000-of-00002.parquet`, in the folder or in its `data` folder."""
    files = sorted(file for pattern in ("*", "data/*") for file in folder.glob(pattern) if file.suffix in SUFFIXES)
    chosen = [file for file in files if file.stem == split or file.stem.startswith(f"{split}-")]
    if not chosen:
        raise InputError(f"--dataset_name {folder}: no file of split {split!r}; it holds "
                         f"{', '.join(file.name for file in files[:9]) or 'no data files'}")
    return chosen


def read_file(path):
    """The rows of one file. Raises InputError "path:line: ..." at the first that is not UTF-8 or not a JSON object."""
    import pyarrow.parquet
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: not one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[:error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    one_array = path.suffix == ".json" and text.lstrip().startswith("[")
    rows = []
    for number, record in enumerate([text] if one_array else text.split("\n"), 1):
        try:
            value = json.loads(record) if record.strip() else []
        except (ValueError, RecursionError) as error:
            line = number + getattr(error, "lineno", 1) - 1
            raise InputError(f"{path}:{line}: not valid JSON ({first_line(error)})") from error
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: a row must be a JSON object, not {type(row).__name__}")
            rows.append(row)
    return rows


def first_line(error):
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_column(rows, wanted, usual, flag, where):
    """The name of the wanted column, or of the first usual one there is; else InputError naming the flag."""
    columns = list(rows[0])
    for column in [wanted] if wanted else usual:
        if column in columns:
            return column
    what = f"no column {wanted!r}" if wanted else f"none of the columns {', '.join(usual)}"
    raise InputError(f"{flag}: {where} has {what}; it has {', '.join(map(str, columns))}")


def row_problem(row, prompt_column, answer_column, where):
    """One row as a Problem. Raises InputError where the prompt or an answer to check against is missing."""
    prompt, answer = row.get(prompt_column), row.get(answer_column)
    chat = isinstance(prompt, list) and prompt and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and turn.get("role") for turn in prompt)
    if not chat and not (isinstance(prompt, str) and prompt.strip()):
        raise InputError(f"{where}: column {prompt_column!r} holds neither text nor a list of chat messages")
    solution = row.get("solution")
    if isinstance(answer, str) and "####" in answer:  # GSM8K: the worked solution and the answer in one string
        solution = answer = re.sub(r"<<.*?>>", "", answer)  # the marks made for a calculator tool
    if isinstance(answer, str) and ("####" in answer or "\\boxed" in answer or answer_column == "solution"):
        answer = extract_answer(answer)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise InputError(f"{where}: column {answer_column!r} holds no answer to check against")
    domain = next((str(row[column]) for column in DOMAIN_COLUMNS if row.get(column)), "")
    level = re.search(r"\d+", str(row.get("level", "")))  # MATH writes "Level 3"
    return Problem(prompt, str(answer).strip(), solution if isinstance(solution, str) else None,
                   nested(row, "hints", where), domain, int(level.group()) if level else 0,
                   nested(row, "subgoals", where))


def nested(row, column, where):
    """A column of texts or lists of texts, as a tuple of texts or tuples; () where there is none. InputError."""
    value = row.get(column) or ()
    value = [value] if not isinstance(value, (list, tuple)) else value
    items = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    for item in items:
        if not all(isinstance(text, str) and text for text in (item if isinstance(item, tuple) else [item])):
            raise InputError(f"{where}: column {column!r} must be a list of texts, or of lists of texts")
        if column == "subgoals" and (isinstance(item, str) or len(item) != 2):
            raise InputError(f"{where}: column 'subgoals' must be a list of [prompt, answer]")
    return items


def filter_problems(problems, levels, domains):
    """The problems of these levels and domains; data that has no levels (or no domains) is not sorted by them."""
    levels = levels if any(problem.level for problem in problems) else []
    domains = domains if any(problem.domain for problem in problems) else []
    kept = [problem for problem in problems
            if (not levels or problem.level in levels) and (not domains or problem.domain in domains)]
    if not kept:
        raise InputError(f"--levels, --domains: nothing is left; the levels are {sorted({p.level for p in problems})}, "
                         f"the domains {sorted({p.domain for p in problems})[:20]}")
    return kept


def parse_levels(text):
    """
    >>> parse_levels("1-3,5")
    [1, 2, 3, 5]
    """
    levels = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f"--levels {text}: write them like 1-5 or 1,3,5")
        levels.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(levels)


def fill_template(template, prompt):
    """The template around a string prompt, or around the last message of a chat."""
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    *before, last = prompt if isinstance(prompt, list) and prompt else [None]
    if not isinstance(last, dict) or not isinstance(last.get("content"), str):
        return prompt  # neither: it is refused where it is read, by its row
    return [*before, {**last, "content": template.replace("{prompt}", last["content"])}]


# --- answers ---

# One path from text to verdict: rewards, evaluation and the choice of samples to train on all go through `verify`.
UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?|\.[0-9]+)"
FRAC = r"\\[dt]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
MARKER = re.compile(r"\\(?:boxed|fbox)\s*\{|####|<answer>")
CLOSING_HASH = re.compile(rf"#\s*([-+]?\$?{UNSIGNED}(?:/{UNSIGNED})?%?)\s*\Z")
BARE_NUMBER = re.compile(rf"-?{FRAC}|(?:(?<![\w.)\]}}])[-+−]\$?)?{UNSIGNED}(?:/{UNSIGNED})?(?:\\?%)?")
NUMBER = re.compile(rf"([-+]?) ?(?:([0-9]+) (?=[0-9]+/))?({UNSIGNED})(?:/({UNSIGNED}))?( ?%)?"
                    r"((?: [A-Za-z]{2,}){0,4})")  # sign, whole part of 1 1/2, number, denominator, percent, unit
# In "18 dollars" the word is a unit. These words change the value, or hedge.
NOT_UNITS = set("hundred thousand million billion trillion dozen pi squared cubed or and to".split())
DRESSING = [("−", "-"), ("–", "-"), ("\\%", "%"), (" percent", "%"), ("\\$", ""), ("$", ""), ("€", ""), ("£", ""),
            ("{,}", ","), ("\\!", ""), ("\\,", ""), ("\\;", " "), ("\\ ", " "), ("~", " "), ("\\left", ""),
            ("\\right", ""), ("^\\circ", ""), ("^{\\circ}", ""), ("°", ""), ("\\dfrac", "\\frac"),
            ("\\tfrac", "\\frac"), ("**", "")]
COSTLY = re.compile(r"\^\s*\{?\s*[0-9]+\s*\}?\s*\^|\^\s*\{?\s*-?[0-9]{4}|[0-9]{4}\s*\}?\s*!|!\s*!|binom.*[0-9]{4}")
MAX_ANSWER_LENGTH = 300  # characters; anything longer is compared as a string only


def extract_answer(text):
    r"""The final answer of a completion as written there, or None. Takes time linear in the length of the text.

    What stands before </think> does not count. The answer is the last of \boxed{...}, `#### ...`, <answer>...</answer>
    or a `#34` that ends the text; without any of them the last number. A box or tag that never closes gives None.

    >>> extract_answer("37+5=42;42-8=34#34"), extract_answer(r"so \boxed{\frac{1}{2}}, as 1+1=2"), extract_answer("hm")
    ('34', '\\frac{1}{2}', None)
    """
    if "think>" in text:
        text = text.rpartition("</think>")[2]
        if "<think>" in text:  # cut off while still thinking
            return None
    hash_at = text.rfind("#")
    if hash_at >= 0 and (closing := CLOSING_HASH.match(text, hash_at)):
        return closing[1]
    markers = list(MARKER.finditer(text))
    if not markers:
        numbers = [match[0] for match in BARE_NUMBER.finditer(text)]
        return numbers[-1] if numbers else None
    marker = markers[-1]
    if marker[0] == "####":
        answer = text[marker.end():].split("\n", 1)[0]
    elif marker[0] == "<answer>":
        answer, closed, _ = text[marker.end():].partition("</answer>")
        answer = answer if closed else ""
    else:
        answer = braced(text, marker.end())
    return answer.strip() or None


def braced(text, start):
    """What stands between the brace that opened just before `start` and its partner; "" where it has none."""
    depth = 1
    for brace in re.compile(r"\\?[{}]").finditer(text, start):
        if brace[0] in "{}":  # \{ and \} are printed braces, not groups
            depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start:brace.start()]
    return ""


def verify(text, answer):
    r"""Whether the final answer in `text` is `answer`: the one verdict for reward and evaluation.

    Numbers are compared exactly, as fractions ("0.5" is "1/2", not "0.49999"). A percent sign may be left out or read
    as hundredths ("75%" is 75 and 0.75); units and thousands separators are dropped. Equal strings are equal. What is
    left and looks like a formula goes to math-verify. Takes microseconds for numbers and never over 5 s; no text
    makes it raise.

    >>> verify("#### $1,000.00", "1000"), verify("<answer>2/4</answer>", "0.5"), verify(r"\boxed{3 or 4}", "4")
    (True, True, False)
    """
    found = extract_answer(text)
    if found is None or found == answer:
        return found is not None
    number, true_number = to_number(found), to_number(answer)
    if number and true_number:
        (value, percent), (true_value, true_percent) = number, true_number
        scale = 1 if percent == true_percent else 100 if percent else Fraction(1, 100)
        return value in (true_value, scale * true_value)
    key, true_key = answer_key(found), answer_key(answer)
    if key == true_key:
        return True
    # "3=4" would pass for 4, and an unworked sum for its value; without any operator there is nothing to compute.
    if max(len(key), len(true_key)) > MAX_ANSWER_LENGTH or COSTLY.search(key) or key.count("=") > true_key.count("="):
        return False
    looks_symbolic = re.search(r"[\\^√π]", key) if true_number else re.search(r"[^\w\s.]", key + true_key)
    return bool(looks_symbolic) and MATH_JUDGE.equal(answer, found)


def clean_answer(text):
    """The answer without what does not change its value: currency, spacing, \\left, \\text{...}, a final full stop."""
    for mark, plain in DRESSING:
        text = text.replace(mark, plain)
    if "\\" in text:
        text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
        text = re.sub(FRAC, lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    text = re.sub(r"^\s*[A-Za-z](?:\([a-z]\))?\s*=(?!=)", "", text)  # the "x =" of "x = 3"
    text = " ".join(text.split()).lstrip(" ,;:").rstrip(" .,;:")
    return text[1:-1].strip() if re.fullmatch(r"\([^(),]*\)", text) else text


@lru_cache(maxsize=1 << 16)
def to_number(text):
    """(value as a Fraction, whether it has a percent sign), or None for anything but one plain number.

    >>> to_number("-1,234.50"), to_number(r"1\\frac{1}{2}"), to_number("75%"), to_number("18 million"), to_number("1/0")
    ((Fraction(-2469, 2), False), (Fraction(3, 2), False), (Fraction(75, 1), True), None, None)
    """
    if len(text) > MAX_ANSWER_LENGTH:  # also keeps int() below its limit of 4,300 digits
        return None
    match = NUMBER.fullmatch(clean_answer(text))
    if not match or NOT_UNITS & set(match[6].lower().split()):
        return None
    denominator = Fraction(match[4].replace(",", "")) if match[4] else 1
    if not denominator:
        return None
    value = Fraction(match[3].replace(",", "")) / denominator + int(match[2] or 0)
    return -value if match[1] == "-" else value, bool(match[5])


def answer_key(text):
    """A string equal for answers written differently but surely the same: what answers vote with in maj@k."""
    number = to_number(text)
    if number:
        return str(number[0])
    key = re.sub(r"(?<![0-9]) | (?![0-9])", "", clean_answer(text))  # "1 1" is not 11
    return key.casefold() if key.isalpha() else key


class MathJudge:
    """math-verify in a process of its own that can be killed.

    Its own timeouts rest on SIGALRM: they fail outside the main thread, erase the caller's alarm, and do not end a long
    computation inside C. So they run in the child, and a child that does not answer in time is killed and replaced.
    """

    DEADLINE_S = 3
    PROGRAM = r"""
import json, resource, sys
from math_verify import LatexExtractionConfig, parse, verify
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
latex = [LatexExtractionConfig(boxed_match_priority=0)]
print("ready", flush=True)
for line in sys.stdin:
    try:
        gold, answer = (parse("\\boxed{" + side + "}", latex, parsing_timeout=1) for side in json.loads(line))
        print(int(verify(gold, answer, timeout_seconds=1)), flush=True)
    except Exception:
        print(0, flush=True)
"""

    def __init__(self):
        self.process, self.owner, self.lock = None, None, threading.Lock()  # owner: who started it; forks share nothing

    @lru_cache(maxsize=1 << 16)
    def equal(self, gold, answer):
        """Whether two LaTeX strings mean the same; False where that is not settled by the deadline."""
        with self.lock:
            if self.owner != os.getpid() or self.process.poll() is not None:
                self.start()
            reply = ""
            try:
                print(json.dumps([gold, answer]), file=self.process.stdin, flush=True)
                reply = self.reply(self.DEADLINE_S)
            except OSError:  # it has died
                pass
            finally:  # after an interrupt too: a late reply would be taken for the next question's
                if not reply:
                    self.process.kill()
                    self.process.wait()
            return reply == "1"

    def start(self):
        self.owner = None
        self.process = subprocess.Popen([sys.executable, "-P", "-c", self.PROGRAM], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.reply(60) != "ready":
            raise InputError("math-verify does not start: `pip install 'math-verify>=0.9'`")
        self.owner = os.getpid()

    def reply(self, seconds):
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline().strip() if ready else ""


MATH_JUDGE = MathJudge()


# --- model and prompts ---

TINY = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False)  # 0.62 M parameters


def char_tokenizer():
    """A tokenizer with one token per printable ASCII character, built in code: the embedded default needs no file."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def load_model(name_or_path, dtype=torch.float32, seed=0, chat_template="auto"):
    """The model and its tokenizer: `tiny` (random weights drawn from `seed`), a local folder, or a name on the hub.

    chat_template "off" forgets the tokenizer's. Every token that ends a turn is set to end generation, here and in
    whatever loads the saved model later. No code from a checkpoint is ever executed. Raises InputError where the
    model cannot be had, where its head is more than a matrix (a bias or a scale would make `linear_logps` wrong), or
    where it has no end-of-text token.
    """
    tokenizer = load_tokenizer(name_or_path, chat_template)
    if name_or_path == "tiny":
        config = Qwen3Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                             pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **TINY)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Qwen3ForCausalLM(config).to(dtype), tokenizer
    flag = f"--model_name_or_path {name_or_path}"
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{flag}: cannot be loaded ({first_line(error)})") from error
    for weight in model.parameters():  # in memory of its own: how a file's is aligned decides how products are rounded
        weight.data = weight.data.clone()
    check_head(model, flag)
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)
    return model, tokenizer


def load_tokenizer(name_or_path, chat_template="auto"):
    """The tokenizer that load_model returns, without the model."""
    if name_or_path == "tiny":
        return char_tokenizer()
    flag, folder = f"--model_name_or_path {name_or_path}", Path(name_or_path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{flag}: this folder holds no config.json, so it is not a model")
    if not folder.exists() and (name_or_path.count("/") != 1 or folder.parts[0] == "runs"):  # never a hub name: a run
        raise InputError(f"{flag}: no such folder" + "; `python sft.py` makes it" * (folder == Path("runs/sft")))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{flag}: cannot be loaded ({first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag}: its tokenizer has no end-of-text token")
    if chat_template == "off":
        tokenizer.chat_template = None
    return tokenizer


@torch.no_grad()
def check_head(model, flag):
    """Raises InputError unless the model's logits are (soft-capped) hidden states times the head's weight."""
    ids_1T = torch.arange(4)[None] + 5
    logits_1TV = model(input_ids=ids_1T, use_cache=False).logits.float()
    hidden_1TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state
    ours_1TV = (hidden_1TD @ model.get_output_embeddings().weight.T).float()
    cap = softcap(model)
    ours_1TV = ours_1TV if cap is None else cap * torch.tanh(ours_1TV / cap)
    if not torch.allclose(ours_1TV, logits_1TV, atol=1e-3, rtol=1e-2):
        raise InputError(f"{flag}: its output head is more than a matrix (a bias, a scale), which is not supported")


def softcap(model):
    """Gemma-2's cap on the final logits, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, ready to be continued: list of int.

    Messages go through the chat template with its generation prompt. A string is one user turn where the tokenizer
    has a chat template, and plain text elsewhere. At most one BOS stands in front; nothing is added at the end.
    """
    if isinstance(prompt, str) and tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        ids, bos = tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a").input_ids[0] == bos and ids[:1] != [bos]
        return [bos] * adds_bos + ids
    if not tokenizer.chat_template:
        raise InputError("the prompts are chat messages, and this model's tokenizer has no chat template")
    text = chat_text(tokenizer, prompt, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids  # the template has written BOS where it wants one


def chat_text(tokenizer, messages, add_generation_prompt=False):
    """What the chat template makes of messages: str. InputError where it refuses them (no system role, and such)."""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        shown = " ".join(f"{message['role']}: {message['content'][:40]!r}" for message in messages)
        raise InputError(f"the chat template refuses a conversation ({error}): {shown}") from error


def end_of_turn(tokenizer):
    """Id of the token that ends an assistant's turn: the first special token the template puts after its text."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]
        tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("bcd")[2]
        for token in tokenizer(tail, add_special_tokens=False).input_ids:
            if token in tokenizer.all_special_ids:
                return token
    return tokenizer.eos_token_id


def stop_ids(model, tokenizer):
    """Ids that end a completion: end of turn, end of text, and whatever the checkpoint's generation config names."""
    configured = getattr(model.generation_config, "eos_token_id", None) or []
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({end_of_turn(tokenizer), tokenizer.eos_token_id, *configured})


# --- sampler ---

@dataclass
class Rollouts:
    """Completions of `generate`, on the CPU; row r continues prompt r // n. Columns past its length mean nothing."""

    tokens_RT: torch.Tensor  # int64, the stop token included
    logps_RT: torch.Tensor  # float32, log-probs at the sampling temperature, before any top-p or top-k cut
    lengths_R: torch.Tensor  # int64, the stop token counted
    finished_R: torch.Tensor  # bool: ended by a stop token rather than by the limit

    def ids(self, row):
        """The completion's token ids, stop token included: list of int."""
        return self.tokens_RT[row, : self.lengths_R[row]].tolist()

    def texts(self, tokenizer):
        """The completions as text, without their stop tokens."""
        ids = [self.ids(row)[: -1 if finished else None] for row, finished in enumerate(self.finished_R.tolist())]
        return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class InPlaceLayer(DynamicLayer):
    """Keys and values of one layer, in spare room that grows by half; DynamicLayer copies all of them at each token."""

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.length, self.rooms = 0, [keys[:, :, :0], values[:, :, :0]]
        start, self.length = self.length, self.length + keys.shape[2]
        for i, new in enumerate((keys, values)):
            if self.length > self.rooms[i].shape[2]:  # the prompt gets no spare room: it is about to be repeated
                spare = max(32, self.length // 2) if start else 0
                room = new.new_empty(*new.shape[:2], self.length + spare, new.shape[3])
                room[:, :, :start] = self.rooms[i][:, :, :start]
                self.rooms[i] = room
            self.rooms[i][:, :, start : self.length] = new
        return self.show()

    def show(self):
        self.keys, self.values = (room[:, :, : self.length] for room in self.rooms)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats):
        self.rooms = [room.repeat_interleave(repeats, 0) for room in self.rooms]
        self.show()

    def batch_select_indices(self, indices):
        self.rooms = [room[indices] for room in self.rooms]
        self.show()


def draw_tokens(logits_BV, uniforms_B, temperature, top_p, top_k):
    """One token a row by inverse CDF, and its log-prob before any cut: (tokens_B, logps_B). Temperature 0 is greedy.

    One uniform number in [0, 1) per row decides, so a row's draw does not depend on the rows beside it.
    """
    logps_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens_B1 = logps_BV.argmax(-1, keepdim=True)
    else:
        probs_BV = logps_BV.exp()
        if top_p < 1 or 0 < top_k < probs_BV.shape[1]:
            sorted_BV, order_BV = probs_BV.sort(descending=True)
            sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= top_p] = 0  # the token that crosses top_p stays
            sorted_BV[:, top_k or len(sorted_BV[0]) :] = 0
            probs_BV = torch.zeros_like(probs_BV).scatter(1, order_BV, sorted_BV)
        cdf_BV = probs_BV.cumsum(-1, dtype=torch.float64)  # in float64 u * total < total: the index is in range
        tokens_B1 = torch.searchsorted(cdf_BV, uniforms_B[:, None] * cdf_BV[:, -1:], right=True)
    return tokens_B1[:, 0], logps_BV.gather(1, tokens_B1)[:, 0]


def decode_batch(model, prompts, n, uniforms_BT, stop, temperature, top_p, top_k, tick):
    """Continues prompt i n[i] times, all rows side by side: (tokens_BT, logps_BT, lengths_B, finished_B) on the CPU.

    A prompt is prefilled once and its cache repeated; rows that have ended are dropped from the batch.
    """
    device, (B, T) = model.device, uniforms_BT.shape
    pad = partial(pad_sequence, batch_first=True, padding_side="left")  # so that all rows go on at the same column
    ids_PW = pad([torch.tensor(prompt, dtype=torch.long) for prompt in prompts]).to(device)
    mask_PW = pad([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts]).to(device)
    padded = not mask_PW.all()  # without padding no mask is passed: attention takes its fastest path
    uniforms_BT = uniforms_BT.to(device)
    stop_K = torch.tensor(stop, device=device)
    tokens_BT = torch.zeros(B, T, dtype=torch.long, device=device)
    logps_BT = torch.zeros(B, T, device=device)
    live_L = torch.arange(B, device=device)  # the row that each line of the shrinking batch stands for
    done_L = torch.zeros(B, dtype=torch.bool, device=device)

    cache = DynamicCache(config=model.config)  # layers with a sliding window or a recurrent state stay transformers'
    cache.layers = [InPlaceLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    reads = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    places = {"attention_mask": mask_PW, "position_ids": (mask_PW.cumsum(1) - 1).clamp(0)} if padded else {}
    logits_LV = model(input_ids=ids_PW, use_cache=True, logits_to_keep=1, **{reads: cache}, **places).logits[:, -1]
    copies_P = torch.tensor(n, device=device)
    logits_LV = logits_LV.repeat_interleave(copies_P, 0)
    cache.batch_repeat_interleave(copies_P)
    mask_LC = mask_PW.repeat_interleave(copies_P, 0)
    for t in range(T):
        next_L, logps_BT[live_L, t] = draw_tokens(logits_LV, uniforms_BT[live_L, t], temperature, top_p, top_k)
        tokens_BT[live_L, t] = next_L
        done_L = done_L | torch.isin(next_L, stop_K)
        if t == T - 1:
            break
        if device.type == "cpu" or t % 16 == 15:  # to look at `done` is to wait for the GPU, so not at every token
            n_going = int((~done_L).sum())
            tick(n_going)
            if n_going == 0:
                break
            if n_going <= 0.9 * len(live_L):
                keep = (~done_L).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live_L, done_L, next_L, mask_LC = live_L[keep], done_L[keep], next_L[keep], mask_LC[keep]
        if padded:
            mask_LC = torch.cat([mask_LC, mask_LC.new_ones(len(mask_LC), 1)], 1)
            places = {"attention_mask": mask_LC, "position_ids": mask_LC.sum(1, keepdim=True) - 1}
        logits_LV = model(input_ids=next_L[:, None], use_cache=True, **{reads: cache}, **places).logits[:, -1]
    stopped_BT = torch.isin(tokens_BT, stop_K)
    finished_B = stopped_BT.any(1)
    lengths_B = torch.where(finished_B, stopped_BT.int().argmax(1) + 1, T)
    tick(0)
    return tokens_BT.cpu(), logps_BT.cpu(), lengths_B.cpu(), finished_B.cpu()


@torch.no_grad()
def generate(model, tokenizer, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, seed=0,
             batch_size=256, progress=False, keys=None):
    """Samples n completions of each prompt (lists of token ids): Rollouts, row i * n + j the j-th of prompt i.

    `n` may be a list, one number a prompt; a prompt's rows then follow those of the prompts before it. `seed` is an
    int or a list of ints. The random numbers of a row are a function of (seed, its prompt's key, j) alone; `keys`
    names the prompts where they are a part of a larger set (default 0, 1, ...). So what a row says does not depend on
    the rows beside it, on batch_size (rows decoded at once), or on the number of processes, but for rounding.
    temperature 0 is greedy; top_k 0 and top_p 1 cut nothing. The model is left in the mode it was in.
    """
    seed = seed if isinstance(seed, (list, tuple)) else [seed]
    keys = range(len(prompts)) if keys is None else keys
    stop, training = stop_ids(model, tokenizer), model.training
    model.eval()
    counts = n if isinstance(n, (list, tuple)) else [n] * len(prompts)
    first = np.cumsum([0, *counts]).tolist()
    rows = first[-1]
    out = Rollouts(torch.zeros(rows, max_new_tokens, dtype=torch.long), torch.zeros(rows, max_new_tokens),
                   torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool))
    jobs = [(i, range(start, min(start + batch_size, count))) for i, count in enumerate(counts)
            for start in range(0, count, batch_size)]  # (prompt, which of its completions)
    jobs.sort(key=lambda job: len(prompts[job[0]]))  # little padding
    bar = tqdm(total=rows, desc="generate", unit="row", disable=not progress, leave=False)
    tokens = 0
    while jobs:
        fits = sum(total <= batch_size for total in np.cumsum([len(copies) for _, copies in jobs]))
        part, jobs = jobs[:fits], jobs[fits:]
        rows_B = [first[i] + j for i, copies in part for j in copies]
        uniforms_BT = torch.from_numpy(np.stack([
            np.random.default_rng([*seed, keys[i], j]).random(max_new_tokens) for i, copies in part for j in copies]))
        before = bar.n
        batch = decode_batch(model, [prompts[i] for i, _ in part], [len(copies) for _, copies in part], uniforms_BT,
                             stop, temperature, top_p, top_k,
                             lambda going: bar.update(before + len(rows_B) - going - bar.n))
        out.tokens_RT[rows_B], out.logps_RT[rows_B], out.lengths_R[rows_B], out.finished_R[rows_B] = batch
        tokens += int(batch[2].sum())
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
    bar.close()
    model.train(training)
    return out


# --- evaluation and statistics ---

def evaluate(model, tokenizer, problems, *, n=1, k=(1,), max_new_tokens=256, temperature=1.0, top_p=1.0, seed=0,
             batch_size=256, progress=False):
    """Samples n completions a problem (temperature 0: greedy) and judges them with `verify`.

    Returns a dict: `accuracy` (the mean over all samples), `pass@k`, `maj@k` and, for each, `.../low` and `.../high` of
    its 95 % interval clustered by question; `parse_fail`, `truncated` (shares of samples), `mean_length` (tokens, the
    stop token counted); `by_level`, `by_domain`: {value: {accuracy, low, high, n_problems}}; `scores` (accuracy of each
    problem, for `paired_comparison`); `records` (one dict a sample). A question asked twice is evaluated once.
    """
    problems = list({json.dumps(problem.prompt): problem for problem in problems}.values())
    if not problems or n < 1 or not all(1 <= size <= n for size in k):
        raise InputError(f"--k {','.join(map(str, k))}: needs problems, n >= 1 and each k in 1..n, not n={n}, "
                         f"{len(problems)} problems")
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    rollouts = generate(model, tokenizer, prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                        top_p=top_p, seed=seed, batch_size=batch_size, progress=progress)
    lengths, finished = rollouts.lengths_R.tolist(), rollouts.finished_R.tolist()
    records = []
    for row, text in enumerate(rollouts.texts(tokenizer)):
        problem = problems[row // n]
        records.append({"problem": row // n, "sample": row % n, "prompt": problem.prompt, "answer": problem.answer,
                        "level": problem.level, "domain": problem.domain, "completion": text,
                        "extracted": extract_answer(text), "correct": verify(text, problem.answer),
                        "length": lengths[row], "truncated": not finished[row]})
    return {"n_problems": len(problems), "n": n, "temperature": temperature, "top_p": top_p, "seed": seed,
            "max_new_tokens": max_new_tokens, **summarize(records, n, k, seed), "records": records}


def summarize(records, n, k, seed=0):
    """The numbers `evaluate` returns, from its records: n in a row for each problem."""
    questions = [records[i : i + n] for i in range(0, len(records), n)]
    verdicts = [[record["correct"] for record in question] for question in questions]
    keys = [[record["extracted"] and answer_key(record["extracted"]) for record in question] for question in questions]
    scores_Q = [sum(correct) / n for correct in verdicts]
    metrics = {"accuracy": scores_Q}
    for size in k:
        metrics[f"pass@{size}"] = [pass_at_k(n, sum(correct), size) for correct in verdicts]
        if size > 2:  # with one or two votes the majority is a single random vote
            metrics[f"maj@{size}"] = [majority_at_k(*votes, size, seed) for votes in zip(keys, verdicts)]
    summary = {}
    for name, values_Q in metrics.items():
        low, high = mean_interval(values_Q, seed)
        summary |= {name: sum(values_Q) / len(values_Q), f"{name}/low": low, f"{name}/high": high}
    summary["parse_fail"] = sum(record["extracted"] is None for record in records) / len(records)
    summary["truncated"] = sum(record["truncated"] for record in records) / len(records)
    summary["mean_length"] = sum(record["length"] for record in records) / len(records)
    for kind in ("level", "domain"):
        groups = defaultdict(list)
        for question, score in zip(questions, scores_Q):
            groups[question[0][kind]].append(score)
        summary[f"by_{kind}"] = {}
        for value, scores in sorted(groups.items()):
            low, high = mean_interval(scores, seed)
            summary[f"by_{kind}"][value] = {"accuracy": sum(scores) / len(scores), "low": low, "high": high,
                                            "n_problems": len(scores)}
    return {**summary, "scores": scores_Q}


def pass_at_k(n, c, k):
    """Chance that k samples drawn without replacement from n, of which c are right, hold a right one.

    The unbiased estimate; drawing with replacement is not (0.725 for a true 0.778 at n = k = 8).
    Source: Chen et al. 2021, eq. 1.

    >>> pass_at_k(n=4, c=1, k=2)
    0.5
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(keys, correct, k, seed=0, n_subsets=100):
    """Chance that the most frequent answer among k of the n samples is right, over random subsets of size k.

    `keys`: what each sample votes for, None for an unparsed one, which does not vote. `correct`: its verdict.
    A tie counts with the mean of the tied answers, which is what breaking it at random gives on average.

    >>> majority_at_k(["7", "7", "3", None], [True, True, False, False], k=4)
    1.0
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"maj@k needs 1 <= k <= n, not n={len(keys)}, k={k}")
    rng = random.Random(seed)
    verdict = dict(zip(keys, correct))
    total, n_subsets = 0.0, n_subsets if k < len(keys) else 1
    for _ in range(n_subsets):
        votes = Counter(key for key in rng.sample(keys, k) if key is not None)
        leaders = [key for key, count in votes.items() if count == max(votes.values())]
        total += sum(verdict[key] for key in leaders) / max(len(leaders), 1)
    return total / n_subsets


def mean_interval(scores_Q, seed=0):
    """95 % interval (low, high) for the mean of one score in 0..1 per question.

    Wilson for verdicts, which holds for few questions and near 0 and 1 too; the bootstrap for means and pass@k.
    """
    n = len(scores_Q)
    if set(scores_Q) <= {0, 1}:
        return wilson_interval(sum(scores_Q), n)
    return bootstrap_interval(scores_Q, seed) if n > 1 else (0.0, 1.0)


def wilson_interval(c, n, z=1.96):
    """95 % interval (low, high) for a share of which c of n trials are seen. Source: Wilson 1927.

    >>> [round(x, 3) for x in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    centre, spread = c + z * z / 2, z * math.sqrt(c * (n - c) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def bootstrap_interval(values_Q, seed=0, n_resamples=10_000):
    """95 % percentile interval (low, high) of the mean, questions drawn with replacement: they are the unit."""
    values_Q = np.asarray(values_Q, dtype=np.float64)
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(values_Q))
    means = [values_Q[rng.integers(len(values_Q), size=(min(chunk, n_resamples - start), len(values_Q)))].mean(axis=1)
             for start in range(0, n_resamples, chunk)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def paired_comparison(scores_a_Q, scores_b_Q, seed=0):
    """How much better b is than a on the same questions: mean difference b - a, its 95 % interval, discordant counts.

    Needs several times fewer questions than comparing two accuracies. For verdicts with the p-value of McNemar's exact
    test (a fair coin for each question that only one of them solves) and an adjusted Wald interval, which holds for few
    discordant questions too (source: Bonett & Price 2012); otherwise the bootstrap, or the rule of three where no
    question differs.

    >>> paired_comparison([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1])["mcnemar_p"]
    0.0625
    """
    if len(scores_a_Q) != len(scores_b_Q) or not scores_a_Q:
        raise ValueError(f"a paired comparison needs the same questions, not {len(scores_a_Q)} and {len(scores_b_Q)}")
    differences_Q = [b - a for a, b in zip(scores_a_Q, scores_b_Q)]
    n, better, worse = len(differences_Q), sum(d > 0 for d in differences_Q), sum(d < 0 for d in differences_Q)
    p = None
    if set(scores_a_Q) | set(scores_b_Q) <= {0, 1}:
        tail = sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1))
        p = min(1.0, 2 * tail / 2 ** (better + worse))
        up, down = (better + 1) / (n + 2), (worse + 1) / (n + 2)
        spread = 1.96 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
        low, high = max(-1.0, up - down - spread), min(1.0, up - down + spread)
    elif better + worse == 0:
        high = min(1.0, 3 / n)  # 95 % limit for the rate of what never happened in n trials
        low = -high
    else:
        low, high = bootstrap_interval(differences_Q, seed)
    return {"n_problems": n, "difference": sum(differences_Q) / n, "low": low, "high": high,
            "n_better": better, "n_worse": worse, "mcnemar_p": p}


# --- plots ---

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito, for all eyes
KEY_FIGURES = (  # what curves.png shows: the first nine of these that a run has and that move
    "eval/accuracy", "eval/nll", "reward", "nll", "loss", "rewards/understanding/mean", "rewards/implausibility/mean",
    "divergence", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logps/chosen_fell",
    "max_violation", "mutual_information", "entropy", "scaffold/solved", "completions/mean_length", "kl",
    "frac_reward_zero_std", "clip_ratio", "dco/factor", "grad_norm", "learning_rate")


def plot_runs(run_dirs, path):
    """Draws the runs' key figures against the step, one panel a name, the runs overlaid, into the PNG `path`.

    All other numbers of their metrics.jsonl that move go to a second PNG, NAME_all.png. Faint: the values; strong:
    their running mean over a twentieth of the run; bars: 95 % intervals. Raises InputError where there is no number.
    """
    runs = [(label, read_metrics(run_dir)) for label, run_dir in zip(short_names(run_dirs), run_dirs)]
    names = {name for _, curves in runs for name in curves if not name.endswith(("/low", "/high"))}
    moving = {name for name in names
              if len({value for _, curves in runs for value in curves.get(name, {}).values()}) > 1}
    key = [name for name in KEY_FIGURES if name in moving][:9] or sorted(names)
    draw_panels(runs, key, path)
    if rest := sorted(moving - set(key)):
        draw_panels(runs, rest, Path(path).with_stem(f"{Path(path).stem}_all"))


def draw_panels(runs, names, path):
    """One panel for each of these names, of runs given as (label, what read_metrics returns)."""
    n_columns = 4 if len(names) > 9 else 3
    figure, axes = new_figure(len(names), n_columns)
    for axis, name in zip(axes, names):
        for i, (label, curves) in enumerate(runs):
            curve = curves.get(name, {})
            steps, values = np.array(sorted(curve.items()), dtype=float).reshape(-1, 2).T
            color, width = COLORS[i % len(COLORS)], len(steps) // 40  # on each side
            if width > 1:
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                values = running_mean(values, width)
            axis.plot(steps, values, color=color, linewidth=1.6, marker="o" if len(steps) < 20 else "", markersize=4,
                      label=label)
            low, high = (curves.get(f"{name}/{end}", {}) for end in ("low", "high"))
            known = sorted(curve.keys() & low.keys() & high.keys())
            axis.vlines(known, [low[step] for step in known], [high[step] for step in known], color=color, alpha=0.5)
            if known:
                axis.set_ylim(-0.02, 1.02)  # of shares; a narrower one would make much of little
        axis.set_title(name, loc="left", fontsize=10)
        axis.margins(x=0.02)
    for axis in axes[-n_columns:]:
        axis.set_xlabel("step")
    add_legend(figure, axes[0], n_columns=3)
    save_figure(figure, path)


def read_metrics(run_dir):
    """{name: {step: value}} of the numbers in a run's metrics.jsonl; of a step written twice the later line counts."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"--plot {run_dir}: holds no metrics.jsonl")
    curves = defaultdict(dict)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "{}")
        except ValueError as error:
            if number == len(lines):  # a run that is being written, or was killed while writing
                break
            raise InputError(f"{path}:{number}: not valid JSON ({error})") from error
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and "step" in row:
                curves[name][row["step"]] = value
    if not curves:
        raise InputError(f"{path}: no line with a step and a number")
    return curves


def running_mean(values_N, width):
    """Centred mean over 2 * width + 1 neighbours, fewer at the ends; NaN counts as missing."""
    known_N, window = np.isfinite(values_N), np.ones(2 * width + 1)
    sums_N = np.convolve(np.where(known_N, values_N, 0.0), window, mode="same")
    counts_N = np.convolve(known_N, window, mode="same")
    return np.where(counts_N > 0, sums_N / np.maximum(counts_N, 1), np.nan)


def short_names(paths):
    """A label for each path: its last part, or the whole path where two end alike."""
    last = [Path(path).name or str(path) for path in paths]
    return [str(path) if last.count(name) > 1 else name for path, name in zip(paths, last)]


def plot_evaluations(names, evaluations, path):
    """Accuracy by level (or by domain) and pass@k of several checkpoints, with 95 % intervals, as a PNG.

    `evaluations`: for each name a dict with the results of `evaluate` under "sampled", "greedy" or both.
    """
    main = [runs.get("sampled") or runs["greedy"] for runs in evaluations]
    kind = "by_level" if len(main[0]["by_level"]) > 1 else "by_domain"
    groups = list(main[0][kind])
    ks = sorted(int(key[5:]) for key in main[0] if re.fullmatch(r"pass@\d+", key))
    figure, axes = new_figure(2 if len(ks) > 1 else 1, n_columns=2)
    for i, (name, runs, result) in enumerate(zip(names, evaluations, main)):
        color, x = COLORS[i % len(COLORS)], np.arange(len(groups)) + 0.12 * (i - (len(main) - 1) / 2)
        accuracy, low, high = (np.array([100 * result[kind][group][key] for group in groups])
                               for key in ("accuracy", "low", "high"))
        how = f"mean of {result['n']} at T = {result['temperature']:g}" if "sampled" in runs else "greedy"
        axes[0].errorbar(x, accuracy, np.maximum([accuracy - low, high - accuracy], 0), color=color, marker="o",
                         markersize=5, linewidth=1.4, elinewidth=1, capsize=2.5, label=f"{name}, {how}")
        if len(runs) > 1:
            axes[0].plot(x, [100 * runs["greedy"][kind][group]["accuracy"] for group in groups], color=color,
                         marker="D", markersize=5, markerfacecolor="white", linestyle="", label=f"{name}, greedy")
        if len(ks) > 1:
            axes[1].fill_between(ks, *([100 * result[f"pass@{k}/{end}"] for k in ks] for end in ("low", "high")),
                                 color=color, alpha=0.15, linewidth=0)
            axes[1].plot(ks, [100 * result[f"pass@{k}"] for k in ks], color=color, marker="o", markersize=5)
    axes[0].set_xticks(range(len(groups)), [str(group) or "all" for group in groups])
    axes[0].set_xlabel(kind[3:])
    axes[0].set_title("accuracy, %", loc="left", fontsize=10)
    if len(ks) > 1:
        axes[1].set_xscale("log", base=2)
        axes[1].set_xticks(ks, map(str, ks))
        axes[1].set_xlabel("k samples")
        axes[1].set_title("pass@k, %: one of k samples is right", loc="left", fontsize=10)
    for axis in axes:
        axis.set_ylim(-2, 102)
    add_legend(figure, axes[0], n_columns=2)
    save_figure(figure, path)


def new_figure(n_panels, n_columns):
    """(figure, flat list of axes). No pyplot: nothing global, and no display is ever looked for."""
    from matplotlib.figure import Figure
    n_columns = min(n_columns, n_panels)
    n_rows = math.ceil(n_panels / n_columns)
    figure = Figure(figsize=(4.4 * n_columns, 0.5 + 3.1 * n_rows), layout="constrained")
    axes = [figure.add_subplot(n_rows, n_columns, i + 1) for i in range(n_panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def add_legend(figure, axis, n_columns):
    """One legend above all panels, in the order of drawing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(n_columns, len(labels)), frameon=False)


def save_figure(figure, path):
    """Writes the figure as a PNG, its folder made where needed; replaces an older one only when it is whole."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.tmp", dpi=150, format="png")
    os.replace(f"{path}.tmp", path)


# --- flags ---

def flag(default, help, choices=None, low=None, high=None, free=False):
    """One command-line flag: its default, what it means, and what it may be.

    choices: the allowed values, or a function that returns them, for a dict that stands further down. low and high are
    allowed themselves; a list's elements are each held to them. free: it may change when a run is continued.
    """
    about = {"help": help, "choices": choices, "low": low, "high": high, "free": free}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


def check_flags(config):
    """Raises InputError for a flag that is none of its choices, not finite, or out of its range."""
    for about in fields(config):
        value, choices = getattr(config, about.name), about.metadata["choices"]
        low, high = about.metadata["low"], about.metadata["high"]
        for item in value if isinstance(value, list) else [value]:
            named = f"--{about.name} {item}"
            if choices and item not in (allowed := choices() if callable(choices) else choices):
                raise InputError(f"{named}: must be one of {', '.join(allowed)}")
            if isinstance(item, float) and not math.isfinite(item):
                raise InputError(f"{named}: must be a finite number")
            if high is not None and not low <= item <= high:
                raise InputError(f"{named}: must be between {low} and {high}")
            if low is not None and item < low:
                raise InputError(f"{named}: must be {low} or more")


@dataclass
class RunFlags:
    """The flags of every training script; a script's Config redeclares those whose default differs, and adds its own.

    SECTIONS, {the first flag of a section: its title}, is the order in which --help shows the sections.
    """

    SECTIONS = {"model_name_or_path": "model", "output_dir": "the run's folder",
                "per_device_train_batch_size": "optimizer and memory", "logging_steps": "logs, evaluation, checkpoints"}

    model_name_or_path: str = flag("runs/sft", "a hub name or a local folder; by default what sft.py left")
    chat_template: str = flag("auto", "auto: the tokenizer's, where it has one; off: prompts are plain text",
                              choices=("auto", "off"))
    prompt_template: str = flag("{prompt}", "text around each prompt (of a chat: its last message), with {prompt} "
                                            "where it goes")
    output_dir: str = flag("runs/", "the run's folder: model, args.json, metrics.jsonl, curves.png, checkpoints/",
                           free=True)
    overwrite: bool = flag(False, "delete an earlier run in output_dir and start over", free=True)
    per_device_train_batch_size: int = flag(64, "rows per process; at most so many in one forward", low=1, free=True)
    gradient_accumulation_steps: int = flag(1, "a step holds per_device_train_batch_size x this x processes rows",
                                            low=1, free=True)
    micro_batch_tokens: int = flag(1024, "padded tokens in one forward at most; 0: no limit; memory and speed only",
                                   low=0, free=True)
    max_steps: int = flag(80, "optimizer steps", low=1)
    learning_rate: float = flag(0.0, "peak learning rate; 0: by the size of the model", low=0)
    lr_scheduler_type: str = flag("constant", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: float = flag(0.0, "steps of linear warm-up; below 1: this share of all steps", low=0)
    weight_decay: float = flag(0.0, "AdamW's decay, on matrices only", low=0)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm here; 0: never", low=0)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward: less memory, a third slower",
                                        free=True)
    bf16: bool = flag(torch.cuda.is_available(), "bfloat16 products with float32 weights; by default on a GPU")
    ddp_timeout: int = flag(1800, "seconds a process waits for the others before the run fails", low=1, free=True)
    logging_steps: int = flag(5, "print a line every so many steps; metrics.jsonl has every step", low=1, free=True)
    eval_steps: int = flag(40, "evaluate (greedy) every so many steps and at the end; 0: never", low=0)
    eval_on_start: bool = flag(True, "evaluate before the first step, too")
    n_eval: int = flag(128, "problems to evaluate on", low=1)
    max_completion_length: int = flag(128, "tokens sampled at most per completion, in training and evaluation", low=1)
    save_steps: int = flag(20, "checkpoint every so many steps; 0: only when stopped and at the end", low=0, free=True)
    max_bad_steps: int = flag(3, "give up after so many steps in a row with a loss or gradient that is not finite",
                              low=1, free=True)
    seed: int = flag(0, "of weights, data, order and sampling", low=0)
    report_to: str = flag("none", "where else to log", choices=("none", "wandb"), free=True)

    def __post_init__(self):
        check_flags(self)
        if "{prompt}" not in self.prompt_template:
            raise InputError(f"--prompt_template {self.prompt_template}: must contain {{prompt}}")
        if self.report_to == "wandb" and find_spec("wandb") is None:
            raise InputError("--report_to wandb: needs `pip install wandb`")


@dataclass
class ProblemFlags:
    """The flags of every script that trains on problems or on data made of them: all but moe.py."""

    SECTIONS = {"dataset_name": "data"}

    dataset_name: str = flag("chain", "a problem set (see eval.py), a local file, or a hub data set")
    dataset_train_split: str = flag("train", "split to train on")
    dataset_test_split: str = flag("validation", "split to evaluate on")
    eval_dataset_name: str = flag("", "problems to evaluate on; empty: dataset_name where that is a named problem set")
    n_train: int = flag(20000, "problems to train on, of texts the first so many; 0: all (`chain`: 10,000)", low=0)
    prompt_column: str = flag("", "column that holds the prompt; empty: found by its usual names")
    answer_column: str = flag("", "column that holds the answer or solution; empty: found by its usual names")
    levels: str = flag("", "levels to keep, such as 1-3 or 1,4, where the data has them; empty: all (`chain`: 1-5)")
    domains: str = flag("", "kinds of problems to keep, such as add,mul, where the data has them; empty: all")


class Layout(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """--help with the docstring as it is written, and every default."""


def parse_flags(Config, usage, about, arguments=None):
    """The command line as (Config, words that belong to no flag); InputError for no flag or an unusable value.

    --flag-name is taken for --flag_name; a switch is set by --flag or --flag True, unset by --no_flag or --flag False.
    """
    parser = ArgumentParser(usage=usage, description=about, allow_abbrev=False, formatter_class=Layout)

    def fail(message):  # argparse would print the whole usage
        raise InputError(message.removeprefix("argument "))

    parser.error = fail
    groups, title = {title: parser.add_argument_group(title) for title in Config.SECTIONS.values()}, ""
    for item in fields(Config):
        title = Config.SECTIONS.get(item.name, title)
        kind = (get_args(item.type) or [item.type])[0]
        more = {"nargs": "*"} if get_args(item.type) else {}
        if kind is bool:
            kind, more = string_to_bool, {"nargs": "?", "const": True}
            parser.add_argument(f"--no_{item.name}", dest=item.name, action="store_false", default=SUPPRESS,
                                help=SUPPRESS)
        default = item.default if item.default is not MISSING else item.default_factory()
        choices, said = item.metadata["choices"] or (), item.metadata["help"]
        choices = choices() if callable(choices) else choices
        if not all(choice in said for choice in choices):
            said += f": {', '.join(choices)}"
        groups[title].add_argument(f"--{item.name}", type=kind, default=default, help=said,
                           metavar="bool" if kind is string_to_bool else kind.__name__, **more)
    spelled = [re.sub(r"^--[\w-]+(?==|$)", lambda found: "--" + found[0][2:].replace("-", "_"), word)
               for word in (sys.argv[1:] if arguments is None else arguments)]
    found, words = parser.parse_known_args(spelled)
    for word in words:
        if word.startswith("-"):
            near = difflib.get_close_matches(word.lstrip("-").partition("=")[0], vars(found), n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists them"
            raise InputError(f"{word}: no such flag ({hint})")
    return Config(**vars(found)), words


# --- a training run: what every script shares ---

class RunError(Exception):
    """The run cannot go on: one line that says why; scripts exit with code 1, and the last checkpoint is whole."""


def launch(main, Config, words=""):
    """Runs a script. Exit codes: 2 for wrong input, 1 for a run that cannot go on, 128 + signal where stopped.

    words: what a script takes beside its flags, which main then gets as a list after the config.
    """
    code, said, usage = 0, "", f"%(prog)s {words and f'{words} [{words} ...] '}[--flag value ...]"
    try:
        config, found = parse_flags(Config, usage, sys.modules["__main__"].__doc__)
        if found and not words:
            raise InputError(f"{found[0]}: is no flag (--help lists them)")
        main(config, *[found] if words else [])
    except InputError as error:
        code, said = 2, error
    except (RunError, OSError, SafetensorError) as error:
        code, said = 1, error
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        code, said = 130, "interrupted"
    if code:
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
    elif dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def stop_signals():
    """A list to which SIGTERM and Ctrl-C add their numbers from now on, so that a run can save before it ends."""
    caught = []

    def catch(number, frame):
        if not caught:
            print(f"signal {number}: stopping after this step", file=sys.stderr)
        caught.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def leave(run, state, stop):
    """Ends a run that a signal has stopped and that is saved: exit code 128 + the signal's number."""
    print(f"{run}: stopped and saved after step {state['step']}; the same command continues from there", flush=True)
    sys.exit(128 + (stop or [signal.SIGTERM])[0])  # another process may have caught it


def write_json(path, value):
    """Writes a JSON file so that a reader finds the old one or the new one, never a half."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def describe_run(config, data, world):
    """What args.json says of a run: its script or fork, every flag, and all else one needs to repeat it."""
    script = Path(inspect.getfile(type(config)))
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=script.parent, capture_output=True, text=True)
    return {"format": 2, "script": script.stem, "flags": asdict(config), "processes": world.size,
            "rows_per_step": config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size,
            "data_sha256": hashlib.sha256(repr(data).encode()).hexdigest(), "git_commit": git.stdout.strip() or None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "run_id": os.urandom(6).hex(), "finished": False}


def open_run(config, data, world):
    """Looks at --output_dir before any long work: (what args.json says of the run, the checkpoint to go on from).

    An unfinished run of the same script, flags and data is continued; of a finished one, "finished" is true. A new run
    has no checkpoint. Raises InputError for whatever else is found in the folder.
    """
    run, args = Path(config.output_dir), describe_run(config, data, world)
    for name, value in args["flags"].items():  # a model or data in the folder that is written to, or deleted
        if name != "output_dir" and isinstance(value, str) and value and os.path.exists(value):
            given = Path(value).resolve()
            if run.resolve() in (given, *given.parents):
                raise InputError(f"--output_dir {run}: --{name} {value} is in it")
    if not run.exists() or (run.is_dir() and {path.name for path in run.iterdir()} <= {"args.json.tmp"}):  # a kill
        return args, None
    if not (run / "args.json").is_file():
        raise InputError(f"--output_dir {run}: in use, and not by a run of these scripts (it has no args.json)")
    if config.overwrite:
        return args, None
    try:
        before = json.loads((run / "args.json").read_text())
    except ValueError as error:
        raise InputError(f"--output_dir {run}: its args.json is damaged; --overwrite starts over") from error
    if not isinstance(before, dict) or before.get("format") != args["format"]:
        raise InputError(f"--output_dir {run}: holds a run of another version of these scripts, or half a run; "
                         "--overwrite deletes it")
    rows = "per_device_train_batch_size x gradient_accumulation_steps x processes ="
    for name, known_as in (("script", "script"), ("rows_per_step", rows)):
        if before[name] != args[name]:
            raise InputError(f"--output_dir {run}: holds a run with {known_as} {before[name]}, not {args[name]}; "
                             "--overwrite deletes it")
    for about in fields(config):
        value, other = args["flags"][about.name], before["flags"].get(about.name)
        if value != other and not about.metadata["free"]:
            raise InputError(f"--{about.name} {value}: the run in --output_dir {run} has {other}; "
                             "--overwrite deletes it")
    if before["data_sha256"] != args["data_sha256"]:
        name = "dataset_name" if "dataset_name" in args["flags"] else "domains"
        raise InputError(f"--{name} {args['flags'][name]}: not the data this run began with; --overwrite starts over")
    if before["finished"]:
        print(f"{run}: finished already; --overwrite starts over", flush=True)
    return before, None if before["finished"] else newest_checkpoint(run)


def file_sizes(checkpoint):
    """The files of a checkpoint and their sizes in bytes, but for state.json, which holds this."""
    return {str(path.relative_to(checkpoint)): path.stat().st_size
            for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != "state.json"}


def is_whole(checkpoint):
    """Are all files of a checkpoint there, in full?"""
    try:
        sizes = json.loads((checkpoint / "state.json").read_text())["sizes"]
        return sizes.items() <= file_sizes(checkpoint).items()  # more may have been put there
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoints_of(run):
    """The folders of a run's checkpoints, newest first."""
    return sorted(run.glob("checkpoints/step_*[0-9]"), key=lambda path: int(path.name[5:]), reverse=True)


def newest_checkpoint(run):
    """The newest whole checkpoint of a run, None where it has none at all; a damaged one is named and passed over."""
    for checkpoint in checkpoints_of(run):
        if is_whole(checkpoint):
            return checkpoint
        print(f"{checkpoint}: damaged; falling back to the checkpoint before it", file=sys.stderr)
    if checkpoints_of(run):
        raise InputError(f"--output_dir {run}: none of its checkpoints is whole; --overwrite starts over")
    return None


def keep_checkpoint(aside, state):
    """Makes the folder `aside` the checkpoint of state["step"], whole or not at all; keeps the newest two whole ones.

    The files are synced to the disk before the folder gets its name, so that a power cut finds none that is half there.
    """
    final, run = aside.with_name(f"step_{state['step']}"), aside.parents[1]
    write_json(aside / "state.json", {**state, "sizes": file_sizes(aside)})
    for path in [*aside.rglob("*"), aside]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one
    os.rename(aside, final)
    kept = [path for path in checkpoints_of(run) if int(path.name[5:]) <= state["step"] and is_whole(path)][:2]
    for path in checkpoints_of(run):
        if path not in kept:
            shutil.rmtree(path)


def publish(run):
    """Moves the model in run/export.tmp to the run's folder and draws curves.png; the run is finished."""
    for path in (run / "export.tmp").iterdir():
        os.replace(path, run / path.name)
    (run / "export.tmp").rmdir()
    plot_runs([run], run / "curves.png")
    write_json(run / "args.json", {**json.loads((run / "args.json").read_text()), "finished": True})
    print(f"{run}: the model, args.json, metrics.jsonl, curves.png", flush=True)


class Log:
    """What a run writes as it goes: metrics.jsonl and its companions, lines on the screen, wandb where asked for.

    Made when all that was given has been found usable: it begins the folder, or with --overwrite deletes what is in
    it, or cuts the files of a continued run back to its checkpoint, so that they end up as if it had never stopped.
    Only the first process writes.
    """

    def __init__(self, args, resume, model, config, world):
        self.run, self.config, self.active, self.wandb = Path(config.output_dir), config, world.rank == 0, None
        self.steps_done, self.first_ended = 0, None
        if not self.active:
            return
        if not resume:
            self.begin({**args, "parameters": model.num_parameters(), "learning_rate": config.learning_rate})
        self.cut(json.loads((resume / "state.json").read_text())["step"] if resume else -1)
        versions = ", ".join(f"{name} {version}" for name, version in args["versions"].items())
        print(f"{self.run}: {f'continues from {resume}' if resume else 'a new run'} on {world.size} x {world.device}, "
              f"{model.num_parameters() / 1e6:.3g} M parameters, learning rate {config.learning_rate:g}, {versions}",
              flush=True)
        if config.report_to == "wandb":
            import wandb
            about = {name: args[name] for name in ("script", "rows_per_step", "processes", "versions", "git_commit")}
            self.wandb = wandb.init(project="post-training", name=self.run.name, dir=self.run, id=args["run_id"],
                                    config=about | asdict(config), resume="allow", reinit="finish_previous")

    def begin(self, args):
        """Makes the folder with args.json in it; with --overwrite, all else goes first."""
        self.run.mkdir(parents=True, exist_ok=True)
        if self.config.overwrite:
            write_json(self.run / "args.json", {})  # a half deleted run is nobody's: only --overwrite accepts it
            for path in self.run.iterdir():
                if path.name != "args.json":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_json(self.run / "args.json", args)

    def cut(self, step):
        """Drops what the run's files say of later steps."""
        for name in ("metrics", "samples", "pairs", "bad_steps"):
            path = self.run / f"{name}.jsonl"
            if not path.exists():
                continue
            lines = path.read_text().splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # a kill has cut it short
                lines.pop()
            path.with_suffix(".tmp").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
            os.replace(path.with_suffix(".tmp"), path)

    def add(self, name, value):
        """Adds a line to a file of the run: metrics, samples, pairs or bad_steps."""
        if self.active:
            with open(self.run / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(value) + "\n")

    def count(self, state, taken, rows):
        """Counts a step in `state`; one not taken is written down with its rows. RunError after --max_bad_steps."""
        state.update(step=state["step"] + 1, bad_steps=0 if taken else state["bad_steps"] + 1)
        if taken:
            return
        self.add("bad_steps", {"step": state["step"], "rows": rows})
        if self.active:
            print(f"step {state['step']}: loss or gradient not finite; no weight was changed; its rows are in "
                  f"{self.run / 'bad_steps.jsonl'}", file=sys.stderr)
        if state["bad_steps"] >= self.config.max_bad_steps:
            raise RunError(f"{state['bad_steps']} steps in a row had a loss or gradient that is not finite "
                           "(--max_bad_steps); the weights are those of the last good step")

    def step(self, step, numbers, show, tokens=0, seconds=0.0):
        """Writes one step's numbers; prints those named in `show` every --logging_steps, at the first step and at each
        evaluation. Keys under time/ are not repeatable from run to run, all others are. Step 0 is an evaluation."""
        if not self.active:
            return
        line, speed, now = {"step": step, **numbers}, "", time.perf_counter()
        if seconds:
            memory = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
            line |= {"time/step_s": seconds, "time/tokens_per_s": tokens / seconds,
                     "time/peak_memory_gb": memory / 2**30}
            self.steps_done += 1
            self.first_ended = self.first_ended or now  # the first step may sample, or warm a compiler up
            mean = (now - self.first_ended) / (self.steps_done - 1) if self.steps_done > 1 else seconds
            left = timedelta(seconds=round(mean * (self.config.max_steps - step)))
            speed = f"  {tokens / seconds:,.0f} tokens/s  {mean:.2f} s/step  eta {left}"
        self.add("metrics", line)
        if self.wandb:
            self.wandb.log(line, step=step)
        due = step % self.config.logging_steps == 0 or step == self.config.max_steps or self.steps_done == 1
        if due or any(name.startswith("eval/") for name in numbers):
            shown = "  ".join(f"{name} {numbers[name]:.4g}" for name in show if name in numbers)
            print(f"{step:>6}/{self.config.max_steps}  {shown}{speed}", flush=True)


def load_eval_problems(config):
    """The problems of --eval_steps; none where it is 0 or where the training data is not a named problem set."""
    name = config.eval_dataset_name or ("" if Path(config.dataset_name).exists() else config.dataset_name)
    if config.eval_steps and not name:
        print("no evaluation while training: --eval_dataset_name names the problems for it", flush=True)
    if not config.eval_steps or not name:
        return []
    return load_test_problems(config, name, "--eval_dataset_name" if config.eval_dataset_name else "--dataset_name")


def load_test_problems(config, name, known_as="--dataset_name"):
    """--n_eval problems (0: all) of --dataset_test_split of `name`, the value of the flag known_as."""
    try:
        return load_problems(name, config.dataset_test_split, config.n_eval or None, config.seed, levels=config.levels,
                             domains=config.domains, prompt_column=config.prompt_column,
                             answer_column=config.answer_column, prompt_template=config.prompt_template)
    except InputError as error:  # it names the flags of training data
        fault = str(error).replace("--dataset_train_split", "--dataset_test_split")
        raise InputError(fault.replace("--dataset_name", known_as)) from error


def eval_numbers(decoder, tokenizer, problems, step, log, config):
    """Greedy accuracy on `problems`, as eval.py measures it: numbers to log, {} on all processes but the first.

    One completion is printed, a few go to samples.jsonl; /low and /high end the accuracy's 95 % interval over problems.
    """
    if not log.active:
        return {}
    result = evaluate(decoder, tokenizer, problems, temperature=0.0, max_new_tokens=config.max_completion_length,
                      progress=sys.stderr.isatty())
    for record in result["records"][:4]:
        log.add("samples", {"step": step, **record})
    first = result["records"][0]
    prompt = first["prompt"] if isinstance(first["prompt"], str) else first["prompt"][-1]["content"]
    print(f"        {prompt[-60:]!r} -> {first['completion'][-120:]!r}: {'right' if first['correct'] else 'wrong'}",
          flush=True)
    names = ("accuracy", "accuracy/low", "accuracy/high", "parse_fail", "truncated", "mean_length")
    numbers = {f"eval/{name}": result[name] for name in names}
    if len(result["by_level"]) > 1:
        for level, part in result["by_level"].items():
            numbers[f"eval/accuracy/level_{level}"] = part["accuracy"]
    return numbers


# --- main ---

@dataclass
class Config:
    SECTIONS = {"dataset_name": "problems", "num_generations": "sampling", "output_dir": "results"}

    dataset_name: str = flag("chain", "chain, gsm8k, math500, aime24, aime25, amc23, reasoning_gym:TASK, a local file "
                                      "or folder, or a hub data set: owner/name or owner/name:configuration")
    dataset_test_split: str = flag("test", "split of the data set")
    n_eval: int = flag(256, "problems, drawn by the seed; 0: all there are", low=0)
    prompt_column: str = flag("", "column that holds the prompt; empty: found by its usual names")
    answer_column: str = flag("", "column that holds the answer; empty: found by its usual names")
    levels: str = flag("", "levels to keep, such as 1-3 or 1,4, where the data has them; empty: all (`chain`: 1-5)")
    domains: str = flag("", "kinds of problems to keep, such as add,mul, where the data has them; empty: all")
    prompt_template: str = flag("{prompt}", "text around each prompt, with {prompt} where it goes")
    chat_template: str = flag("auto", "auto: the tokenizer's, where it has one; off: prompts are plain text",
                              choices=("auto", "off"))
    num_generations: int = flag(8, "samples a problem: n", low=1)
    k: str = flag("", "sizes for pass@k and maj@k, such as 1,4,8; empty: 1, 2, 4, ... up to n")
    temperature: float = flag(1.0, "of the samples; 0, with --num_generations 1: greedy decoding only", low=0)
    top_p: float = flag(1.0, "sample from the fewest tokens that hold this much probability; 1: from all", low=1e-6,
                        high=1)
    greedy: bool = flag(True, "decode once at temperature 0 as well")
    max_completion_length: int = flag(256, "tokens a completion may take", low=1)
    generation_batch_size: int = flag(256, "completions decoded side by side", low=1)
    bf16: bool = flag(torch.cuda.is_available(), "weights in bfloat16; by default on a GPU")
    seed: int = flag(0, "of the choice of problems, the samples and the intervals", low=0)

    output_dir: str = flag("runs/eval", "where eval.json, samples.jsonl and eval.png go; with --plot: curves.png")
    against: str = flag("first", "compare each checkpoint with the first, with the one before it, or with all",
                        choices=("first", "previous", "all"))
    plot: list[str] = flag([], "draw the training curves of these run folders instead")

    def __post_init__(self):
        check_flags(self)


def read_ks(config):
    """The k of pass@k. Raises InputError for flags that contradict each other."""
    n = config.num_generations
    if config.temperature == 0 and n > 1:
        raise InputError(f"--num_generations {n}: at --temperature 0 all samples are the same; use 1")
    words = [word.strip() for word in config.k.split(",")] if config.k else []
    if not all(word.isdecimal() and 1 <= int(word) <= n for word in words):
        raise InputError(f"--k {config.k}: write sizes like 1,4,8, each from 1 to --num_generations {n}")
    return sorted(set(map(int, words))) or [2 ** i for i in range(n.bit_length())]


def run_evaluations(config, checkpoints, problems, ks):
    """For each checkpoint {"greedy": ..., "sampled": ...} as `evaluate` returns them."""
    load = partial(load_model, dtype=torch.bfloat16 if config.bf16 else torch.float32, seed=config.seed,
                   chat_template=config.chat_template)
    judge = partial(evaluate, problems=problems, max_new_tokens=config.max_completion_length, seed=config.seed,
                    batch_size=config.generation_batch_size, progress=sys.stderr.isatty())
    try:
        for checkpoint in checkpoints:  # so that a mistyped one is found before another is evaluated
            load(checkpoint)
    except InputError as error:  # here it is no flag's value
        raise InputError(str(error).removeprefix("--model_name_or_path ")) from error
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {config.output_dir}: {error.strerror}") from error
    modes = {"greedy": dict(temperature=0.0)} if config.greedy or config.temperature == 0 else {}
    if config.temperature > 0:
        modes["sampled"] = dict(n=config.num_generations, k=ks, temperature=config.temperature, top_p=config.top_p)
    evaluations = []
    for checkpoint in checkpoints:
        model, tokenizer = load(checkpoint)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        evaluations.append({})
        for mode, flags in modes.items():
            began = time.perf_counter()
            result = evaluations[-1][mode] = judge(model, tokenizer, **flags)
            print(f"{checkpoint}, {mode}: {percent(result['accuracy'])} % in {time.perf_counter() - began:.0f} s",
                  file=sys.stderr, flush=True)
    return evaluations


def compare(checkpoints, evaluations, against, seed):
    """Later checkpoints against the first, the previous one or all before them, on the same problems: list of dict."""
    those_before = {"first": lambda b: [0], "previous": lambda b: [b - 1], "all": range}[against]
    pairs = [(a, b) for b in range(1, len(checkpoints)) for a in those_before(b)]
    return [{"checkpoint": checkpoints[b], "against": checkpoints[a],
             **{mode: paired_comparison(evaluations[a][mode]["scores"], evaluations[b][mode]["scores"], seed)
                for mode in evaluations[b]}} for a, b in pairs]


def results_table(config, checkpoints, evaluations, comparisons):
    """What is printed: the accuracies, then by level and by domain, then the paired comparisons."""
    first = evaluations[0]
    main = "sampled" if "sampled" in first else "greedy"
    title = f"{config.dataset_name}, {config.dataset_test_split}: {first[main]['n_problems']} problems"
    columns = [("greedy", "greedy", "accuracy")] if "greedy" in first else []
    if main == "sampled":
        title += (f", {config.num_generations} samples each at temperature {config.temperature:g}, "
                  f"top-p {config.top_p:g}")
        columns += [(f"avg@{config.num_generations}", main, "accuracy")]
        columns += [(key, main, key) for key in first[main] if re.fullmatch(r"(pass|maj)@\d+", key) and key != "pass@1"]
    lines = [f"{title}, at most {config.max_completion_length} tokens, seed {config.seed}",
             "percent, in brackets the 95 % interval over problems"]
    rows = [["", *(title for title, _, _ in columns), "no answer", "cut off", "tokens"]]
    for checkpoint, runs in zip(checkpoints, evaluations):
        cells = [percent(*(runs[mode][f"{key}{end}"] for end in ("", "/low", "/high"))) for _, mode, key in columns]
        rows.append([checkpoint, *cells, percent(runs[main]["parse_fail"]), percent(runs[main]["truncated"]),
                     f"{runs[main]['mean_length']:.1f}"])
    lines += ["", *align(rows)]
    for kind in ("level", "domain"):
        groups = list(first[main][f"by_{kind}"])
        if len(groups) > 1:
            rows = [[f"{main}, by {kind}", *map(str, groups)]]
            rows += [[checkpoint, *(percent(runs[main][f"by_{kind}"][group]["accuracy"]) for group in groups)]
                     for checkpoint, runs in zip(checkpoints, evaluations)]
            lines += ["", *align(rows)]
    for comparison in comparisons:
        rows = []
        for mode in first:
            paired = comparison[mode]
            p = "" if paired["mcnemar_p"] is None else f", McNemar p = {paired['mcnemar_p']:.2g}"
            rows.append([f"  {mode}", percent(paired["difference"], paired["low"], paired["high"], sign="+"),
                         f"better on {paired['n_better']}, worse on {paired['n_worse']}{p}"])
        lines += ["", f"{comparison['checkpoint']} minus {comparison['against']}, on the same problems", *align(rows)]
    return "\n".join(lines)


def percent(share, low=None, high=None, sign=""):
    """
    >>> percent(0.5), percent(0.1, -0.05, 0.25, sign="+")
    ('50.0', '+10.0 [-5.0 +25.0]')
    """
    text = f"{100 * share:{sign}.1f}"
    return text if low is None else f"{text} [{100 * low:{sign}.1f} {100 * high:{sign}.1f}]"


def align(rows):
    """Lines with the columns below each other, the first one left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def write_results(config, checkpoints, evaluations, comparisons, problems):
    """eval.json, samples.jsonl and eval.png in the output folder; each replaces an older one only when it is whole."""
    folder = Path(config.output_dir)
    digest = hashlib.sha256(json.dumps([[problem.prompt, problem.answer] for problem in problems]).encode()).hexdigest()
    summaries, samples = [], []
    for checkpoint, runs in zip(checkpoints, evaluations):
        summaries.append({"checkpoint": checkpoint})
        for mode, result in runs.items():
            summaries[-1][mode] = {key: value for key, value in result.items() if key not in ("records", "scores")}
            samples += [{"checkpoint": checkpoint, "decoding": mode, **record} for record in result["records"]]
    summary = {"flags": asdict(config), "problems_sha256": digest,
               "versions": {"python": platform.python_version(), "torch": torch.__version__,
                            "transformers": transformers.__version__},
               "evaluations": summaries, "comparisons": comparisons}
    lines = "\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples)
    for name, text in (("samples.jsonl", lines), ("eval.json", json.dumps(summary, indent=1))):
        (folder / f"{name}.tmp").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        os.replace(folder / f"{name}.tmp", folder / name)
    plot_evaluations(short_names(checkpoints), evaluations, folder / "eval.png")


def main(config, checkpoints):
    folder = Path(config.output_dir)
    if config.plot:
        plot_runs(config.plot, folder / "curves.png")
        print(f"{folder}: curves.png, and curves_all.png with what else there is")
        return
    if not checkpoints:
        raise InputError("name at least one checkpoint: eval.py CHECKPOINT [CHECKPOINT ...] (--help says more)")
    ks = read_ks(config)
    problems = load_test_problems(config, config.dataset_name)
    evaluations = run_evaluations(config, checkpoints, problems, ks)
    comparisons = compare(checkpoints, evaluations, config.against, config.seed)
    write_results(config, checkpoints, evaluations, comparisons, problems)
    print(results_table(config, checkpoints, evaluations, comparisons))
    print(f"\n{folder}: eval.json, samples.jsonl, eval.png")


if __name__ == "__main__":
    launch(main, Config, words="CHECKPOINT")
