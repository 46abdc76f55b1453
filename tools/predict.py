"""Same as `visionattn predict`."""

import sys

from visionattn.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
