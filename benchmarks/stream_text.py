"""Time to the first batch, and memory, of a text source that is streamed from a large file.

Writes a ``.jsonl.gz`` file of the size asked for, reads calibration and evaluation sequences from
it in a process of its own, and prints the seconds from the constructor to the first batch, and the
peak memory beyond that of the imports.

    python benchmarks/stream_text.py --gigabytes 2
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

READ = """
import resource, sys, time
import datasets
from symprune_lightning import CalibrationDataModule, TextSource
from tests.texts import tokenizer

encoder = tokenizer()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = peak(), time.perf_counter()
source = TextSource(sys.argv[1], streaming=True)
data = CalibrationDataModule(source, encoder, sequences=32, sequence_length=512,
                             evaluation_sequences=32)
next(iter(data.calibration_dataloader()))
print(f"first batch: {time.perf_counter() - start:.2f} s")
print(f"peak memory beyond the imports: {peak() - before:.0f} MB (imports: {before:.0f} MB)")
"""


def write(path: Path, size: int) -> None:
    """Write documents until a compressed file has ``size`` bytes; gzip files may be appended."""
    generator = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    with path.open("wb") as file:
        while file.tell() < size:
            rows = [{"text": " ".join(generator.choices(words, k=300))} for _ in range(2000)]
            block = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1)
            # the same block several times: writing it is not what is measured
            for _ in range(64):
                file.write(block)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl.gz"
        write(path, int(options.gigabytes * 1e9))
        print(f"file: {path.stat().st_size / 1e9:.2f} GB")
        root = Path(__file__).parents[1]
        subprocess.run([sys.executable, "-c", READ, str(path)], check=True, cwd=root)


if __name__ == "__main__":
    main()
