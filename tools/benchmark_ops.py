"""``python tools/benchmark_ops.py [--operator NAME ...]``: the same as ``visionattn benchmark --ops``."""

import sys

from visionattn.cli import main

if __name__ == "__main__":
    main(["benchmark", "--ops", *sys.argv[1:]])
