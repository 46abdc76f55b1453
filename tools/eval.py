"""Same as `visionattn eval`."""

import sys

from visionattn.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
