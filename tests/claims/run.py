"""Measures what the papers claim, in miniature.

    python tests/claims/run.py                    # what claims there are
    python tests/claims/run.py sec --seeds 8      # runs one, writes tests/claims/results/sec.json and sec.png
    python tests/claims/run.py sec --quick        # two seeds of very short runs: does it work at all? Writes nothing
    python tests/claims/run.py --table            # the README's table anew from results/*.json

Every claim: all arms from one start, paired by seed, equal rollouts (or tokens), an interval for the paired
difference. A null or a reversal is a result and stays in the table.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch  # noqa: E402
from claim import RESULTS, ROOT, compare, run_claim, save, verdict  # noqa: E402

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*_claims.py"))
CLAIMS = {claim.name: claim for module in MODULES for claim in importlib.import_module(module).CLAIMS}
BEGIN, END = "<!-- claims: written by tests/claims/run.py --table -->", "<!-- end of claims -->"


def table(results):
    """The README's table of all results, as Markdown: one line a comparison of each claim's main figure."""
    lines = ["| claim | compared | figure | baseline, difference [95 %] | seeds better / worse | seen | CPU minutes |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for result in results:
        main = next(iter(next(iter(next(iter(result["figures"].values())).values()))))
        first = f"[`{result['name']}`](tests/claims/results/{result['name']}.png): {result['says']} ({result['source']})"
        minutes = f"{result['cpu_minutes']:.0f}" if "cpu_minutes" in result else f"{result['minutes']:.0f} (wall)"
        for c in (c for c in result["comparisons"] if c["figure"] == main):
            against = [f[main] for f in result["figures"][c["against"]].values() if f[main] is not None]
            if c["low"] is None:
                change = "reached in fewer than two seeds"
            else:
                change = f"{sum(against) / len(against):.3g} {c['difference']:+.3g} [{c['low']:+.3g} {c['high']:+.3g}]"
            lines.append(f"| {first} | {c['arm']} − {c['against']} | {main} | {change} | {c['wins']} / {c['losses']} "
                         f"of {result['seeds']} | {verdict(c)} | {minutes} |")
            first = minutes = ""
    return "\n".join(lines)


def write_table():
    """Puts the table of all results between the README's two marks."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    readme.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


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
    parser.add_argument("--table", action="store_true", help="comparisons, pictures and the README's table anew")
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
        write_table()
    if not options.names and not options.table:
        for claim in CLAIMS.values():
            print(f"{claim.name:<22} {claim.says} ({claim.source})")


if __name__ == "__main__":
    main()
