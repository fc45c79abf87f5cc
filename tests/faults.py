"""Kills runs of the trainer, starves them, damages their files; then sees whether anything was lost.

    python tests/faults.py                                   every fault; exit status 1 if anything was lost
    python tests/faults.py --only kill full_disk --tries 40 --seed 7

A fault is survived where the same command, given again, ends with the bits of a run that was never interrupted: all
checkpoints, metrics.jsonl but for its clocks, pictures. Where only a logger or the output fails, the run has to come to
its end by itself; what can't be used has to be refused in one line, with exit status 2 and every file as it was.
"""
import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fault_rows import FAULTS
from victims import METHODS, ROOT, Place


def attempt(name: str, number: int, seed, folder: Path) -> str | None:
    """One try; what was lost, or None. It is the same for the same (name, number, seed), but for the clock."""
    chance = random.Random(f"{seed} {name} {number}")
    place = Place(folder / f"{name}-{number}", folder / "shared", list(METHODS)[number % len(METHODS)], chance)
    try:
        FAULTS[name].does(place)
        return None
    except Exception as failure:
        where = f"seed {seed}, try {number} of {name}, method {place.method}; see {place.folder}"
        return f"{type(failure).__name__}: {failure}\n({where})"
    finally:
        place.leave()


def main() -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # where the processes find the trainer
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=12, help="of each fault; methods take turns")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME",
                        help=", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="to repeat a failure")
    asked = parser.parse_args()
    folder, began, lost = Path(tempfile.mkdtemp(prefix="faults-")), time.monotonic(), {}
    print(f"seed {asked.seed}, in {folder}", file=sys.stderr)
    rows = ["| fault | tries | survived | lost |", "|---|---|---|---|"]
    for name in asked.only:
        here, tries = FAULTS[name], max(1, round(asked.tries * FAULTS[name].share))
        if here.root and not ROOT:
            rows.append(f"| {here.text} | skipped: needs root | | |")
            continue
        start, lost[name] = time.monotonic(), 0
        for number in range(tries):
            if reason := attempt(name, number, asked.seed, folder):
                lost[name] += 1
                print(f"LOST by {name}: {reason}\n", file=sys.stderr)
            else:
                shutil.rmtree(folder / f"{name}-{number}")
        print(f"{name}: {tries} tries, {lost[name]} lost, {time.monotonic() - start:.0f} s", file=sys.stderr)
        rows.append(f"| {here.text} | {tries} | {tries - lost[name]} | {lost[name]} |")
    print("\n".join(rows))
    print(f"\nseed {asked.seed}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    if not any(lost.values()):
        shutil.rmtree(folder)
    return 1 if any(lost.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
