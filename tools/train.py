"""Same as `visionattn train`."""

import sys

from visionattn.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
