"""The plan for many live streams, and how long they stand still when replicas die: tables from measured costs, an arithmetic and a simulation.

python -m tests.simulation             the tables
python -m tests.simulation --write     into docker/README.md, between its marks
python -m tests.simulation --measure   the costs on this machine first (a minute a round; needs Docker with HAProxy's image, and Valkey), kept in costs.json
"""

from __future__ import annotations

import argparse
import json
import sys

from tests.simulation import costs, report
from tests.simulation.plan import MEASURED


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into docker/README.md")
    parser.add_argument("--measure", action="store_true", help="measure the costs on this machine, and keep them")
    parser.add_argument("--streams", type=int, default=100, help="measured at once (default 100)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these (default 3)")
    args = parser.parse_args()
    if args.measure:
        MEASURED.write_text(json.dumps(costs.run(args.streams, args.seconds, args.rounds), indent=2) + "\n")
    text = report.text()
    if args.write:
        report.write(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
