"""The demo over several seeds: a small ResNet on scikit-learn's embedded digits.

    python -m benchmarks.digits

Nothing is downloaded. The first table of the README is made from its results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks._record import Record
from rbpfx import demo

RESULTS = Path(__file__).parent / "results" / "digits.json"
CURVES = ("curves", "gates")  # of a report, nine tenths of its size


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--macs", nargs="+", default=["auto", "0.5", "0.2", "0.05"])
    options = parser.parse_args()
    record = Record(RESULTS)
    for macs in options.macs:
        for seed in range(options.seeds):
            key = f"macs={macs}/seed={seed}"
            if record.done(key):
                continue
            print(key, flush=True)
            target = None if macs == "auto" else float(macs)
            report = demo.run(target, seed, progress=False).report
            dense, pruned = report.dense, report.pruned
            record.add(
                key,
                {
                    "data": "digits (scikit-learn)",
                    "target": macs,
                    "seed": seed,
                    "dense_accuracy": dense.accuracy,
                    "accuracy": pruned.accuracy,
                    "macs_ratio": round(dense.macs / pruned.macs, 2),
                    "parameters_ratio": round(dense.parameters / pruned.parameters, 2),
                    "latency_ratio": {
                        str(batch): round(seconds / pruned.latency[batch], 2)
                        for batch, seconds in dense.latency.items()
                    },
                    "verification_error": report.verification_error,
                    "seconds": round(report.seconds, 1),
                    "report": {k: v for k, v in report.to_dict().items() if k not in CURVES},
                },
            )
    columns = ["target", "seed", "dense_accuracy", "accuracy", "macs_ratio", "latency_ratio"]
    print(record.table(columns))


if __name__ == "__main__":
    main()
