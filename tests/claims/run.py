"""Measures what the papers claim, in miniature.

    python tests/claims/run.py                    # what claims there are
    python tests/claims/run.py ssb --seeds 8      # runs one, writes tests/claims/results/ssb.json and ssb.png
    python tests/claims/run.py ssb --quick        # two seeds of very short runs: does it work at all? Writes nothing
    python tests/claims/run.py --table            # the tables of README.md and tests/claims/README.md anew

Every claim: all arms from one start, paired by seed, equal rollouts (or tokens), an interval for the paired
difference. A null or a reversal is a result and stays in both tables.
"""
import argparse
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch  # noqa: E402
from claim import RESULTS, ROOT, compare, run_claim, save, verdict  # noqa: E402

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*_claims.py"))
CLAIMS = {claim.name: claim for module in MODULES for claim in importlib.import_module(module).CLAIMS}
BEGIN, END = "<!-- claims: written by tests/claims/run.py --table -->", "<!-- end of claims -->"
PAGES = {ROOT / "README.md": {"pictures": "tests/claims/results", "every": False},
         Path(__file__).with_name("README.md"): {"pictures": "results", "every": True}}
VERDICTS = ("better", "leans better", "no difference", "leans worse", "worse")


def table(results, pictures, every):
    """All results as a Markdown table, in the figure that each claim names first; pictures: their folder, from the page.

    With `every` a line a comparison; without, a line a claim: its first comparison, and how many others came out how.
    """
    heads = ["claim", "compared", "figure", "baseline, difference [95 %]", "seeds better / worse", "seen", "CPU minutes"]
    heads += [] if every else ["other comparisons"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for result in results:
        main = next(iter(next(iter(next(iter(result["figures"].values())).values()))))
        first = f"[`{result['name']}`]({pictures}/{result['name']}.png): {result['says']} ({result['source']})"
        minutes = f"{result['cpu_minutes']:.0f}" if "cpu_minutes" in result else f"{result['minutes']:.0f} (wall)"
        compared = [c for c in result["comparisons"] if c["figure"] == main]
        seen = Counter(verdict(c).removesuffix(" seen") for c in compared[1:])
        others = f"+{len(compared) - 1} more: " + ", ".join(f"{seen[word]} {word}" for word in VERDICTS if seen[word])
        for c in compared if every else compared[:1]:
            against = [f[main] for f in result["figures"][c["against"]].values() if f[main] is not None]
            if c["low"] is None:
                change = "reached in fewer than two seeds"
            else:
                change = f"{sum(against) / len(against):.3g} {c['difference']:+.3g} [{c['low']:+.3g} {c['high']:+.3g}]"
            cells = [first, f"{c['arm']} − {c['against']}", main, change,
                     f"{c['wins']} / {c['losses']} of {result['seeds']}", verdict(c), minutes]
            cells += [] if every else [others if len(compared) > 1 else ""]
            lines.append("| " + " | ".join(cells) + " |")
            first = minutes = ""
    return "\n".join(lines)


def write_tables():
    """Puts the table of all results between the two marks of each page."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for page, how in PAGES.items():
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(results, **how)}\n{END}{rest.split(END)[1]}")


def show(result):
    """Prints a result: every arm's figures, then every comparison."""
    print(f"\n{result['name']}: {result['says']} ({result['source']})")
    if result["premise"]:
        print("  premise: " + ", ".join(f"{name} {value:.3g}" for name, value in result["premise"].items()))
    for arm, seeds in result["figures"].items():
        for name in next(iter(seeds.values())):
            values = [figures[name] for figures in seeds.values()]
            known = [value for value in values if value is not None]
            mean = f"{sum(known) / len(known):.4g}" if known else "-"
            print(f"  {arm:<28} {name:<28} {mean:>9}  ({len(known)} of {len(values)})")
    for c in result["comparisons"]:
        if c["low"] is not None:
            print(f"  {c['arm']} - {c['against']}, {c['figure']}: {c['difference']:+.4g} [{c['low']:+.4g} "
                  f"{c['high']:+.4g}]  higher in {c['wins']} seeds, lower in {c['losses']}: "
                  + verdict(c, ("higher", "lower")))  # of a length or a cost, more is not better
    print(f"  {result['cpu_minutes']:.1f} minutes of processor time")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="claims to measure; none: list them")
    parser.add_argument("--seeds", type=int, help="paired seeds; default: as the claim says")
    parser.add_argument("--quick", action="store_true", help="two seeds of very short runs, nothing is written")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="comparisons, pictures and both tables anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        if name not in CLAIMS:
            sys.exit(f"run.py: {name}: no such claim; there are {', '.join(CLAIMS)}")
    for name in options.names:
        claim = CLAIMS[name]
        result = run_claim(claim, 2 if options.quick else options.seeds or claim.seeds, options.quick, options.jobs)
        show(result)
        if not options.quick:
            save(result)
    if options.table:
        for path in RESULTS.glob("*.json"):
            result = json.loads(path.read_text())
            result["comparisons"] = [compare(result["figures"], c["arm"], c["against"], c["figure"])
                                     for c in result["comparisons"]]
            save(result)
        write_tables()
    if not options.names and not options.table:
        for claim in CLAIMS.values():
            print(f"{claim.name:<22} {claim.says} ({claim.source})")


if __name__ == "__main__":
    main()
