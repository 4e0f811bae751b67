"""The arithmetic of tests/claims/, and that every command line in it is one the scripts take."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

CLAIMS_FOLDER = Path(__file__).parent / "claims"
sys.path.insert(0, str(CLAIMS_FOLDER))

import claim  # noqa: E402
import run  # noqa: E402
from eval import parse_flags  # noqa: E402


def test_area_is_the_mean_height():
    assert claim.area([(10, 0.5), (20, 0.5)]) == pytest.approx(0.5)
    assert claim.area([(10, 0.0), (20, 1.0)]) == pytest.approx(0.25)  # 0 up to 10, then a triangle of 5, over 20
    assert claim.area([(10, 0.0), (20, 1.0)], until=15) == pytest.approx(0.25 * 5 / 15)
    with pytest.raises(ValueError, match="ends at 20"):
        claim.area([(10, 0.0), (20, 1.0)], until=30)


def test_reach_is_the_first_crossing_or_none():
    curve = [(10, 0.0), (20, 0.4), (30, 0.2), (40, 1.0)]
    assert claim.reach(curve, 0.2) == pytest.approx(15)
    assert claim.reach(curve, 0.6) == pytest.approx(35)
    assert claim.reach(curve, 1.1) is None
    assert claim.reach([(10, 0.9)], 0.5) == 10


def figures_of(**arms):
    return {arm: {str(seed): {"x": value} for seed, value in enumerate(values)} for arm, values in arms.items()}


def test_comparison_is_paired_and_censors_what_was_never_reached():
    figures = figures_of(a=[1.0, 2.0, None, 4.0], b=[0.5, 2.5, 1.0, 3.0])
    found = claim.compare(figures, "a", "b", "x")
    differences = [0.5, -0.5, 1.0]
    assert found["difference"] == pytest.approx(np.mean(differences))
    assert (found["wins"], found["losses"], found["censored"]) == (2, 1, 1)
    half = 4.303 * np.std(differences, ddof=1) / 3**0.5
    assert found["t_high"] - found["difference"] == pytest.approx(half, rel=1e-3)
    assert -0.5 <= found["low"] < found["difference"] < found["high"] <= 1.0


def test_few_seeds_only_lean():
    sure = claim.compare(figures_of(a=[1.0, 1.1, 0.9], b=[0.0, 0.0, 0.0]), "a", "b", "x")
    assert claim.verdict(sure) == "better"
    leaning = claim.compare(figures_of(a=[0.1, 1.0, 3.0], b=[0.0, 0.0, 0.0]), "a", "b", "x")
    assert leaning["low"] > 0 > leaning["t_low"] and claim.verdict(leaning) == "leans better"
    nothing = claim.compare(figures_of(a=[-1.0, 1.0, 0.5], b=[0.0, 0.0, 0.0]), "a", "b", "x")
    assert claim.verdict(nothing) == "no difference seen"
    touching = claim.compare(figures_of(a=[0.0, 0.1, 0.2 + 1e-17], b=[0.3, 0.3, 0.1 + 0.2]), "a", "b", "x")
    assert claim.compare(figures_of(a=[0.3, 0.3], b=[0.1 + 0.2, 0.1 + 0.2]), "a", "b", "x")["low"] == 0
    assert claim.verdict(touching) == "leans worse" and claim.verdict(touching, ("higher", "lower")) == "leans lower"
    single = claim.compare(figures_of(a=[1.0], b=[0.0]), "a", "b", "x")
    assert single["difference"] == 1 and claim.verdict(single) == "no difference seen"


def command_lines():
    for name, one in run.CLAIMS.items():
        for arm, parts in {"start": one.start, **one.arms}.items():
            for part in [parts] if callable(parts) else parts:
                if not callable(part):
                    yield pytest.param(f"{part} {one.quick if arm != 'start' else ''}", id=f"{name}: {arm}")


@pytest.mark.parametrize("command", command_lines())
def test_every_command_of_a_claim_is_one_its_script_takes(command):
    words = shlex.split(command.format(start="S", out="O", seed=1, claim="C", other=2))
    script = importlib.import_module(words[0].removesuffix(".py"))
    config, left = parse_flags(script.Config, "", "", words[1:])
    assert not left
    script.check_config(config)


@pytest.mark.parametrize("path", sorted((CLAIMS_FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_is_of_a_claim_and_its_comparisons_are_of_its_seeds(path):
    result = json.loads(path.read_text())
    assert result["name"] == path.stem and path.stem in run.CLAIMS
    assert path.with_suffix(".png").is_file()
    for arm in result["figures"].values():
        assert len(arm) == result["seeds"]
    for c in result["comparisons"]:
        assert c == pytest.approx(claim.compare(result["figures"], c["arm"], c["against"], c["figure"]))


@pytest.mark.parametrize("page", run.PAGES, ids=lambda page: str(page.relative_to(claim.ROOT)))
def test_the_table_of_a_page_is_that_of_the_results(page):
    between = page.read_text().split(run.BEGIN)[1].split(run.END)[0].strip()
    results = [json.loads(path.read_text()) for path in sorted(claim.RESULTS.glob("*.json"))]
    assert between == run.table(results, **run.PAGES[page])
