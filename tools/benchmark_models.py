"""``python tools/benchmark_models.py MODEL... [--device cuda ...]``: the same as ``visionattn benchmark``."""

import sys

from visionattn.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
