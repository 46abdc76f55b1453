"""Same as `visionattn convert`."""

import sys

from visionattn.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
